// Who is ahead over all tasks: one line for each row that competes, with its interval and the bounds.

const COMPARISON = DATA.comparison;
const rowOf = (label) => COMPARISON.rows.find((row) => row.label === label);

/** A row's name; it leads to the brick's card, or to what the configuration is made of. */
function nameOf(label) {
  const row = rowOf(label);
  if (!row || row.role === "floor") return label;
  return html("a", { class: "plain", href: row.card || `#brick-${COMPARISON.rows.indexOf(row)}` }, label);
}
/** How the weights of a row were found, where a record says so, and what else has to be said. */
function notesOf(row) {
  return [row.chosen_on ? `chosen on ${row.chosen_on}` : null,
    row.note].filter(Boolean);
}

function rankingEntries(by) {
  const grouped = new Set(COMPARISON.groups.flatMap((group) => group.members));
  const entries = COMPARISON.rows.filter((row) => (row.competes && !grouped.has(row.label)) || ["floor", "ceiling"].includes(row.role))
    .map((row) => ({ label: row.label, figure: row[by], role: row.role, notes: notesOf(row) }));
  for (const group of COMPARISON.groups) {
    entries.push({ label: `${group.label} · mean of ${group.members.length} seeds`, figure: group[by], role: rowOf(group.members[0]).role, notes: [...new Set(group.members.flatMap((label) => notesOf(rowOf(label))))], seeds: true });
  }
  return entries.filter((entry) => entry.figure);
}

/** One interval on a common scale; bounds and the individual bricks' level as lines. */
function intervalBar(entry, low, high, lines, width) {
  const x = scale(low, high, 8, width - 8);
  const colourOf = { brick: "var(--c0)", merged: "var(--c1)" }[entry.role] || "var(--faint)";
  const y = 13, at = x(entry.figure.value);
  return svg("svg", { width, height: 26, role: "img", "aria-hidden": "true" },
    lines.map((line) => svg("line", { class: line.strong ? "axis" : "bound-line", x1: x(line.value), x2: x(line.value), y1: 0, y2: 26 })),
    svg("line", { x1: x(entry.figure.low), x2: x(entry.figure.high), y1: y, y2: y, stroke: colourOf, "stroke-width": 7, "stroke-linecap": "round", opacity: .35 }),
    entry.role === "merged" ? svg("path", { d: `M${at},${y - 7}L${at + 7},${y}L${at},${y + 7}L${at - 7},${y}Z`, fill: colourOf, stroke: "var(--card)", "stroke-width": 1.5 })
      : svg("circle", { cx: at, cy: y, r: 6, fill: colourOf, stroke: "var(--card)", "stroke-width": 1.5 }));
}
function rankingAxis(low, high, lower, percent, width) {
  const x = scale(low, high, 8, width - 8);
  const values = ticks(low, high, Math.max(2, Math.floor(width / 80)));
  const texts = tickTexts(values, (value, digits) => short(percent ? 100 * value : value, digits));
  return svg("svg", { width, height: 22, "aria-hidden": "true" },
    svg("line", { class: "axis", x1: 8, x2: width - 8, y1: 1, y2: 1 }),
    values.map((value, at) => [svg("line", { class: "axis", x1: x(value), x2: x(value), y1: 1, y2: 5 }),
      svg("text", { x: Math.min(Math.max(x(value), 14), width - 16), y: 18, "text-anchor": "middle" }, texts[at])]));
}

function rankingTable(by) {
  const lower = by === "mean" && COMPARISON.tasks.every((task) => LOWER.has(DATA.matrix.tasks.find((each) => each.task === task).metric));
  const entries = rankingEntries(by).sort((a, b) => (lower ? 1 : -1) * (a.figure.value - b.figure.value));
  const percent = by === "normalised" || !lower;
  const text = (value) => percent ? (100 * value).toFixed(1) : score(value, "loss");
  const bounds = entries.filter((entry) => entry.role === "floor" || entry.role === "ceiling");
  const lines = bounds.map((bound) => ({ value: bound.figure.value }));
  if (by === "normalised") lines.push({ value: 1, strong: true });
  const [low, high] = widened([...entries.flatMap(({ figure }) => [figure.low, figure.high]), ...lines.map((line) => line.value)], 0.04);
  const kinds = { brick: "brick", merged: "made from bricks", floor: "lower bound", ceiling: "upper bound" };
  const rows = entries.map((entry) => html("tr", { class: DATA.headline && entry.label === DATA.headline.label ? "first" : "" },
    html("th", { scope: "row" }, entry.seeds ? entry.label : nameOf(entry.label), html("small", {}, [kinds[entry.role], ...entry.notes].join(" · "))),
    html("td", { class: "figure", "data-value": entry.figure.value }, html("b", {}, text(entry.figure.value)), html("small", {}, `${text(entry.figure.low)}${entry.figure.low < 0 ? " to " : "–"}${text(entry.figure.high)}`)),
    html("td", { class: "bar" }, drawnIn(html("div", {}), (width) => intervalBar(entry, low, high, lines, width)))));
  return html("table", { class: "forest" }, html("tbody", {}, rows),
    html("tfoot", {}, html("tr", {}, html("td", {}), html("td", { class: "dim small" }, percent ? "%" : ""),
      html("td", { class: "bar" }, drawnIn(html("div", {}), (width) => rankingAxis(low, high, lower, percent, width)),
        html("div", { class: "dim small center" }, by === "normalised" ? "% of each task’s individual brick, mean of tasks — right is better (100: as good as the individual bricks)"
          : `mean of ${COMPARISON.tasks.length} task${COMPARISON.tasks.length > 1 ? "s" : ""}${percent ? ", %" : ""} — ${lower ? "left" : "right"} is better`)))));
}

function drawRanking() {
  if (!COMPARISON) return;
  const choices = [["normalised", "Normalised average"], ["mean", "Mean score"]].filter(([by]) => rankingEntries(by).length > 1);
  if (!choices.length) return;
  const holder = html("div", {}, rankingTable(choices[0][0]));
  const select = html("select", { change: () => holder.replaceChildren(rankingTable(select.value)) }, choices.map(([value, name]) => html("option", { value }, name)));
  const shared = COMPARISON.test_sets < COMPARISON.tasks.length
    ? ` ${COMPARISON.tasks.length} tasks have ${COMPARISON.test_sets} sets of test rows; tasks that share theirs count as one.` : "";
  const individuals = Object.entries(COMPARISON.individuals).map(([task, label]) => `${label} on ${task}`);
  fill("ranking",
    html("p", { class: "lead" }, `Bars are 95\u00a0% intervals from a bootstrap that draws the same test rows for all, so differences are surer than bars look that overlap.${shared}`,
      COMPARISON.unrelated.length ? ` Not in the averages, as no brick here was trained on it: ${COMPARISON.unrelated.join(", ")}.` : "",
      individuals.length && choices[0][0] === "normalised" ? html("span", {}, ` Individual bricks: ${individuals.join(", ")}.`) : null),
    choices.length > 1 ? html("div", { class: "tools" }, html("label", {}, "By", select)) : null, holder);
}
