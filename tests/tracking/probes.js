// What the tests measure on a page. Each probe gives a list of faults: an empty one is what they want.

/** Pairs of texts that cover each other, in every chart. */
window.overlaps = () => [...document.querySelectorAll("svg")].flatMap((chart) => {
  const texts = [...chart.querySelectorAll("text")];
  const boxes = texts.map((text) => [text.textContent, text.getBoundingClientRect()]);
  return boxes.flatMap(([name, a], at) => boxes.slice(at + 1).filter(([, b]) => {
    const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left);
    const high = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
    return wide > 1 && high > 4;
  }).map(([other]) => `${name} / ${other}`));
});

/** Texts that stick out of the chart that they are part of. */
window.outside = () => [...document.querySelectorAll("svg")].flatMap((chart) => {
  const frame = chart.getBoundingClientRect();
  return [...chart.querySelectorAll("text")].filter((text) => {
    const box = text.getBoundingClientRect();
    return box.left < frame.left - 1 || box.right > frame.right + 1
      || box.top < frame.top - 2 || box.bottom > frame.bottom + 2;
  }).map((text) => text.textContent);
});

/** Names in the lineage that are wider than their box. */
window.spills = () => [...document.querySelectorAll("#lineage .node")].filter((node) => {
  const box = node.querySelector("rect").getBoundingClientRect();
  return [...node.querySelectorAll("text")].some((text) => text.getBoundingClientRect().right > box.right - 4);
}).map((node) => node.textContent);

/** Texts with too little contrast against what lies behind them (WCAG AA: 4.5; large ones 3). */
window.faint = () => {
  const canvas = Object.assign(document.createElement("canvas"), { width: 1, height: 1 });
  const pen = canvas.getContext("2d", { willReadFrequently: true });
  const painted = (colours) => {
    pen.clearRect(0, 0, 1, 1);
    for (const colour of colours) {
      pen.fillStyle = colour;
      pen.fillRect(0, 0, 1, 1);
    }
    return [...pen.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const linear = (c) => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const light = (rgb) => rgb.map((c) => linear(c / 255))
    .reduce((sum, c, at) => sum + c * [0.2126, 0.7152, 0.0722][at], 0);
  const bad = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    const skipped = "script, style, #tip, .skip, .node, [aria-pressed=false], [aria-label='not measured']";
    if (!own || !element.getBoundingClientRect().width || element.closest(skipped)) continue;
    const style = getComputedStyle(element);
    const behind = [];
    for (let at = element; at; at = at.parentElement) behind.unshift(getComputedStyle(at).backgroundColor);
    const paper = painted(behind);
    const ink = painted([`rgb(${paper.join(" ")})`, element instanceof SVGElement ? style.fill : style.color]);
    const [high, low] = [light(paper), light(ink)].sort((a, b) => b - a);
    const ratio = (high + 0.05) / (low + 0.05);
    const size = parseFloat(style.fontSize);
    const large = size >= 24 || (size >= 18.7 && style.fontWeight >= 600);
    if (ratio < (large ? 3 : 4.5)) bad.push(`${element.textContent.slice(0, 30)}: ${ratio.toFixed(2)}`);
  }
  return bad;
};
