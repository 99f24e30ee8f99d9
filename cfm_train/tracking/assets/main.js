// Draws the page, section by section; one that cannot be drawn says so and leaves the others alone.

function drawFacts() {
  const runs = DATA.runs;
  const names = (values) => [...new Set(values.filter(Boolean))].join(", ");
  const backbones = names(runs.map((run) => run.backbone && run.backbone.id));
  const facts = [
    runs.length === 1 ? `${runs[0].operation} · seed ${runs[0].seed}` : `${runs.length} runs: ${names(runs.map((run) => run.operation))}`,
    backbones ? `backbone ${backbones}` : null,
    DATA.matrix.tasks.length > 1 ? `${DATA.matrix.tasks.length} tasks` : null,
  ];
  document.getElementById("facts").textContent = facts.filter(Boolean).join(" · ");
  if (!runs.length) fill("headline", html("p", { class: "winner" }, "No runs yet"),
    html("p", { class: "dim" }, "This page fills as soon as a run has left a record."));
}

function drawContents() {
  for (const section of document.querySelectorAll("main > section:not([hidden])")) {
    const heading = section.querySelector("h2");
    if (heading) document.getElementById("contents").append(html("a", { href: `#${section.id}` }, heading.textContent));
  }
}

for (const [id, draw] of Object.entries({
  headline: drawHeadline, checks: drawChecks, ranking: drawRanking, matrix: drawMatrix, arms: drawArms, tuning: drawTuning,
  similarity: drawSimilarity, orders: drawOrders, forgetting: drawForgetting, costs: drawCosts, searches: drawSearches,
  curves: drawCurves, lineage: drawLineage, bricks: drawBricks, samples: drawSamples, runs: drawRuns,
})) {
  try {
    draw();
  } catch (error) {
    console.error(`${id}: ${error.stack}`);
    fill(id, html("p", { class: "note" }, `This part could not be drawn (${error.message}). Its figures stand in the page's JSON.`));
  }
}
drawFacts();
drawContents();
document.documentElement.dataset.drawn = "yes";
