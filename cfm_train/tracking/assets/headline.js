// The first thing a person sees: who won, by how much, and what it cost; then the checks.

const metricOf = (columns) => {
  const names = new Set(columns.map((column) => DATA.matrix.tasks[column].metric));
  return names.size === 1 ? [...names][0] : "score";
};
const tasksOf = (columns) => columns.length === 1
  ? DATA.matrix.tasks[columns[0]].task : `mean of ${columns.length} tasks`;

/** Floor, figure with interval, and ceiling on one line. */
function bullet(entry, metric, width) {
  const shown = [entry.figure.low, entry.figure.high, entry.figure.value];
  for (const bound of [entry.floor, entry.ceiling]) if (bound) shown.push(bound.value);
  const low = Math.min(...shown), high = Math.max(...shown), pad = (high - low) * 0.08 || Math.abs(low) * 0.05 || 1;
  const x = scale(low - pad, high + pad, 4, width - 4);
  const middle = 14;
  const marks = [["floor", "floor"], ["ceiling", "upper bound"]].filter(([key]) => entry[key])
    .map(([key, name]) => ({ at: x(entry[key].value), text: `${name} ${score(entry[key].value, metric)}` }));
  marks.sort((a, b) => a.at - b.at);
  // Two labels that would touch are pushed apart to their own sides.
  const half = (mark) => mark.text.length * 3.3;
  for (const mark of marks) mark.text_at = Math.min(Math.max(mark.at, half(mark)), width - half(mark));
  if (marks.length === 2) {
    const overlap = half(marks[0]) + half(marks[1]) + 8 - (marks[1].text_at - marks[0].text_at);
    if (overlap > 0) {
      marks[0].text_at = Math.max(half(marks[0]), marks[0].text_at - overlap);
      marks[1].text_at = Math.max(marks[1].text_at, marks[0].text_at + half(marks[0]) + half(marks[1]) + 8);
    }
  }
  return svg("svg", { width, height: marks.length ? 48 : 28, role: "img", "aria-label":
    `${score(entry.figure.value, metric)}, 95 % interval ${range(entry.figure, metric)}; ${marks.map((m) => m.text).join("; ")}` },
    svg("line", { x1: 4, x2: width - 4, y1: middle, y2: middle, class: "axis", "stroke-width": 2, "stroke-linecap": "round" }),
    marks.map((mark) => [
      svg("line", { x1: mark.at, x2: mark.at, y1: middle - 9, y2: middle + 9, stroke: "var(--dim)", "stroke-width": 2 }),
      svg("text", { x: mark.text_at, y: 42, "text-anchor": "middle" }, mark.text)]),
    svg("line", { x1: x(entry.figure.low), x2: x(entry.figure.high), y1: middle, y2: middle,
      stroke: "var(--accent)", "stroke-width": 8, "stroke-linecap": "round", opacity: .35 }),
    svg("circle", { cx: x(entry.figure.value), cy: middle, r: 7, fill: "var(--accent)", stroke: "var(--card)", "stroke-width": 2 }));
}

/** How far a figure stands from the frozen backbone with a head of its own. */
function gain(entry, metric) {
  if (!entry.floor) return null;
  const by = entry.figure.value - entry.floor.value;
  const better = LOWER.has(metric) ? by <= 0 : by >= 0;
  const size = LOWER.has(metric) ? short(Math.abs(by)) : `${(100 * Math.abs(by)).toFixed(1)} points`;
  const direction = by >= 0 ? "+" : "−";
  return html("span", { class: better ? "gain" : "gain behind" }, `${direction}${size} against the frozen backbone`);
}

/** How sure the win is: the margin to the next best on the same rows, and on what it was chosen. */
function marginNote(head, metric) {
  if (!head.margin) return null;
  const by = pointsOf(head.margin, metric);
  const chosen = DATA.comparison.rows.find((row) => row.label === head.label);
  const found = chosen && chosen.chosen_on ? ` Its weights were chosen on ${chosen.chosen_on} rows.` : "";
  return [html("p", { class: "margin" }, html("span", { class: `pill ${head.clear ? "" : "open"}` }, head.clear ? "clear win" : "too close to call"), " ",
    html("b", { "data-margin": head.margin.value }, by.value), " ahead of ", html("b", {}, head.runner_up), ` (95\u00a0% interval ${by.range}, ${head.method})`,
    head.clear ? "." : ": the interval holds 0."),
  html("p", { class: "dim small" }, `Figures are on test rows; λ, density and weights are never chosen on them.${found}`)];
}
function pointsOf(figure, metric) {
  const plain = LOWER.has(metric);
  const text = (value) => `${value < 0 ? "−" : "+"}${plain ? short(Math.abs(value)) : (100 * Math.abs(value)).toFixed(1)}`;
  return { value: `${text(figure.value)}${plain ? "" : " points"}`, range: `${text(figure.low)} to ${text(figure.high)}` };
}

/** The margin on each task: what the win is made of. */
function whereItWins(head) {
  const tasks = Object.entries(head.tasks);
  if (tasks.length < 2) return null;
  const metrics = tasks.map(([task]) => head.by === "normalised" ? "score" : DATA.matrix.tasks.find((each) => each.task === task).metric);
  const most = Math.max(...tasks.flatMap(([, figure]) => [Math.abs(figure.low), Math.abs(figure.high)])) || 1;
  const bar = (figure, width) => {
    const x = scale(-most, most, 4, width - 4);
    const tone = figure.low > 0 ? "var(--good)" : figure.high < 0 ? "var(--bad)" : "var(--faint)";
    return svg("svg", { width, height: 18, "aria-hidden": "true" },
      svg("line", { class: "axis", x1: x(0), x2: x(0), y1: 0, y2: 18 }),
      svg("line", { x1: x(figure.low), x2: x(figure.high), y1: 9, y2: 9, stroke: tone, "stroke-width": 6, "stroke-linecap": "round", opacity: .35 }),
      svg("circle", { cx: x(figure.value), cy: 9, r: 4.5, fill: tone }));
  };
  return [html("p", { class: "eyebrow" }, `Where it is ahead of ${head.runner_up}`),
    html("table", { class: "margins" }, html("tbody", {}, tasks.map(([task, figure], at) => html("tr", {},
      html("th", { scope: "row" }, task.replaceAll("_", "_\u200b")), html("td", { class: "bar" }, drawnIn(html("div", {}), (width) => bar(figure, width))),
      html("td", { class: "number", "data-value": figure.value }, pointsOf(figure, metrics[at]).value.replace(" points", "")))))),
  ];
}

function drawHeadline() {
  const head = DATA.headline;
  if (!head) return;
  if (head.kind === "each") {
    fill("headline", html("p", { class: "eyebrow" }, "Best of each task"),
      html("p", { class: "lead" }, "No brick stands on two tasks yet, so each task has a winner of its own."),
      html("div", { class: "each" }, head.winners.map((entry) => {
        const { task, metric } = DATA.matrix.tasks[entry.columns[0]];
        return html("div", {},
          html("div", { class: "each-head" }, html("h3", {}, task),
            html("b", {}, score(entry.figure.value, metric) + unit(metric))),
          html("div", { class: "dim small" }, `${entry.label}${DATA.matrix.rows[entry.row].note ? ` (${DATA.matrix.rows[entry.row].note})` : ""}${entry.of > 1 ? `, best of ${entry.of}` : ""} · ${words(metric)}, 95 % ${range(entry.figure, metric)}`),
          drawnIn(html("div", {}), (width) => bullet(entry, metric, width)));
      })));
    return;
  }
  const metric = metricOf(head.columns);
  const alone = head.of === 1;
  const cost = head.cost || (head.run === null ? null : DATA.runs[head.run].cost);
  const tiles = cost && COSTS.filter(([key]) => (cost[key] ?? null) !== null).slice(0, 4);
  fill("headline", html("div", { class: "duo" },
    html("div", {},
      html("p", { class: "eyebrow" }, alone ? "Result" : `Winner of ${head.of}`),
      html("p", { class: "winner" }, head.label),
      DATA.matrix.rows[head.row].note ? html("p", { class: "note" }, DATA.matrix.rows[head.row].note) : null,
      html("div", { class: "big" }, html("b", { "data-value": head.figure.value }, score(head.figure.value, metric) + unit(metric)), gain(head, metric)),
      html("p", { class: "dim" }, `${head.by === "normalised" ? "share of each task’s individual brick" : words(metric)}, ${tasksOf(head.columns)}, on test rows · 95 % interval ${range(head.figure, metric)} · ${head.figure.n} ${head.seeds ? "seeds" : "test examples"}`),
      drawnIn(html("div", {}), (width) => bullet(head, metric, width)), marginNote(head, metric)),
    (tiles || head.margin) && html("div", {},
      head.margin ? whereItWins(head) : null,
      tiles && html("p", { class: "eyebrow" }, "What it cost"),
      tiles && html("dl", { class: "tiles" }, tiles.map(([key, name, text]) =>
        html("div", {}, html("dt", {}, name), html("dd", { "data-cost": key }, text(cost[key]))))))));
}

function drawChecks() {
  const broken = DATA.checks.filter((check) => !check.passed);
  const failed = DATA.runs.filter((run) => run.status === "failed");
  if (!DATA.checks.length && !failed.length) return;
  const of = (check) => `${DATA.runs[check.run].label}: ${check.name}`;
  const bound = (check) => {
    const value = typeof check.value === "number" ? short(check.value) : String(check.value);
    return check.tolerance === null ? value : `${value}, tolerance ${short(check.tolerance)}`;
  };
  const line = (check) => html("li", {},
    html("span", { class: check.passed ? "ok" : "not-ok", "aria-label": check.passed ? "passed" : "failed" }, check.passed ? "✓" : "✗"),
    html("span", {}, of(check), html("span", { class: "dim" }, ` (${bound(check)})`)));
  const verdict = broken.length || failed.length
    ? [failed.length ? `${failed.length} of ${DATA.runs.length} runs failed` : null,
      broken.length ? `${broken.length} of ${DATA.checks.length} checks failed` : null].filter(Boolean).join(", ")
    : ["The one check passed", "Both checks passed"][DATA.checks.length - 1] || `All ${DATA.checks.length} checks passed`;
  const groups = new Map();
  for (const check of DATA.checks.filter((each) => each.passed)) {
    groups.set(check.name, [...(groups.get(check.name) || []), check]);
  }
  const kept = [...groups].map(([name, group]) => group.length === 1 ? line(group[0])
    : html("li", {}, html("span", { class: "ok", "aria-label": "passed" }, "✓"),
      html("span", {}, name, html("span", { class: "dim" }, ` (in ${group.length} runs)`))));
  const section = fill("checks",
    html("details", { open: broken.length + failed.length > 0 },
      html("summary", {}, html("span", { class: "verdict" }, verdict)),
      html("ul", { class: "check-list" },
        failed.map((run) => html("li", {}, html("span", { class: "not-ok" }, "✗"),
          html("span", {}, `${run.label}: `, run.error || "the run failed"))),
        broken.map(line), kept)));
  section.className = broken.length || failed.length ? "broken" : "passed";
}
