// Sample outputs, and the table of all runs.

/** Whether a sample is right; nothing where no answer is right or wrong (free text, numbers). */
function verdict({ right }) {
  if (right !== true && right !== false) return null;
  return html("span", { class: right ? "ok" : "not-ok", "aria-label": right ? "right" : "wrong" }, right ? "✓ " : "✗ ");
}

function drawSamples() {
  const samples = DATA.samples;
  if (!samples.length) return;
  const several = DATA.runs.length > 1;
  // One of each run in turn, so that the first ones show every run.
  const seen = new Map();
  const turn = samples.map((sample) => { const n = seen.get(sample.run) || 0; seen.set(sample.run, n + 1); return n; });
  const ordered = samples.map((sample, at) => [turn[at], at, sample]).sort((a, b) => a[0] - b[0] || a[1] - b[1]).map((entry) => entry[2]);
  const row = (sample) => {
    const place = [several ? DATA.runs[sample.run].label : null, sample.task, sample.at && sample.at.split(/[\\/]/).pop()].filter(Boolean);
    return html("li", { class: "sample" },
      html("div", { class: "said" }, html("p", {}, sample.input), html("small", {}, [...new Set(place)].join(" · "))),
      html("div", {}, html("small", { class: "narrow" }, "brick says"), html("p", {}, verdict(sample), sample.prediction)),
      html("div", {}, html("small", { class: "narrow" }, "reference"), html("p", {}, sample.reference)));
  };
  const head = html("li", { class: "sample sample-head", "aria-hidden": "true", style: "border-top:0" },
    ["Input", "Brick says", "Reference"].map((name) => html("span", {}, name)));
  const list = html("ul", { class: "sample-list" }, head, ordered.slice(0, 8).map(row));
  const button = ordered.length > 8 ? html("button", { class: "more", type: "button", click: (event) => {
    list.append(...ordered.slice(8).map(row));
    event.currentTarget.remove();
  } }, `Show all ${ordered.length}`) : null;
  fill("samples", html("p", { class: "lead" }, "What the bricks say to rows that they were not trained on."), list, button);
}

/** Rows that were dropped or skipped when the data was read. */
function dataNotes(run) {
  if (!run.data) return [];
  const leaks = Object.values(run.data.leaks).reduce((sum, task) => sum + task.total, 0);
  return [leaks ? `${leaks} leaking rows dropped` : null,
    run.data.skipped_rows ? `${run.data.skipped_rows} bad rows skipped` : null].filter(Boolean);
}

function drawRuns() {
  const runs = DATA.runs;
  if (!runs.length) return;
  const columns = [
    ["Run", (run) => run.label, (run) => [html("b", {}, run.label), html("div", { class: "dim small" }, [run.recipe, ...dataNotes(run)].join(" · "))]],
    ["Status", (run) => run.status, (run) => html("span", { class: `pill ${run.status}` }, run.status)],
    ["Operation", (run) => run.operation, (run) => run.operation],
    ["Seed", (run) => run.seed, (run) => String(run.seed), true],
    ["Score", (run) => run.figure ? run.figure.value : -Infinity, (run) => {
      if (!run.figure) return "–";
      const metric = run.figure.key.slice(run.figure.key.lastIndexOf("/") + 1);
      return [html("b", { "data-value": run.figure.value }, score(run.figure.value, metric)), html("div", { class: "dim small" }, `${words(metric)} ${range(run.figure, metric)}`)];
    }, true],
    ["Parameters", (run) => run.cost.trainable_parameters ?? -1, (run) => count(run.cost.trainable_parameters), true],
    ["Samples/s", (run) => run.cost.samples_per_second ?? -1, (run) => count(run.cost.samples_per_second), true],
    ["Time", (run) => run.cost.seconds, (run) => seconds(run.cost.seconds), true],
    ["Memory", (run) => run.cost.peak_memory_bytes ?? -1, (run) => bytes(run.cost.peak_memory_bytes), true],
    ["Files", null, (run) => [run.brick ? [html("a", { href: run.brick.card }, "card"), " · "] : null, html("a", { href: run.record }, "record")]],
  ];
  const body = html("tbody", {});
  const draw = (ordered) => body.replaceChildren(...ordered.map((run) => html("tr", { id: `run-${run.run}` },
    columns.map(([, , text, number]) => html("td", { class: number ? "number" : null }, text(run))))));
  const heads = columns.map(([name, value, , number]) => {
    const head = html("th", { scope: "col", class: number ? "number" : null }, value ? html("button", { type: "button", click: () => {
      const down = head.getAttribute("aria-sort") !== "descending";
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const sign = down ? -1 : 1;
      draw([...runs].sort((a, b) => value(a) < value(b) ? -sign : value(a) > value(b) ? sign : 0));
    } }, name) : name);
    return head;
  });
  draw(runs);
  fill("runs", html("p", { class: "lead" }, runs.length === 1 ? "The one run on this page." : `All ${runs.length} runs on this page.`),
    html("div", { class: "scroll" }, html("table", { class: "list" }, html("thead", {}, html("tr", {}, heads)), body)));
}
