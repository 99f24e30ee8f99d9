// The brick × task matrix: a real table, coloured by how far a cell stands from its column's floor.

const ROLES = { brick: "Bricks", merged: "Made from bricks", ceiling: "Upper bounds", floor: "Lower bounds" };
const BOUND = new Set(["floor", "ceiling"]);
/** Whether a row can win its columns: a single seed beside the mean of several cannot, nor a point
 *  of a curve that validation did not choose. */
const competes = (row) => !BOUND.has(row.role) && !row.part && !row.passed_over;

/** For each column what is neutral (the floor, else the worst cell) and how far the furthest is. */
function columnScales(matrix) {
  return matrix.tasks.map(({ metric }, at) => {
    const sign = LOWER.has(metric) ? -1 : 1;
    const merit = (row) => sign * row.cells[at].value;
    const filled = matrix.rows.filter((row) => row.cells[at]);
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
const anew = (row, cell) => Boolean(cell && cell.head === "head refitted");
const borrowed = (row, cell) => Boolean(cell && cell.head && cell.head !== row.brick && cell.head !== "head refitted");

function heatCell(matrix, row, at, scales) {
  const cell = row.cells[at];
  if (!cell) return html("td", { class: "empty" }, html("span", { "aria-label": "not measured" }, "·"));
  const { task, metric } = matrix.tasks[at];
  const { zero, far, merit } = scales[at];
  const distance = far ? (merit(row) - zero) / far : 0;
  const t = Math.abs(distance);
  const rivals = matrix.rows.filter((other) => other.cells[at] && competes(other)).length;
  const best = rivals > 1 && competes(row) && cell.value === matrix.rows[matrix.best[at]].cells[at].value;
  const marked = matrix === DATA.matrix;
  const classes = [distance > 0 ? "gain" : distance < 0 ? "behind" : "", best ? "best" : ""];
  return withTip(html("td", {
    class: classes.join(" ").trim(), style: `--t:${t.toFixed(3)}`, tabindex: -1, "data-value": cell.value,
    "data-low": cell.low, "data-high": cell.high,
  }, html("b", {}, score(cell.value, metric)), borrowed(row, cell) ? html("sup", { class: "dim", "aria-label": "with another brick's head" }, "†") : marked && anew(row, cell) ? html("sup", { class: "dim", "aria-label": "with a head trained anew" }, "‡") : null, html("small", {}, range(cell, metric))),
  () => ({ title: `${row.label} on ${task}`, rows: [...figureRows(cell, metric, row.members), ...headRow(row, cell), ...(best ? [["", "best of the column"]] : [])] }));
}

function meanCell(row, metric) {
  if (!row.mean) return html("td", { class: "empty mean" });
  return withTip(html("td", { class: "mean", tabindex: -1, "data-value": row.mean.value },
    html("b", {}, score(row.mean.value, metric)), html("small", {}, range(row.mean, metric))),
  () => ({ title: `${row.label}, mean`, rows: figureRows(row.mean, metric, row.members) }));
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

/** One matrix as a table; what a key explains follows it. */
function matrixTable(matrix, over) {
  const { tasks, rows } = matrix;
  const means = rows.some((row) => row.mean && !BOUND.has(row.role));
  const scales = columnScales(matrix);
  const counted = over ? tasks.filter(({ task }) => over.includes(task)) : tasks;
  const metric = counted.every((task) => LOWER.has(task.metric)) ? "loss" : "mean";
  const head = html("thead", {}, html("tr", {}, html("td", {}),
    tasks.map((each) => html("th", { scope: "col" }, each.task.replaceAll("_", "_\u200b"), html("small", {}, words(each.metric), each.lower_is_better ? " ↓" : " ↑"),
      over && !over.includes(each.task) ? html("small", { class: "tag" }, "unrelated") : null)),
    means ? html("th", { scope: "col" }, "mean", html("small", {}, counted.length < tasks.length ? `of ${counted.length} tasks` : "all tasks")) : null));
  const body = html("tbody", {});
  let role = null;
  rows.forEach((row) => {
    if (row.role !== role) {
      role = row.role;
      body.append(html("tr", { class: "group" }, html("th", { colspan: tasks.length + 1 + means, scope: "rowgroup" }, ROLES[role])));
    }
    const notes = [row.label === row.brick ? null : row.label.slice(row.brick.length + 3), row.passed_over ? "not chosen on validation" : null].filter(Boolean);
    body.append(html("tr", { class: BOUND.has(role) ? "bound" : row.part || row.passed_over ? "part" : "" },
      html("th", { scope: "row" }, COMPARISON ? nameOf(row.brick) : row.brick, notes.length ? html("small", {}, notes.join(" · ")) : null,
        row.note ? html("small", { class: "said" }, row.note) : null),
      tasks.map((_, at) => heatCell(matrix, row, at, scales)), means ? meanCell(row, metric) : null));
  });
  const floor = rows.some((row) => row.role === "floor");
  return [html("div", { class: "scroll" }, withArrows(html("table", { class: "heat",
    style: `--columns:${tasks.length + means};--first:${tasks.length > 8 ? 130 : 220}px` }, head, body))),
  html("div", { class: "key" },
    floor ? html("span", { class: "nowrap" }, "below the floor ", html("span", { class: "ramp", "aria-hidden": "true" }), " furthest above") : null,
    rows.filter(competes).length > 1 ? html("span", {}, html("span", { class: "best" }, "ring"), " best of its column") : null,
    matrix === DATA.matrix && rows.some((row) => row.cells.some((cell) => borrowed(row, cell))) ? html("span", { class: "borrowed" }, "† with the head of the task's own brick") : null,
    matrix === DATA.matrix && rows.some((row) => row.cells.some((cell) => anew(row, cell))) ? html("span", {}, "‡ with a head trained anew on it: no brick here brings one") : null,
    html("span", {}, tasks.some(({ lower_is_better: lower }) => lower) ? "↑ higher, ↓ lower is better" : "↑ higher is better"),
    rows.some((row) => row.cells.includes(null)) ? html("span", {}, "· not measured") : null)];
}

function drawMatrix() {
  const { tasks, rows } = DATA.matrix;
  if (!rows.length) return;
  const floor = rows.some((row) => row.role === "floor");
  const natural = tasks.some(({ metric }) => LOWER.has(metric));
  fill("matrix",
    html("p", { class: "lead" }, "Test score of each brick on each task",
      natural ? "" : ", in percent", ", with its 95\u00a0% interval. Colour counts from ",
      floor ? "the lower bound (the frozen backbone with a head of its own)." : "the lowest cell of the column.",
      rows.some((row) => row.members) ? " A mean over seeds has Student's interval over them; single seeds do not compete." : null),
    matrixTable(DATA.matrix, COMPARISON && COMPARISON.tasks));
  if (DATA.refitted) fill("refitted",
    html("p", { class: "lead" }, "The same bodies, each with a head trained anew on its features: what is still in them of a task, where the table above asks what the task’s own head still reads."),
    matrixTable(DATA.refitted, COMPARISON && COMPARISON.tasks));
}
