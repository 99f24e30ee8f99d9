// Curves: one chart for each key of metrics.jsonl, all runs in it, one legend for all.

const hiddenRuns = new Set();
const redraws = [];

function smooth(points) {
  // Exponential mean over about a twentieth of the curve, without the bias of its first values.
  const keep = 1 - 1 / Math.max(1, points.length / 20);
  let sum = 0, weight = 0;
  return points.map(([step, value]) => {
    sum = keep * sum + (1 - keep) * value;
    weight = keep * weight + (1 - keep);
    return [step, sum / weight];
  });
}

function curveChart(curve, width) {
  const shown = curve.series.filter((series) => !hiddenRuns.has(series.run));
  const points = shown.flatMap((series) => series.points);
  if (!points.length) return html("p", { class: "dim small" }, "All runs of this chart are hidden.");
  const steps = points.map((point) => point[0]), values = points.map((point) => point[1]);
  const positive = Math.min(...values) > 0 && Math.max(...values) / Math.min(...values) > 300;
  const [low, high] = positive ? [Math.min(...values) * 0.9, Math.max(...values) * 1.1] : widened(values);
  const first = Math.min(...steps), last = Math.max(...steps);
  const height = 220;
  const view = frame({ width, height, label: `${curve.key} over steps`,
    x: { low: first === last ? first - 1 : first, high: first === last ? last + 1 : last, text: count, whole: true, name: "optimiser step" },
    y: { low, high, log: positive, text: short } });
  const path = (line) => line.map(([step, value], at) => `${at ? "L" : "M"}${view.x(step).toFixed(1)},${view.y(value).toFixed(1)}`).join("");
  const noisy = curve.key === "train/loss" || curve.key === "train/gradient_norm";
  for (const { run, points: line } of shown) {
    const style = { fill: "none", stroke: colour(run), "stroke-linejoin": "round", "stroke-dasharray": dash(run) };
    if (line.length === 1) {
      view.plot.append(svg("circle", { cx: view.x(line[0][0]), cy: view.y(line[0][1]), r: 4, fill: colour(run) }));
    } else if (noisy && line.length > 30) {
      if (shown.length <= 4) view.plot.append(svg("path", { ...style, d: path(line), opacity: .28 }));
      view.plot.append(svg("path", { ...style, d: path(smooth(line)), "stroke-width": 2 }));
    } else {
      view.plot.append(svg("path", { ...style, d: path(line), "stroke-width": 2 }));
      if (line.length <= 12) view.plot.append(line.map(([step, value]) => svg("circle", { cx: view.x(step), cy: view.y(value), r: 2.6, fill: colour(run) })).reduce((g, c) => (g.append(c), g), svg("g", {})));
    }
  }
  crosshair(view, curve, shown, first, last, width);
  return view.root;
}

/** A line that follows the pointer, or the arrow keys, and tells every run's value there. */
function crosshair(view, curve, shown, first, last, width) {
  const line = svg("line", { class: "cross", y1: view.box.top, y2: view.box.bottom, visibility: "hidden" });
  view.plot.append(line);
  const all = [...new Set(shown.flatMap((series) => series.points.map((point) => point[0])))].sort((a, b) => a - b);
  let at = all.length - 1;
  const show = (clientX, clientY) => {
    const step = all[at];
    line.setAttribute("x1", view.x(step));
    line.setAttribute("x2", view.x(step));
    line.setAttribute("visibility", "visible");
    const rows = shown.map(({ label, points }) => [label, points.reduce((a, b) => Math.abs(b[0] - step) < Math.abs(a[0] - step) ? b : a)])
      .sort((a, b) => b[1][1] - a[1][1]).slice(0, 12).map(([label, point]) => [label, short(point[1], 4)]);
    showTip({ title: `step ${step}`, rows }, clientX, clientY);
  };
  const hide = () => { line.setAttribute("visibility", "hidden"); hideTip(); };
  view.root.setAttribute("tabindex", 0);
  view.root.addEventListener("pointermove", (event) => {
    const x = event.clientX - view.root.getBoundingClientRect().left;
    at = all.reduce((best, step, index) => Math.abs(view.x(step) - x) < Math.abs(view.x(all[best]) - x) ? index : best, 0);
    show(event.clientX, event.clientY);
  });
  view.root.addEventListener("pointerleave", hide);
  view.root.addEventListener("blur", hide);
  view.root.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10 }[event.key];
    if (!move) return;
    event.preventDefault();
    at = Math.min(Math.max(at + move, 0), all.length - 1);
    const box = view.root.getBoundingClientRect();
    show(box.left + view.x(all[at]), box.top);
  });
}

function curveCard(curve) {
  const holder = html("div", {});
  let width = 0;
  redraws.push(() => { if (width) holder.replaceChildren(curveChart(curve, width)); });
  drawnIn(holder, (now) => curveChart(curve, (width = now)));
  return html("div", { class: "chart" }, html("h3", {}, words(curve.key)), holder);
}

function drawCurves() {
  const curves = DATA.curves;
  if (!curves.length) return;
  const labels = new Map(curves.flatMap((curve) => curve.series.map((series) => [series.run, series.label])));
  const legend = html("ul", { class: "legend", "aria-label": "Runs shown" }, [...labels].map(([run, label]) =>
    html("li", {}, html("button", { type: "button", "aria-pressed": "true", click: (event) => {
      if (!hiddenRuns.delete(run)) hiddenRuns.add(run);
      event.currentTarget.setAttribute("aria-pressed", String(!hiddenRuns.has(run)));
      for (const redraw of redraws) redraw();
    } }, svg("svg", { width: 22, height: 8, "aria-hidden": "true" }, svg("line", { x1: 1, x2: 21, y1: 4, y2: 4, stroke: colour(run), "stroke-width": 3, "stroke-dasharray": dash(run) })), label))));
  const first = curves.slice(0, 3), rest = curves.slice(3);
  fill("curves",
    html("p", { class: "lead" }, "Over optimiser steps, of a search over its trials. Noisy curves are smoothed, with the raw values behind them where few runs are shown."),
    labels.size > 1 ? legend : null,
    html("div", { class: "charts" }, first.map(curveCard)),
    rest.length ? html("details", { class: "more" }, html("summary", {}, rest.length === 1 ? "1 more curve" : `${rest.length} more curves`),
      html("div", { class: "charts", style: "margin-top:14px" }, rest.map(curveCard))) : null);
}
