// Curves over λ, density and weights: what was tuned, which point validation chose, what tests say.

const TUNED = { scale: "λ", density: "Density", weights: "Weights" };

/** The points of a curve for one quality: the mean of its tasks, or one task of the matrix. */
function tunedPoints(curve, column) {
  return curve.points.map((point) => {
    const row = DATA.matrix.rows.find((each) => each.label === point.row);
    return { ...point, figure: column === "mean" ? point.mean : row && row.cells[column] };
  }).filter((point) => point.figure);
}

function tunedChart(curves, column, width) {
  const series = curves.map((curve, at) => ({ curve, at, points: tunedPoints(curve, column) })).filter(({ points }) => points.length);
  if (!series.length) return html("p", { class: "dim small" }, "Not measured.");
  const metric = column === "mean" ? metricOf(curves[0].tasks.map((task) => DATA.matrix.tasks.findIndex((each) => each.task === task))) : DATA.matrix.tasks[column].metric;
  const lower = LOWER.has(metric);
  const sign = lower ? -1 : 1;
  const validated = column === "mean";
  const all = series.flatMap(({ points }) => points);
  const ys = all.flatMap(({ figure, validation }) => [figure.low, figure.high, ...(validated && validation !== null ? [sign * validation] : [])]);
  const [low, high] = widened(ys);
  const xs = all.map((point) => point.x);
  const [first, last] = widened(xs, 0.05);
  const tasks = column === "mean" ? (curves[0].tasks.length > 1 ? `mean of ${curves[0].tasks.length} tasks` : curves[0].tasks[0]) : DATA.matrix.tasks[column].task;
  const view = frame({ width, height: 290, label: `${curves[0].name} against ${tasks}`,
    x: { low: first, high: last, text: short, name: curves[0].name },
    y: { low, high, text: (value, digits) => short(lower ? value : 100 * value, Math.max(3, digits)), name: `${words(metric)}${lower ? "" : ", %"}, ${tasks} — ${lower ? "lower" : "higher"} is better` } });
  for (const { curve, at, points } of series) {
    const path = (value) => points.map((point, n) => `${n ? "L" : "M"}${view.x(point.x).toFixed(1)},${view.y(value(point)).toFixed(1)}`).join("");
    view.plot.append(svg("path", { d: path((point) => point.figure.value), fill: "none", stroke: colour(at), "stroke-width": 2, "stroke-dasharray": dash(at) }));
    if (validated && points.every((point) => point.validation !== null)) {
      view.plot.append(svg("path", { class: "validated", d: path((point) => sign * point.validation), fill: "none", stroke: colour(at), "stroke-width": 1.5, "stroke-dasharray": "2 4" }));
    }
    for (const point of points) {
      const x = view.x(point.x), y = view.y(point.figure.value);
      const told = rowOf(point.row);
      const rows = [...figureRows(point.figure, metric), [curve.name, short(point.x, 4)],
        ...(point.validation === null ? [] : [["validation", score(sign * point.validation, metric)]]), ...(point.chosen ? [["", "chosen on validation"]] : []), ...(told.note ? [["", told.note]] : [])];
      const mark = svg("a", { href: told.card || `#brick-${COMPARISON.rows.indexOf(told)}`, "data-x": point.x, "data-value": point.figure.value, "data-chosen": String(point.chosen),
        "aria-label": `${point.row}: ${rows.map(([name, value]) => `${name} ${value}`).join(", ")}` },
      svg("line", { class: "whisker", x1: x, x2: x, y1: view.y(point.figure.low), y2: view.y(point.figure.high), stroke: colour(at) }),
      point.chosen ? svg("circle", { cx: x, cy: y, r: 9, fill: "none", stroke: "var(--ink)", "stroke-width": 2 }) : null,
      svg("circle", { cx: x, cy: y, r: 4.5, fill: colour(at), stroke: "var(--card)", "stroke-width": 1 }));
      view.plot.append(withTip(mark, () => ({ title: point.row, rows })));
    }
  }
  return view.root;
}

function tunedCard(curves, column) {
  const marks = curves.map((curve, at) => html("li", {}, svg("svg", { width: 22, height: 8, "aria-hidden": "true" },
    svg("line", { x1: 1, x2: 21, y1: 4, y2: 4, stroke: colour(at), "stroke-width": 3, "stroke-dasharray": dash(at) })), html("span", {}, curve.family)));
  return html("div", { class: "chart" }, html("h3", {}, TUNED[curves[0].parameter]), html("ul", { class: "lines" }, marks),
    drawnIn(html("div", {}), (width) => tunedChart(curves, column, width)));
}

function drawTuning() {
  if (!COMPARISON || !COMPARISON.curves.length) return;
  // Curves over the same number and the same tasks share a chart.
  const groups = new Map();
  for (const curve of COMPARISON.curves) {
    const key = JSON.stringify([curve.name, curve.tasks]);
    groups.set(key, [...(groups.get(key) || []), curve]);
  }
  const columns = [["mean", "Mean of the bricks’ own tasks"], ...DATA.matrix.tasks.map(({ task, metric }, at) => [String(at), `${task}, ${words(metric)}`])]
    .filter(([value]) => value !== "mean" || COMPARISON.curves.some((curve) => curve.points.some((point) => point.mean)));
  const holder = html("div", { class: "charts" });
  const draw = () => holder.replaceChildren(...[...groups.values()].map((curves) => tunedCard(curves, select.value === "mean" ? "mean" : Number(select.value))));
  const select = html("select", { change: draw }, columns.map(([value, name]) => html("option", { value }, name)));
  draw();
  const chosen = COMPARISON.curves.some((curve) => curve.points.some((point) => point.chosen));
  fill("tuning",
    html("p", { class: "lead" }, chosen
      ? "Solid: test rows, with 95\u00a0% intervals. Dotted: validation rows. The ringed point is the best on validation; it alone competes and is compared, and no test figure chose it."
      : "Test rows, with 95\u00a0% intervals. These tasks have no validation rows, so nothing was chosen: all points compete, and the best of them looks better than it is."),
    html("div", { class: "tools" }, html("label", {}, "Quality", select)), holder);
}
