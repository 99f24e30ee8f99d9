// Why: how alike the updates are, what the order of a stitch changes, what is forgotten.

const signed = (figure, metric) => {
  const text = (value) => LOWER.has(metric) ? `${value < 0 ? "−" : value > 0 ? "+" : ""}${score(Math.abs(value), metric)}` : `${value < 0 ? "−" : value > 0 ? "+" : ""}${(100 * Math.abs(value)).toFixed(1)}`;
  return { value: text(figure.value), range: `${text(figure.low)} to ${text(figure.high)}` };
};
/** Better, worse, or neither: only where the interval leaves out 0. */
const verdictOf = (figure) => figure.low > 0 ? "good" : figure.high < 0 ? "bad" : "even";

function pairTable(title, key, text, tone, note) {
  const { labels, pairs } = COMPARISON.similarity;
  const of = (a, b) => pairs.find((pair) => (pair.a === a && pair.b === b) || (pair.a === b && pair.b === a));
  const letter = (at) => String.fromCharCode(65 + at % 26) + (at >= 26 ? Math.floor(at / 26) : "");
  const head = html("tr", {}, html("td", {}), labels.map((label, at) => html("th", { scope: "col", title: label }, letter(at))));
  const body = labels.map((a, i) => html("tr", {}, html("th", { scope: "row" }, html("b", {}, letter(i)), " ", nameOf(a)),
    labels.map((b, j) => {
      if (i === j) return html("td", { class: "same" }, "–");
      const pair = of(a, b), value = pair[key];
      if (value === null) return withTip(html("td", { class: "empty" }, "·"), () => ({ title: `${a} and ${b}`, rows: [["", pair.reason || "an update is 0"]] }));
      const [share, kind] = tone(value);
      return withTip(html("td", { class: kind, style: `--t:${share.toFixed(3)}`, "data-value": value }, text(value)), () => ({ title: `${a} and ${b}`, rows: [
        ["cosine", short(pair.cosine, 3)], ["signs that disagree", `${(100 * pair.sign_conflict).toFixed(1)} %`],
        ["weighted by size", `${(100 * pair.weighted_conflict).toFixed(1)} %`], ["of", pair.of]] }));
    })));
  return html("div", { class: "pairs-card" }, html("h3", {}, title), html("p", { class: "dim small" }, note),
    html("div", { class: "scroll" }, html("table", { class: "pairs", "data-key": key }, html("thead", {}, head), html("tbody", {}, body))));
}

function drawSimilarity() {
  if (!COMPARISON || !COMPARISON.similarity) return;
  fill("similarity",
    html("p", { class: "lead" }, "The updates ΔW of two bricks over all their sites. Updates that point apart, or disagree in sign, cancel when they are averaged."),
    html("div", { class: "duo even" },
      pairTable("Cosine", "cosine", (value) => value.toFixed(2).replace("-", "−"), (value) => [Math.min(1, Math.abs(value)), value >= 0 ? "gain" : "behind"], "1: the same direction, 0: unrelated, −1: opposite."),
      pairTable("Sign conflict, %", "sign_conflict", (value) => (100 * value).toFixed(0), (value) => [Math.min(1, 2 * Math.abs(value - 0.5)), value <= 0.5 ? "gain" : "behind"], "Entries where both updates are not 0 and their signs differ. 50: as of two random updates.")));
}

function drawOrders() {
  if (!COMPARISON || !COMPARISON.orders.length) return;
  const rows = COMPARISON.orders.flatMap((order) => [
    html("tr", { class: "group" }, html("th", { scope: "rowgroup" }, nameOf(order.row), html("small", {}, `against ${order.reverse}`)),
      html("td", { class: "number", colspan: 3, "data-value": order.effect.value }, html("b", {}, `${(100 * order.effect.value).toFixed(1)} %`), html("small", {}, "effect on answers"))),
    order.tasks.map((one) => {
      const change = signed(one.difference, one.metric);
      return html("tr", {},
        html("td", {}, one.task, html("small", {}, words(one.metric))),
        html("td", { class: "number", "data-value": one.given.value }, score(one.given.value, one.metric)),
        html("td", { class: "number", "data-value": one.reverse.value }, score(one.reverse.value, one.metric)),
        html("td", { class: `number ${verdictOf(one.difference)}`, "data-value": one.difference.value }, html("b", {}, change.value), html("small", {}, change.range)));
    })]);
  fill("orders",
    html("p", { class: "lead" }, "Each stitch in the order given and in the opposite one, on the same test rows; green or red where the paired interval leaves out 0. The effect is the largest change of an answer, as a share of what the stitch changes at all."),
    html("div", { class: "scroll" }, html("table", { class: "list effects" },
      html("thead", {}, html("tr", {}, html("th", {}, "Task"), html("th", { class: "number" }, "As given"), html("th", { class: "number" }, "Opposite"),
        html("th", { class: "number" }, "Given is better by", html("small", {}, "95\u00a0% interval, paired")))),
      html("tbody", {}, rows))));
}

function drawForgetting() {
  if (!COMPARISON || !COMPARISON.forgetting.length) return;
  const found = COMPARISON.forgetting;
  const of = (list, key) => [...new Set(list.map((entry) => entry[key]))];
  const unrelated = new Set(COMPARISON.unrelated);
  const tasks = of(found, "task").sort((a, b) => unrelated.has(b) - unrelated.has(a));
  const far = Math.max(...found.map(({ change }) => Math.abs(change.value))) || 1;
  const natural = found.some(({ metric }) => LOWER.has(metric));
  const head = html("tr", {}, html("td", {}), tasks.map((task) => html("th", { scope: "col" }, task.replaceAll("_", "_\u200b"),
    html("small", {}, words(found.find((entry) => entry.task === task).metric)), unrelated.has(task) ? html("small", { class: "tag" }, "unrelated") : null)));
  const rows = of(found, "row").map((row) => html("tr", {}, html("th", { scope: "row" }, nameOf(row)), tasks.map((task) => {
    const one = found.find((entry) => entry.row === row && entry.task === task);
    if (!one) return html("td", { class: "empty", title: "one of its bricks was trained on it" }, "its own");
    const change = signed(one.change, one.metric);
    const peers = found.filter((entry) => entry.metric === one.metric);
    const most = Math.max(...peers.map((entry) => Math.abs(entry.change.value))) || far;
    return withTip(html("td", { class: one.change.value > 0 ? "gain" : one.change.value < 0 ? "behind" : "", style: `--t:${(Math.abs(one.change.value) / most).toFixed(3)}`, "data-value": one.change.value },
      html("b", { class: verdictOf(one.change) === "even" ? "" : "sure" }, change.value), html("small", {}, change.range)),
    () => ({ title: `${row} on ${task}`, rows: [["bare backbone", score(one.bare.value, one.metric)], ["with the brick", score(one.with_brick.value, one.metric)], ["change", change.value], ["95 % interval, paired", change.range]] }));
  })));
  fill("forgetting",
    html("p", { class: "lead" }, "What plugging in does to tasks that none of the row’s bricks was trained on, against the bare backbone with the same head",
      natural ? " (language models answer with their own; above 0 is a lower perplexity or loss)." : ", in points.",
      " Below 0: forgotten. Bold: the paired 95\u00a0% interval leaves out 0."),
    html("div", { class: "scroll" }, html("table", { class: "heat loose", style: `--columns:${tasks.length};--first:240px` }, html("thead", {}, head), html("tbody", {}, rows))));
}

/** Every row: what it is made of, with versions, what it takes, how its weights were found. */
function drawBricks() {
  if (!COMPARISON) return;
  const part = (each) => html("span", { class: "nowrap" }, each.card ? html("a", { href: each.card }, each.name) : each.name, html("span", { class: "dim" }, `@${each.version}`));
  const data = (row) => [...new Set(row.parts.flatMap((each) => Object.entries(each.data).map(([name, hash]) => `${name} ${hash}`)))].join(", ");
  const ways = { training: "training", run: "whole run", assembly: "put together here" };
  const rows = COMPARISON.rows.map((row, at) => row.role === "floor" ? null : html("tr", { id: `brick-${at}` },
    html("td", {}, row.card ? html("a", { href: row.card }, html("b", {}, row.label)) : html("b", {}, row.label),
      html("div", { class: "dim small" }, [{ brick: "brick", merged: "made from bricks", ceiling: "upper bound" }[row.role], row.competes || row.role === "ceiling" ? null : "not chosen on validation", ...notesOf(row)].filter(Boolean).join(" · ")),
      row.parts.length > 1 || !row.card ? html("details", { class: "small" }, html("summary", {}, "written out"), html("code", {}, row.expression)) : null),
    html("td", { class: "parts" }, row.parts.map((each, n) => [n ? ", " : "", part(each)]), html("div", { class: "dim small" }, data(row))),
    html("td", { class: "number" }, count(row.parameters)), html("td", { class: "number" }, bytes(row.bytes, 3)),
    html("td", { class: "number" }, seconds(row.seconds), html("div", { class: "dim small" }, ways[row.seconds_of] || ""))));
  const inputs = Object.entries(COMPARISON.inputs);
  fill("bricks",
    html("p", { class: "lead" }, "What each row is made of, by version. A name leads to its card."),
    html("div", { class: "scroll" }, html("table", { class: "list" },
      html("thead", {}, html("tr", {}, ["Row", "Bricks and their data"].map((name) => html("th", { scope: "col" }, name)), ["Parameters", "Tensors", "Time to make"].map((name) => html("th", { scope: "col", class: "number" }, name)))),
      html("tbody", {}, rows))),
    html("details", { class: "more" }, html("summary", {}, `Every input of this comparison (${inputs.length})`),
      html("ul", { class: "inputs" }, inputs.map(([name, hash]) => html("li", {}, name, " ", html("code", {}, hash))))));
}
