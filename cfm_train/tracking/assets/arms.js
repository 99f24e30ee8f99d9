// Knowledge bricks: the same questions with the text in the prompt, with the brick, and with both.

/** One arm's figure: the value, its interval, and a bar of both on the metric's own scale. */
function armCell(figure, metric, highest) {
  const place = scale(0, highest || 1, 2, 98);
  return html("td", { class: "number", "data-value": figure.value },
    html("b", {}, score(figure.value, metric)),
    html("div", { class: "dim small" }, range(figure, metric)),
    svg("svg", { width: 100, height: 8, "aria-hidden": "true", style: "margin-left:auto" },
      svg("line", { x1: place(figure.low), x2: place(figure.high), y1: 4, y2: 4, stroke: "var(--accent)", "stroke-width": 2, opacity: .5 }),
      svg("circle", { cx: place(figure.value), cy: 4, r: 3.5, fill: "var(--accent)" })));
}

function gainCell(figure, metric) {
  return html("td", { class: "number", "data-value": figure.value },
    html(figure.clear ? "b" : "span", {}, (figure.value > 0 ? "+" : "") + score(figure.value, metric)),
    html("div", { class: "dim small" }, range(figure, metric)));
}

function armsTable(found) {
  const highest = found.metrics.map((metric, at) => LOWER.has(metric) ? Math.max(...found.arms.map((arm) => arm.figures[at].high)) : 1);
  const title = { loss: "nats per answer token", token_accuracy: "answer tokens, %", exact_match: "written answers, %" };
  const head = html("tr", {}, html("th", { scope: "col" }, "Arm"), found.metrics.map((metric) => html("th", { scope: "col", class: "number" }, title[metric])));
  return html("div", { class: "scroll" }, html("table", { class: "list" }, html("thead", {}, head), html("tbody", {},
    found.arms.map((arm) => html("tr", {}, html("th", { scope: "row" }, arm.name), arm.figures.map((figure, at) => armCell(figure, found.metrics[at], highest[at])))),
    found.gains.map((gain) => html("tr", { class: "gain" }, html("th", { scope: "row" }, gain.name), gain.figures.map((figure, at) => gainCell(figure, found.metrics[at])))))));
}

function drawArms() {
  if (!DATA.arms.length) return;
  fill("arms",
    html("p", { class: "lead" }, "The same test questions in every arm. Differences are paired, question by question; bold ones leave out zero. Of nats, fewer are better."),
    DATA.arms.map((found, at) => html("div", { style: at ? "margin-top:22px" : null },
      DATA.runs.length > 1 ? html("h3", {}, found.label) : null,
      armsTable(found),
      html("p", { class: "dim small" }, [`${found.questions} questions, ${found.made}`,
        found.cut ? `${found.cut} passages cut to fit the context` : null,
        found.unrelated ? `unrelated text: perplexity × ${short(found.unrelated.perplexity_ratio.value, 4)} (${short(found.unrelated.perplexity_ratio.low, 4)}–${short(found.unrelated.perplexity_ratio.high, 4)})` : null].filter(Boolean).join(" · ")))));
}
