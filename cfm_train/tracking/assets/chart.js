// A frame for charts: axes with round ticks, grid lines, and room for the labels.

/**
 * @param {{width: number, height: number, x: object, y: object, label: string}} options
 *   x and y: {low, high, log, flip, text (tick and digits to string), name (of y: above the axis)}
 * @returns {{root, plot, x, y, box}} the svg, a group to draw in, both scales, the inner box
 */
function frame({ width, height, x, y, label }) {
  const yTicks = y.log ? logTicks(y.low, y.high, 6) : ticks(y.low, y.high, 5);
  const yTexts = tickTexts(yTicks, y.text);
  const left = 14 + 6.8 * Math.max(2, ...yTexts.map((text) => text.length));
  const box = { left, right: width - 14, top: y.name ? 30 : 10, bottom: height - (x.name ? 44 : 26) };
  const toX = scale(x.low, x.high, box.left, box.right, x.log);
  const toY = scale(y.low, y.high, y.flip ? box.top : box.bottom, y.flip ? box.bottom : box.top, y.log);
  const room = Math.max(2, Math.floor((box.right - box.left) / 74));
  let xTicks = x.log ? logTicks(x.low, x.high, room) : ticks(x.low, x.high, room);
  if (x.whole) xTicks = xTicks.filter((value) => Number.isInteger(Math.round(value * 1e6) / 1e6));
  const xTexts = tickTexts(xTicks, x.text);
  const plot = svg("g", {});
  const root = svg("svg", { width, height, role: "group", "aria-label": label },
    yTicks.map((value, at) => [
      svg("line", { class: "grid", x1: box.left, x2: box.right, y1: toY(value), y2: toY(value) }),
      svg("text", { x: box.left - 7, y: toY(value) + 4, "text-anchor": "end" }, yTexts[at])]),
    svg("line", { class: "axis", x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom }),
    xTicks.map((value, at) => [
      svg("line", { class: "axis", x1: toX(value), x2: toX(value), y1: box.bottom, y2: box.bottom + 4 }),
      svg("text", { x: Math.min(Math.max(toX(value), 12), width - 14), y: box.bottom + 18, "text-anchor": "middle" }, xTexts[at])]),
    y.name ? svg("text", { x: 2, y: 13 }, fitted(y.name, width - 4)) : null,
    x.name ? svg("text", { x: (box.left + box.right) / 2, y: height - 4, "text-anchor": "middle" }, x.name) : null,
    plot);
  return { root, plot, x: toX, y: toY, box };
}

/** A text that is cut where it would be wider than this many pixels. */
function fitted(text, width) {
  const most = Math.floor(width / 6.4);
  return text.length > most ? `${text.slice(0, Math.max(1, most - 1))}…` : text;
}

/** Texts of ticks, with as many digits as it takes to tell them apart. */
function tickTexts(values, text) {
  for (const digits of [2, 3, 4, 5]) {
    const texts = values.map((value) => text(value, digits));
    if (new Set(texts).size === values.length) return texts;
  }
  return values.map((value) => text(value, 6));
}

/** A run's colour, dash and name, the same in every chart. */
const DASHES = ["", "7 4", "2 3", "9 3 2 3"];
const colour = (run) => `var(--c${run % 8})`;
const dash = (run) => DASHES[Math.floor(run / 8) % DASHES.length] || null;

/** A little wider than the data, so that nothing lies on the frame. */
function widened(values, share = 0.06) {
  const low = Math.min(...values), high = Math.max(...values);
  const pad = (high - low) * share || Math.abs(high) * 0.1 || 1;
  return [low - pad, high + pad];
}
