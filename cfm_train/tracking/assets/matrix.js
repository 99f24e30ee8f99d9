// The brick × task matrix: a real table, coloured by how far a cell stands from its column's floor.

const ROLES = { brick: "Bricks", merged: "Made from bricks", ceiling: "Upper bounds", floor: "Lower bounds" };
const BOUND = new Set(["floor", "ceiling"]);
/** Whether a row can win its columns: a single seed beside the mean of several cannot. */
const competes = (row) => !BOUND.has(row.role) && !row.part;

/** For each column what is neutral (the floor, else the worst cell) and how far the furthest is. */
function columnScales() {
  return DATA.matrix.tasks.map(({ metric }, at) => {
    const sign = LOWER.has(metric) ? -1 : 1;
    const merit = (row) => sign * row.cells[at].value;
    const filled = DATA.matrix.rows.filter((row) => row.cells[at]);
    const floors = filled.filter((row) => row.role === "floor").map(merit);
    const zero = floors.length ? Math.max(...floors) : Math.min(...filled.map(merit));
    const far = Math.max(...filled.map((row) => Math.abs(merit(row) - zero)));
    return { zero, far, merit };
  });
}

/** Whose head answered: nothing where the record does not say, or a language model's own did. */
function headRow(row, cell) {
  if (!cell.head) return [];
  const own = cell.head === row.brick;
  return [["head", own ? "its own" : cell.head === "head refitted" ? "refitted on it" : `that of ${cell.head}`]];
}
const borrowed = (row, cell) => Boolean(cell && cell.head && cell.head !== row.brick && cell.head !== "head refitted");

function heatCell(row, number, at, scales) {
  const cell = row.cells[at];
  if (!cell) return html("td", { class: "empty" }, html("span", { "aria-label": "not measured" }, "·"));
  const { task, metric } = DATA.matrix.tasks[at];
  const { zero, far, merit } = scales[at];
  const distance = far ? (merit(row) - zero) / far : 0;
  const t = Math.abs(distance);
  const rivals = DATA.matrix.rows.filter((other) => other.cells[at] && competes(other)).length;
  const best = DATA.matrix.best[at] === number && rivals > 1;
  const classes = [distance > 0 ? "gain" : distance < 0 ? "behind" : "", best ? "best" : ""];
  return withTip(html("td", {
    class: classes.join(" ").trim(), style: `--t:${t.toFixed(3)}`, tabindex: -1, "data-value": cell.value,
    "data-low": cell.low, "data-high": cell.high,
  }, html("b", {}, score(cell.value, metric)), borrowed(row, cell) ? html("sup", { class: "dim", "aria-label": "with another brick's head" }, "†") : null, html("small", {}, range(cell, metric))),
  () => ({ title: `${row.label} on ${task}`, rows: [...figureRows(cell, metric, row.members), ...headRow(row, cell), ...(best ? [["", "best of the column"]] : [])] }));
}

function meanCell(row) {
  if (!row.mean) return html("td", { class: "empty mean" });
  return withTip(html("td", { class: "mean", tabindex: -1, "data-value": row.mean.value },
    html("b", {}, score(row.mean.value, "mean")), html("small", {}, range(row.mean, "mean"))),
  () => ({ title: `${row.label}, mean of all tasks`, rows: figureRows(row.mean, "mean", row.members) }));
}

/** One tab stop for the whole table; the arrow keys go from cell to cell. */
function withArrows(table) {
  const cells = () => [...table.querySelectorAll("td[tabindex]")];
  const place = (cell) => [cell.parentNode.rowIndex, cell.cellIndex];
  if (cells().length) cells()[0].tabIndex = 0;
  table.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (!move || !event.target.matches("td[tabindex]")) return;
    event.preventDefault();
    const [row, column] = place(event.target);
    const [down, right] = move;
    // The nearest cell straight ahead: empty cells and headings are stepped over.
    const ahead = cells().filter((cell) => {
      const [r, c] = place(cell);
      return down ? c === column && Math.sign(r - row) === down : r === row && Math.sign(c - column) === right;
    });
    const next = down + right > 0 ? ahead[0] : ahead.at(-1);
    if (!next) return;
    event.target.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  });
  return table;
}

function drawMatrix() {
  const { tasks, rows } = DATA.matrix;
  if (!rows.length) return;
  const means = rows.some((row) => row.mean && !BOUND.has(row.role));
  const scales = columnScales();
  const head = html("thead", {}, html("tr", {}, html("td", {}),
    tasks.map(({ task, metric }) => html("th", { scope: "col" }, task.replaceAll("_", "_\u200b"), html("small", {}, words(metric)))),
    means ? html("th", { scope: "col" }, "mean", html("small", {}, "all tasks")) : null));
  const body = html("tbody", {});
  let role = null;
  rows.forEach((row, number) => {
    if (row.role !== role) {
      role = row.role;
      body.append(html("tr", { class: "group" }, html("th", { colspan: tasks.length + 1 + means, scope: "rowgroup" }, ROLES[role])));
    }
    body.append(html("tr", { class: BOUND.has(role) ? "bound" : row.part ? "part" : "" }, html("th", { scope: "row" }, row.brick, row.label === row.brick ? null : html("small", {}, row.label.slice(row.brick.length + 3)),
      row.note ? html("small", { class: "said" }, row.note) : null),
      tasks.map((_, at) => heatCell(row, number, at, scales)), means ? meanCell(row) : null));
  });
  const floor = rows.some((row) => row.role === "floor");
  const natural = tasks.some(({ metric }) => LOWER.has(metric));
  fill("matrix",
    html("p", { class: "lead" }, "Test score of each brick on each task",
      natural ? "" : ", in percent", ", with its 95\u00a0% interval. Colour counts from ",
      floor ? "the lower bound (the frozen backbone with a head of its own)." : "the lowest cell of the column.",
      rows.some((row) => row.members) ? " A mean over seeds has Student's interval over them; single seeds do not compete." : null),
    html("div", { class: "scroll" }, withArrows(html("table", { class: "heat",
      style: `--columns:${tasks.length + means};--first:${tasks.length > 8 ? 130 : 220}px` }, head, body))),
    html("div", { class: "key" },
      floor ? html("span", { class: "nowrap" }, "below the floor ", html("span", { class: "ramp", "aria-hidden": "true" }), " furthest above") : null,
      DATA.matrix.rows.filter(competes).length > 1 ? html("span", {}, html("span", { class: "best" }, "ring"), " best of its column") : null,
      rows.some((row) => row.cells.some((cell) => borrowed(row, cell))) ? html("span", { class: "borrowed" }, "† with the head of the task's own brick") : null,
      rows.some((row) => row.cells.includes(null)) ? html("span", {}, "· not measured") : null));
}
