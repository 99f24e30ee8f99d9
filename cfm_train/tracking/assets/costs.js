// Cost against quality: one mark for each brick, with its interval; bounds as lines across. A mark
// whose brick has a note (its weights adapted on test inputs) is hollow, and the note is told.

/** The figure of a matrix row for one column, or the mean gain over the floor on all its tasks. */
function quality(row, column) {
  if (column === "normalised" || column === "mean") return row[column];
  if (column !== "gain") return row.cells[column];
  const floors = DATA.matrix.rows.filter((other) => other.role === "floor");
  const gains = row.cells.map((cell, at) => {
    const bounds = floors.map((floor) => floor.cells[at]).filter(Boolean).map((bound) => bound.value);
    if (!cell || !bounds.length || LOWER.has(DATA.matrix.tasks[at].metric)) return null;
    const bound = Math.max(...bounds);
    return { value: cell.value - bound, low: cell.low - bound, high: cell.high - bound, n: cell.n };
  }).filter(Boolean);
  if (!gains.length) return null;
  const mean = (key) => gains.reduce((sum, gain) => sum + gain[key], 0) / gains.length;
  const half = (key) => Math.hypot(...gains.map((gain) => gain[key] - gain.value)) / gains.length;
  const value = mean("value");
  return { value, low: value - half("low"), high: value + half("high"), n: gains.reduce((sum, gain) => sum + gain.n, 0) };
}

/** Puts a label beside each mark where no other label or mark is; leaves it out where all is full. */
function placeLabels(marks, box) {
  const taken = marks.map(({ x, y }) => ({ left: x - 8, right: x + 8, top: y - 8, bottom: y + 8 }));
  return marks.map(({ x, y, text }) => {
    const width = text.length * 6.9 + 4;
    const spots = [[x + 11, y + 4, "start"], [x - 11, y + 4, "end"], [x, y - 13, "middle"], [x, y + 23, "middle"],
      [x + 9, y - 9, "start"], [x + 9, y + 17, "start"], [x - 9, y - 9, "end"], [x - 9, y + 17, "end"]];
    for (const [tx, ty, anchor] of spots) {
      const left = anchor === "start" ? tx : anchor === "end" ? tx - width : tx - width / 2;
      const area = { left, right: left + width, top: ty - 11, bottom: ty + 4 };
      const inside = area.left >= box.left && area.right <= box.right + 10 && area.top >= box.top - 6 && area.bottom <= box.bottom - 2;
      const free = taken.every((other) => area.right < other.left || area.left > other.right || area.bottom < other.top || area.top > other.bottom);
      if (inside && free) {
        taken.push(area);
        return { x: tx, y: ty, anchor, text };
      }
    }
    return null;
  });
}

const QUALITIES = { gain: "mean gain over the floor, points", normalised: "normalised average, %", mean: "mean over tasks" };

function costChart(key, column, width) {
  const [, costName, costText] = COSTS.find(([name]) => name === key);
  const points = DATA.costs.map((point) => ({ ...point, x: point.cost[key], row: DATA.matrix.rows[point.row] }))
    .map((point) => ({ ...point, figure: quality(point.row, column) }))
    .filter((point) => point.figure && (point.x ?? null) !== null);
  if (!points.length) return html("p", { class: "dim" }, `No brick of this task has a figure for “${costName.toLowerCase()}”.`);
  const whole = Number.isInteger(column) ? null : column;
  const metric = whole === "mean" ? metricOf(DATA.matrix.tasks.map((_, at) => at)) : whole || DATA.matrix.tasks[column].metric;
  const bounds = column === "gain" ? [{ name: "floor", value: 0 }] : ["floor", "ceiling"].flatMap((role) => {
    const cells = DATA.matrix.rows.filter((row) => row.role === role).map((row) => quality(row, column)).filter(Boolean).map((cell) => cell.value);
    const strictest = LOWER.has(metric) ? Math.min : Math.max;
    return cells.length ? [{ name: role === "floor" ? "floor" : "upper bound", value: strictest(...cells) }] : [];
  });
  const xs = points.map((point) => point.x);
  const log = Math.min(...xs) > 0 && Math.max(...xs) / Math.min(...xs) > 12;
  const [low, high] = log ? [Math.min(...xs) / 1.6, Math.max(...xs) * 1.6] : widened(xs, 0.14);
  const [bottom, top] = widened([...points.flatMap(({ figure }) => [figure.low, figure.high]), ...bounds.map((bound) => bound.value)]);
  const view = frame({ width, height: width < 560 ? 300 : 360, label: `${costName} against ${words(metric)}`,
    x: { low: log ? low : Math.max(0, low), high, log, text: costText, name: costName },
    y: { low: bottom, high: top, flip: LOWER.has(metric), text: (value, digits) => short(LOWER.has(metric) ? value : 100 * value, Math.max(3, digits)),
      name: `${QUALITIES[whole] || `${words(metric)}${unit(metric) && ", %"}, ${DATA.matrix.tasks[column].task}`} — ${LOWER.has(metric) ? "lower" : "higher"} is better` } });
  for (const bound of bounds) {
    const y = view.y(bound.value);
    view.plot.append(svg("line", { class: "bound-line", x1: view.box.left, x2: view.box.right, y1: y, y2: y }),
      svg("text", { class: "halo", x: view.box.right, y: y - 6, "text-anchor": "end" }, bound.name));
  }
  const marks = points.map((point) => ({ x: view.x(point.x), y: view.y(point.figure.value), text: fitted(point.row.short || point.row.label, 300) }));
  points.forEach((point, at) => {
    const { x, y } = marks[at];
    const made = point.row.role === "merged";
    const fillColour = made ? "var(--c1)" : "var(--c0)";
    const { note } = point.row;
    const paint = { fill: note ? "var(--card)" : fillColour, stroke: note ? fillColour : "var(--card)", "stroke-width": note ? 2.5 : 1.5 };
    const rows = [...figureRows(point.figure, metric), [costName.toLowerCase(), costText(point.x)], ...(note ? [["", note]] : [])];
    const target = point.card || (COMPARISON && rowOf(point.row.label) ? `#brick-${COMPARISON.rows.indexOf(rowOf(point.row.label))}` : null);
    const group = svg(target ? "a" : "g", { ...(target ? { href: target } : { tabindex: 0, role: "img" }), "data-value": point.figure.value, "data-cost": point.x, class: note ? "noted" : null,
      "aria-label": `${point.row.label}: ${rows.map(([name, text]) => `${name} ${text}`).join(", ")}` },
    svg("line", { class: "whisker", x1: x, x2: x, y1: view.y(point.figure.low), y2: view.y(point.figure.high), stroke: fillColour }),
    made ? svg("path", { d: `M${x},${y - 8}L${x + 8},${y}L${x},${y + 8}L${x - 8},${y}Z`, ...paint })
      : svg("circle", { cx: x, cy: y, r: 6.5, ...paint }));
    view.plot.append(withTip(group, () => ({ title: point.row.label, rows })));
  });
  for (const label of marks.length > 14 ? [] : placeLabels(marks, view.box)) {
    if (label) view.plot.append(svg("text", { class: "strong halo", x: label.x, y: label.y, "text-anchor": label.anchor, "pointer-events": "none" }, label.text));
  }
  return view.root;
}

const columnOf = (value) => Number.isInteger(Number(value)) ? Number(value) : value;

function drawCosts() {
  const { tasks, rows } = DATA.matrix;
  const keys = COSTS.filter(([key]) => DATA.costs.some((point) => (point.cost[key] ?? null) !== null));
  if (DATA.costs.length < 2 || !keys.length) return; // one mark compares nothing; the headline has its cost
  const columns = tasks.map(({ task, metric }, at) => [String(at), `${task}, ${words(metric)}`]);
  const floors = rows.some((row) => row.role === "floor");
  if (tasks.length > 1 && floors) columns.unshift(["gain", "Mean gain over the floor, points"]);
  for (const [by, name] of [["mean", "Mean over tasks"], ["normalised", "Normalised average"]]) {
    if (COMPARISON && rows.some((row) => row[by] && competes(row))) columns.unshift([by, name]);
  }
  const holder = html("div", {});
  let width = 0;
  const redraw = () => { if (width) holder.replaceChildren(costChart(cost.value, columnOf(quality.value), width)); };
  const select = (options) => html("select", { change: redraw }, options.map(([value, name]) => html("option", { value }, name)));
  const cost = select(keys), quality = select(columns);
  drawnIn(holder, (now) => { width = now; return costChart(cost.value, columnOf(quality.value), now); });
  const noted = DATA.costs.map((point) => rows[point.row]).filter((row) => row.note);
  const merged = DATA.costs.some((point) => rows[point.row].role === "merged");
  fill("costs",
    html("p", { class: "lead" }, "Up and to the left is better. A mark leads to its card. The bars are 95\u00a0% intervals",
      merged ? "; circles are trained bricks, diamonds were made from bricks." : ".",
      COMPARISON ? " Time is the training loop’s of a trained brick, the whole run’s of a stored merge, and that of putting a configuration together here; what its bricks took is not in it." : null),
    html("div", { class: "tools" }, html("label", {}, "Cost", cost), html("label", {}, "Quality", quality)), holder,
    noted.length ? html("p", { class: "dim small said" }, `Hollow: ${noted.map((row) => `${row.short || row.label} ${row.note}`).join("; ")}.`) : null);
}
