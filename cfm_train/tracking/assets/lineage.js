// The lineage: backbones on the left, bricks over them, what was made from bricks to the right.

const NODE = { width: 206, height: 50, across: 72, down: 14 };

function drawLineage() {
  const { nodes, edges } = DATA.lineage;
  if (!nodes.length) return;
  const columns = 1 + Math.max(...nodes.map((node) => node.column));
  const sizes = Array.from({ length: columns }, (_, column) => nodes.filter((node) => node.column === column).length);
  const tallest = Math.max(...sizes);
  const step = NODE.height + NODE.down;
  const x = (node) => 2 + node.column * (NODE.width + NODE.across);
  const y = (node) => 2 + ((tallest - sizes[node.column]) / 2 + node.place) * step;
  const width = columns * (NODE.width + NODE.across) - NODE.across + 4;
  const height = tallest * step - NODE.down + 4;
  const byId = new Map(nodes.map((node) => [node.id, node]));
  const parents = new Set(edges.filter((edge) => byId.get(edge.from).kind !== "backbone").map((edge) => edge.to));
  const cut = (text, most) => text.length > most ? `${text.slice(0, most - 1)}…` : text;
  const taken = [];
  /** A weight on its edge where no other weight is; nothing where all is full (tooltips have it). */
  const placed = (x1, y1, x2, y2, bend, text) => {
    const half = text.length * 3.4 + 3;
    for (const t of [0.5, 0.62, 0.38, 0.74, 0.26]) {
      const s = 1 - t;
      const at = { x: s ** 3 * x1 + 3 * s * s * t * (x1 + bend) + 3 * s * t * t * (x2 - bend) + t ** 3 * x2,
        y: y1 + (y2 - y1) * (3 * t * t - 2 * t ** 3) + 4, text };
      const inside = at.x - half > x1 && at.x + half < x2;
      if (inside && taken.every((other) => Math.abs(other.x - at.x) > half + 16 || Math.abs(other.y - at.y) > 14)) {
        taken.push(at);
        return at;
      }
    }
    return null;
  };
  const lines = edges.map((edge) => {
    const from = byId.get(edge.from), to = byId.get(edge.to);
    const x1 = x(from) + NODE.width, y1 = y(from) + NODE.height / 2, x2 = x(to), y2 = y(to) + NODE.height / 2;
    const bend = Math.max(24, (x2 - x1) / 2);
    const label = edge.weight === null ? null : placed(x1, y1, x2, y2, bend, `× ${short(edge.weight)}`);
    return [svg("path", { class: "edge", d: `M${x1},${y1}C${x1 + bend},${y1} ${x2 - bend},${y2} ${x2},${y2}` }),
      label && svg("text", { class: "halo", x: label.x, y: label.y, "text-anchor": "middle" }, label.text)];
  });
  const boxes = nodes.map((node) => {
    const made = node.kind !== "configuration" && parents.has(node.id);
    const what = { backbone: "frozen backbone", outside: "no record here", configuration: "configuration" }[node.kind] || node.operation;
    const attributes = { class: `node ${made ? "made" : node.kind}`, "aria-label": `${node.name}, version ${node.version}, ${what}` };
    const group = node.card
      ? svg("a", { ...attributes, href: node.card }) : svg("g", { ...attributes, tabindex: 0, role: "img" });
    group.append(
      svg("rect", { x: x(node), y: y(node), width: NODE.width, height: NODE.height, rx: 10 }),
      svg("text", { class: "name", x: x(node) + 13, y: y(node) + 20 }, cut(node.name, 22)),
      svg("text", { x: x(node) + 13, y: y(node) + 37 }, `${what} · ${node.version.slice(0, 7)}`));
    const of = edges.filter((edge) => edge.to === node.id).map((edge) => ["from", byId.get(edge.from).name + (edge.weight === null ? "" : ` × ${short(edge.weight)}`)]);
    return withTip(group, () => ({ title: node.name, rows: [["version", node.version], ["what", what], ...of, ...Object.entries(node.data || {}).map(([name, hash]) => [`data ${name}`, hash])] }));
  });
  fill("lineage",
    html("p", { class: "lead" }, "What was made from what, by version; data versions stand in the tooltips. A brick leads to its card.",
      nodes.some((node) => node.kind === "configuration") ? " Dotted: a configuration that is put together when it is used." : null),
    html("div", { class: "scroll" }, svg("svg", { width, height, style: `max-width:none;min-width:${width}px` }, lines, boxes)));
}
