"use strict";
// Helpers of the page: elements, figures as a person reads them, ticks, the tooltip.

const DATA = JSON.parse(document.getElementById("data").textContent);
const LOWER = new Set(DATA.lower_is_better);

/** An element with attributes (functions become listeners) and children (text or nodes). */
function make(create, tag, attributes, children) {
  const element = create(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function") element.addEventListener(name, value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  for (const child of children.flat(3)) {
    if (child !== null && child !== undefined) element.append(child);
  }
  return element;
}
const html = (tag, attributes, ...children) =>
  make((name) => document.createElement(name), tag, attributes, children);
const svg = (tag, attributes, ...children) =>
  make((name) => document.createElementNS("http://www.w3.org/2000/svg", name), tag, attributes, children);

/** Shows a section and gives it its content. */
function fill(id, ...children) {
  const section = document.getElementById(id);
  section.append(...children.flat(3).filter(Boolean));
  section.hidden = false;
  return section;
}

// ---------------------------------------------------------------- figures

const short = (value, digits = 3) =>
  value === 0 ? "0" : Math.abs(value) >= 1e5 || Math.abs(value) < 1e-4
    ? value.toExponential(1).replace("e+", "e") : String(Number(value.toPrecision(digits)));

/** Scores between 0 and 1 are shown times 100; losses and errors as they are, with three digits. */
const decimals = (value) => Math.min(6, Math.max(0, 2 - Math.floor(Math.log10(Math.abs(value) || 1))));
const score = (value, metric) => LOWER.has(metric)
  ? (Math.abs(value) < 1e6 ? value.toFixed(decimals(value)) : short(value)) : (100 * value).toFixed(1);
const range = (figure, metric) =>
  `${score(figure.low, metric)}${figure.low < 0 ? " to " : "–"}${score(figure.high, metric)}`;
const unit = (metric) => LOWER.has(metric) ? "" : " %";
const words = (key) => key.replaceAll("_", " ");
const metricName = (key) => words(key.slice(key.lastIndexOf("/") + 1));

function count(value, digits) {
  if (value === null || value === undefined) return "–";
  const units = [[1e9, " B"], [1e6, " M"], [1e3, " k"]];
  const [size, name] = units.find(([limit]) => value >= limit) || [1, ""];
  return (size === 1 ? String(Math.round(value)) : short(value / size, digits)) + name;
}
function bytes(value, digits) {
  if (value === null || value === undefined) return "–";
  const units = [[2 ** 30, " GiB"], [2 ** 20, " MiB"], [2 ** 10, " KiB"]];
  const [size, name] = units.find(([limit]) => value >= limit) || [1, " B"];
  return short(value / size, digits) + name;
}
function seconds(value, digits = 2) {
  if (value === null || value === undefined) return "–";
  if (value < 60) return `${short(value, digits)} s`;
  if (value < 3600) return `${Math.floor(value / 60)} min ${Math.round(value % 60)} s`;
  return `${Math.floor(value / 3600)} h ${Math.round((value % 3600) / 60)} min`;
}

/** What runs can cost: key in the record, name, and how it is written. */
const COSTS = [
  ["parameters", "Parameters", count],
  ["make_seconds", "Time to make it", seconds],
  ["bytes", "Tensors in memory", bytes],
  ["trainable_parameters", "Trained parameters", count],
  ["train_seconds", "Training time", seconds],
  ["seconds", "Whole run", seconds],
  ["peak_memory_bytes", "Peak memory", bytes],
  ["samples_per_second", "Samples per second", count],
];

// ---------------------------------------------------------------- scales

/** Round tick values that cover a range. */
function ticks(low, high, most) {
  const rough = (high - low) / Math.max(1, most) || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.999);
  const result = [];
  for (let at = Math.ceil(low / step - 1e-9); at * step <= high + step * 1e-9; at++) result.push(at * step);
  return result;
}
/** Powers of ten in a range; with 2 and 5 between them where there are few. */
function logTicks(low, high, most) {
  const all = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++) {
    for (const m of [1, 2, 5]) all.push([m, m * 10 ** power]);
  }
  const inside = all.filter(([, v]) => v >= low * 0.999 && v <= high * 1.001);
  const tens = inside.filter(([m]) => m === 1);
  return (inside.length <= most || tens.length < 2 ? inside : tens).map(([, v]) => v);
}
/** A function from [low, high] to pixels, linear or logarithmic. */
function scale(low, high, from, to, log) {
  const of = log ? Math.log10 : (v) => v;
  const span = of(high) - of(low) || 1;
  return (value) => from + ((of(value) - of(low)) / span) * (to - from);
}

// ---------------------------------------------------------------- tooltip

const tip = document.getElementById("tip");
function showTip(content, x, y) {
  tip.replaceChildren(html("b", {}, content.title),
    html("table", {}, content.rows.map(([name, value]) =>
      html("tr", {}, html("td", {}, name), html("td", {}, value)))));
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  const left = Math.min(Math.max(8, x + 14), window.innerWidth - box.width - 8);
  const above = y - box.height - 12;
  tip.style.left = `${left}px`;
  tip.style.top = `${above > 8 ? above : y + 18}px`;
}
const hideTip = () => { tip.hidden = true; };
document.addEventListener("keydown", (event) => { if (event.key === "Escape") hideTip(); });
window.addEventListener("scroll", hideTip, { passive: true });

/** Shows `content()` while the pointer is on the element or it has the focus. */
function withTip(element, content) {
  element.addEventListener("pointermove", (event) => showTip(content(), event.clientX, event.clientY));
  element.addEventListener("pointerleave", hideTip);
  element.addEventListener("focus", () => {
    if (!element.matches(":focus-visible")) return;
    const box = element.getBoundingClientRect();
    showTip(content(), box.left + box.width / 2, box.top);
  });
  element.addEventListener("blur", hideTip);
  return element;
}
const figureRows = (figure, metric, seeds) => [
  [words(metric), score(figure.value, metric) + unit(metric)],
  ["95 % interval", range(figure, metric)],
  [seeds ? "seeds" : "examples", String(figure.n)],
];

/** Draws when the element has a width, and again whenever that changes. */
function drawnIn(holder, draw) {
  let width = 0;
  new ResizeObserver((entries) => {
    const now = Math.floor(entries[0].contentRect.width);
    if (now === 0 || now === width) return;
    width = now;
    // In the next frame: a chart that grows the page while sizes are reported would be an error.
    requestAnimationFrame(() => holder.replaceChildren(draw(now)));
  }).observe(holder);
  return holder;
}
