// Found weights: what was compared on which rows, and every point tried along each axis.

const searchText = (search, value, digits = 3) => search.objective === "metric" && !search.lower_is_better
  ? short(100 * value, Math.max(3, digits)) : short(value, digits);

function searchChart(search, axis, width) {
  const xs = axis.points.map((point) => point[0]), values = axis.points.map((point) => point[1]);
  const [left, right] = widened(xs), [low, high] = widened(values);
  const view = frame({ width, height: 240, label: `${search.objective} on ${search.chosen_on} over ${axis.name}`,
    x: { low: left, high: right, text: short, name: axis.name },
    y: { low, high, flip: search.lower_is_better, text: (value, digits) => searchText(search, value, digits) } });
  const place = ([x, value]) => `${view.x(x).toFixed(1)},${view.y(value).toFixed(1)}`;
  if (axis.line.length > 1) view.plot.append(svg("path", { d: `M${axis.line.map(place).join("L")}`, fill: "none", stroke: colour(search.run), "stroke-width": 2 }));
  for (const [x, value] of axis.points) view.plot.append(svg("circle", { cx: view.x(x), cy: view.y(value), r: 2.6, fill: colour(search.run), opacity: .55 }));
  view.plot.append(svg("circle", { class: "chosen", cx: view.x(axis.chosen[0]), cy: view.y(axis.chosen[1]), r: 6, fill: "var(--accent)", stroke: "var(--card)", "stroke-width": 2, "data-x": axis.chosen[0], "data-value": axis.chosen[1] }));
  return view.root;
}

function drawSearches() {
  if (!DATA.searches.length) return;
  fill("searches", DATA.searches.map((search, at) => html("div", { style: at ? "margin-top:22px" : null },
    html("h3", {}, search.label),
    html("p", { class: search.note ? "note" : "lead" },
      `Weights chosen on ${search.chosen_on} by ${search.objective} (${search.method}, trial ${search.trial} of ${search.tried}: ${searchText(search, search.value)}), reported on test${search.note ? `: ${search.note}, so its figures do not compare with those of weights chosen on validation` : ""}.`),
    Object.keys(search.point).length ? html("p", { class: "dim small" }, Object.entries(search.point).map(([name, value]) => `${name} ${short(value)}`).join(" · ")) : null,
    html("div", { class: "charts" }, search.axes.map((axis) => html("div", { class: "chart" }, html("h3", {}, words(axis.name)),
      drawnIn(html("div", {}), (width) => searchChart(search, axis, width))))))));
}
