"""A comparison in a real browser: every section's figures, and how weights were found."""

from __future__ import annotations

from pathlib import Path

from browser import Browser
from demo_records import compared, found
from drawing import Draw


def test_a_comparison_shows_the_figures_of_its_record(
    browser: Browser, drawn: Draw, tmp_path: Path
) -> None:
    """Every number of every section is the record's, and every row leads to its card or parts."""
    records = compared(tmp_path)
    page, _ = drawn(records)
    browser.open(page, width=1280)
    assert browser.messages == []
    told, matrix = records[0]["comparison"], records[0]["matrix"]

    def values(selector: str) -> list[float]:
        found = f"[...document.querySelectorAll('{selector}')].map((e) => +e.dataset.value)"
        return browser.run(found)  # type: ignore[no-any-return]

    # The winner with its paired margin, whole and by task.
    winner = told["winner"]
    assert browser.run("document.querySelector('#headline .winner').textContent") == winner["label"]
    assert values("#headline .big b") == [winner["figure"]["value"]]
    margin = "+document.querySelector('#headline [data-margin]').dataset.margin"
    assert browser.run(margin) == winner["margin"]["value"]
    text = browser.run("document.querySelector('#headline').textContent")
    assert "clear win" in text and winner["method"] in text and winner["runner_up"] in text
    assert "chosen on validation" in text and "Winner of 5" in text
    assert values("#headline .margins .number") == [f["value"] for f in winner["tasks"].values()]

    # Ranked by the normalised average, then by the mean; what was not chosen does not stand there.
    ranked = [row for row in told["rows"] if row["competes"] or row["role"] == "floor"]
    for by in ("normalised", "mean"):
        browser.run(
            f"""(() => {{ const s = document.querySelector('#ranking select'); s.value = '{by}';
            s.dispatchEvent(new Event('change')); }})()"""
        )
        expected = sorted((row[by]["value"] for row in ranked), reverse=True)
        assert values("#ranking .figure") == expected
        best = browser.run("document.querySelector('#ranking .first th a').textContent")
        assert best == winner["label"]

    # Both tables, cell by cell; the mean column is the comparison's.
    for section, cells in (("matrix", matrix), ("refitted", records[0]["refitted"])):
        shown = sorted(values(f"#{section} td:not(.mean)[data-value]"))
        floors = [] if section == "matrix" else [c for c in matrix if c["role"] == "floor"]
        assert shown == sorted(c["value"] for c in [*cells, *floors])
    means = sorted(row["mean"]["value"] for row in told["rows"])
    assert sorted(values("#matrix td.mean")) == means
    assert "of 3 tasks" in browser.run("document.querySelector('#matrix thead').textContent")

    # The curve over λ with the point that validation chose, then of one task alone.
    (curve,) = told["curves"]
    points = "[...document.querySelectorAll('#tuning [data-x]')].map((a) => [+a.dataset.x, "
    points += "+a.dataset.value, a.dataset.chosen === 'true'])"
    assert browser.run(points) == [
        [p["x"], p["mean"]["value"], p["chosen"]] for p in curve["points"]
    ]
    browser.run(
        """(() => { const s = document.querySelector('#tuning select'); s.value = '1';
        s.dispatchEvent(new Event('change')); })()"""
    )
    browser.run("new Promise((ok) => requestAnimationFrame(() => setTimeout(ok, 100)))")
    of_task = {(c["brick"], c["task"]): c["value"] for c in matrix}
    assert [p[1] for p in browser.run(points)] == [
        of_task[p["row"], "topic"] for p in curve["points"]
    ]

    # Similarity, order, forgetting.
    for key in ("cosine", "sign_conflict"):
        shown = values(f"#similarity [data-key={key}] td[data-value]")
        assert sorted(shown) == sorted(2 * [p[key] for p in told["similarity"]["pairs"]])
    (order,) = told["orders"]
    expected = [order["effect"]["value"]]
    for one in order["tasks"]:
        expected += [one[key]["value"] for key in ("given", "reverse", "difference")]
    assert values("#orders td[data-value]") == expected
    changes = sorted(one["change"]["value"] for one in told["forgetting"])
    assert sorted(values("#forgetting td[data-value]")) == changes

    # Cost: parameters of all that compete; every mark and name leads to a file or a row here.
    marks = "[...document.querySelectorAll('#costs [data-cost]')].map((a) => +a.dataset.cost)"
    assert sorted(browser.run(marks)) == sorted(
        row["parameters"] for row in told["rows"] if row["competes"]
    )
    sections = ["ranking", "matrix", "costs", "tuning", "bricks", "similarity", "forgetting"]
    every = ", ".join(f"#{section} a" for section in sections)
    links = browser.run(
        f"[...document.querySelectorAll('{every}')].map((a) => a.getAttribute('href'))"
    )
    assert len(links) > 40
    for link in set(links):
        if link.startswith("#"):
            assert browser.run(f"!!document.getElementById('{link[1:]}')"), link
        else:
            assert (page.parent / link).is_file(), link
    # Lineage: every version, with the configurations between.
    nodes = browser.run(
        "[...document.querySelectorAll('#lineage .node')].map((n) => n.getAttribute('aria-label'))"
    )
    for node in told["lineage"]["nodes"]:
        assert any(f"version {node['version']}" in text for text in nodes), node
    inputs = browser.run("document.querySelector('#bricks .inputs').textContent")
    assert all(
        key in inputs and value[:12] in inputs for key, value in records[0]["inputs"].items()
    )


def test_how_weights_were_found_is_told(browser: Browser, drawn: Draw, tmp_path: Path) -> None:
    """From the ``search`` of the run that made the brick."""
    records = compared(tmp_path)
    records[1]["search"] = found(tmp_path, adapts=True)["search"]
    page, _ = drawn(records)
    browser.open(page, width=1280)
    row = browser.run("document.querySelector('#bricks tbody tr').textContent")
    assert "chosen on test inputs" in row and "adapts on test inputs" in row
    ranked = browser.run("document.querySelector('#ranking').textContent")
    assert ranked.count("adapts on test inputs") == 1


def test_found_weights_say_what_they_were_chosen_on(
    browser: Browser, drawn: Draw, tmp_path: Path
) -> None:
    """A curve over each number with the point that was taken; what adapts on test says so."""
    records = [found(tmp_path), found(tmp_path, "adapted", adapts=True)]
    page, data = drawn(records)
    browser.open(page, width=1280)
    assert browser.messages == []
    chosen = browser.run(
        "[...document.querySelectorAll('#searches .chosen')].map((c) => [+c.dataset.x, "
        "+c.dataset.value])"
    )
    expected = []
    for record in records:
        search = record["search"]
        best = search["trials"][search["chosen"]]
        expected += [[x, best["value"]] for x in best["point"].values()]
        assert best["value"] == (min if search["lower_is_better"] else max)(
            one["value"] for one in search["trials"]
        )
    assert chosen == expected
    # A line through the best of each value, the other numbers being what they like.
    assert data["searches"][0]["axes"][2]["line"][1] == [1.0, 0.9]
    said = browser.run("[...document.querySelectorAll('#searches p')].map((p) => p.textContent)")
    assert "chosen on validation by metric (grid, trial 17 of 27: 90), reported on test." in said[0]
    assert "chosen on test inputs by entropy" in said[2] and "do not compare" in said[2]
    rows = browser.run(
        "[...document.querySelectorAll('.heat tbody th[scope=row]')].map((th) => th.textContent)"
    )
    assert rows == ["tuned", "adaptedadapts on test inputs"]


def test_every_mark_of_a_brick_that_adapted_says_so(
    browser: Browser, drawn: Draw, tmp_path: Path
) -> None:
    """From the cells of the comparison alone: the run that adapted need not be on the page."""
    said = "adapts on test inputs"
    records = compared(tmp_path)
    adapted = next(row for row in records[0]["comparison"]["rows"] if row["label"] == "topic")
    for one in records[0]["matrix"]:
        if one["brick"] == adapted["label"]:
            one["note"] = said
    page, _ = drawn(records)
    browser.open(page, width=1280)
    assert browser.messages == []
    marks = browser.run(
        "[...document.querySelectorAll('#costs [data-cost]')].map((mark) =>"
        " [mark.getAttribute('aria-label'), mark.matches('.noted')])"
    )
    noted = [label.partition(":")[0] for label, hollow in marks if hollow]
    assert noted == [adapted["label"]]
    assert [label.partition(":")[0] for label, _ in marks if said in label] == noted
    shape = "document.querySelector('#costs .noted :last-child')"
    assert browser.run(f"{shape}.getAttribute('fill')") == "var(--card)"
    browser.run(
        "document.querySelector('#costs .noted')"
        ".dispatchEvent(new PointerEvent('pointermove', {bubbles: true}))"
    )
    assert said in browser.run("document.getElementById('tip').textContent")
    legend = browser.run("document.querySelector('#costs .said').textContent")
    assert legend == f"Hollow: {adapted['label']} {said}."
    for section in ("ranking", "matrix", "bricks"):
        text = browser.run(f"document.querySelector('#{section}').textContent")
        assert text.count(said) == 1, section


def test_a_cost_chart_of_runs_says_what_adapted(
    browser: Browser, drawn: Draw, tmp_path: Path
) -> None:
    records = [found(tmp_path), found(tmp_path, "adapted", adapts=True)]
    for number, record in enumerate(records):
        record["cost"]["seconds"] = 1.0 + number
    page, _ = drawn(records)
    browser.open(page, width=1280)
    marks = browser.run(
        "[...document.querySelectorAll('#costs g[data-cost]')]"
        ".map((mark) => mark.matches('.noted'))"
    )
    assert marks == [False, True]
    legend = browser.run("document.querySelector('#costs .said').textContent")
    assert legend == "Hollow: adapted adapts on test inputs."
