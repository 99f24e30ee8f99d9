"""The dashboard in a real browser: its figures are the records', it reads well, it stays alone."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from browser import Browser, find_chromium
from demo_records import TASKS, cell, compared, figure, found, quickstart, trained

from cfm_train.tracking.dashboard import as_script_json, draw
from cfm_train.tracking.record import Record, new_record

Draw = Callable[..., tuple[Path, dict]]

PROBES = (Path(__file__).parent / "probes.js").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = find_chromium()
    if program is None:
        pytest.skip("needs a Chromium (Debian: apt-get install chromium)")
    browser = Browser(program)
    yield browser
    browser.close()


@pytest.fixture
def drawn(tmp_path: Path) -> Draw:
    """Draws records beside their runs; gives the page and the data in it."""

    def drawn(records: list[Record], **options: str) -> tuple[Path, dict]:
        page = draw(records, tmp_path / "dashboard.html", **options)
        return page, data_in(page)

    return drawn


def data_in(page: Path) -> dict:
    text = page.read_text(encoding="utf-8")
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.S)
    assert found
    return json.loads(found[1])


def many(tmp_path: Path) -> list[Record]:
    """Twelve long-named tasks with three seeds each, and a run that failed."""
    records = []
    for seed in (1, 2, 3):
        for number in range(12):
            task, value = f"a_long_task_name_{number}", 0.6 + 0.03 * number + 0.004 * seed
            records.append(
                new_record(
                    operation="train", recipe=f"task/{task}", name=task, seed=seed,
                    config_hash=f"{seed}{number}", metrics={"test/accuracy": figure(value)},
                    brick={"name": task, "version": f"{seed}{number:02}aa", "path": str(tmp_path),
                           "parents": []},
                    backbone={"id": "minilm", "fingerprint": "ab" * 32, "unchanged": True},
                    matrix=[cell(task, task, value, "brick"),
                            cell("frozen backbone", task, value - 0.08, "floor")],
                    cost={"seconds": 40.0, "train_seconds": 30.0 + number,
                          "trainable_parameters": 99_000 + number},
                )
            )  # fmt: skip
    failed = {"status": "failed", "error": "the loss became NaN at step 41"}
    return [
        *records,
        new_record(operation="train", recipe="task/x", name="x", seed=1, config_hash="x", **failed),
    ]


def language(tmp_path: Path) -> list[Record]:
    """Two language models: their figures are better when they are lower."""
    records = []
    for name, loss, floor in (("poems", 2.1, 3.4), ("laws", 2.6, 3.5)):
        record = trained(tmp_path, "topic", name=name)
        shared = {"n": 250, "metric": "loss", "task": "stories"}
        own = {"value": loss, "low": loss - 0.1, "high": loss + 0.1}
        bound = {"value": floor, "low": floor - 0.1, "high": floor + 0.1}
        record["matrix"] = [
            {"brick": name, "role": "brick", **own, **shared},
            {"brick": "frozen backbone", "role": "floor", **bound, **shared},
        ]  # type: ignore[list-item]
        record["metrics"] = {"test/loss": {**own, "n": 250}}  # type: ignore[typeddict-item]
        records.append(record)
    return records


def seeds(tmp_path: Path) -> list[Record]:
    """Two bricks with three seeds each."""
    return [
        trained(tmp_path, task, seed=seed, seedless_hash=task * 4)
        for task in list(TASKS)[:2]
        for seed in (1, 2, 3)
    ]


SETS = {
    "compared": compared,
    "seeds": seeds,
    "quickstart": quickstart,
    "one run": lambda out: [trained(out, "topic")],
    "many": many,
    "language": language,
    "found weights": lambda out: [found(out), found(out, "adapted", adapts=True)],
    "none": lambda out: [],
}


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("name", SETS)
def test_page_reads_well_and_loads_nothing(
    browser: Browser, drawn: Draw, tmp_path: Path, name: str, width: int, dark: bool
) -> None:
    page, _ = drawn(SETS[name](tmp_path))
    browser.open(page, width=width, dark=dark)
    assert browser.messages == []
    assert browser.run("document.documentElement.dataset.drawn") == "yes"
    assert [url for url in browser.requests if not url.startswith("data:")] == [page.as_uri()]
    browser.run("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    browser.run("new Promise((ok) => requestAnimationFrame(() => setTimeout(ok, 100)))")
    overflow = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert browser.run(overflow) == 0, "the page scrolls sideways"
    browser.run(PROBES + ";null")
    for probe in ("overlaps", "outside", "spills", "faint"):
        assert browser.run(f"window.{probe}()") == [], probe
    assert browser.messages == []


def test_figures_on_the_page_are_the_records(browser: Browser, drawn: Draw, tmp_path: Path) -> None:
    records = quickstart(tmp_path)
    page, _ = drawn(records, title="Four bricks")
    browser.open(page, width=1280)
    table = browser.run(
        """[...document.querySelectorAll(".heat tbody tr:not(.group)")].map((row) =>
          [row.cells[0].textContent, ...[...row.querySelectorAll("td:not(.mean)")].map((cell) =>
            [+cell.dataset.value, +cell.dataset.low, +cell.dataset.high,
             cell.querySelector("b").textContent, cell.querySelector("small").textContent])])"""
    )
    shown = {(row[0], task): row[1 + at] for row in table for at, task in enumerate(TASKS)}
    cells = [c for record in records for c in record["matrix"]]
    assert len(shown) == len(cells) == 18
    for c in cells:
        text = f"{100 * c['value']:.1f}", f"{100 * c['low']:.1f}–{100 * c['high']:.1f}"
        assert shown[c["brick"], c["task"]] == [c["value"], c["low"], c["high"], *text]
    best = browser.run(
        "[...document.querySelectorAll('.heat td.best')].map((c) => Number(c.dataset.value))"
    )
    assert sorted(best) == sorted(value for value, _ in TASKS.values())
    scores = browser.run(
        "[...document.querySelectorAll('#runs b[data-value]')].map((b) => +b.dataset.value)"
    )
    assert scores == [record["metrics"]["test/accuracy"]["value"] for record in records[:3]]
    big = browser.run("Number(document.querySelector('.big b').dataset.value)")
    assert big == pytest.approx((0.885 + 0.861 + 0.835) / 3)
    assert browser.run("document.querySelector('.winner').textContent") == records[3]["name"] + (
        "(sentiment, topic)"
    )
    assert browser.run("document.querySelector('#checks .verdict').textContent") == (
        "All 4 checks passed"
    )
    assert browser.run("document.title") == "Four bricks"


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


def test_cost_chart_shows_what_is_chosen(browser: Browser, drawn: Draw, tmp_path: Path) -> None:
    records = quickstart(tmp_path)
    page, _ = drawn(records)
    browser.open(page, width=1280)
    marks = """[...document.querySelectorAll('#costs g[data-cost]')].map((mark) =>
      [+mark.dataset.cost, +mark.dataset.value])"""
    choose = """(([cost, quality]) => { const [a, b] = document.querySelectorAll("#costs select");
      a.value = cost; b.value = quality; a.dispatchEvent(new Event("change")); })"""
    for key in ("trainable_parameters", "seconds", "peak_memory_bytes", "train_seconds"):
        for at, task in enumerate(TASKS):
            browser.run(f"{choose}(['{key}', '{at}'])")
            expected = [
                [record["cost"][key], c["value"]]
                for record in records
                for c in record["matrix"]
                if c["task"] == task and c["role"] in ("brick", "merged")
                if record["cost"][key] is not None
            ]
            assert sorted(browser.run(marks)) == sorted(expected)
    browser.run(f"{choose}(['seconds', 'gain'])")
    gains = {c["task"]: c["value"] - TASKS[c["task"]][1] for c in records[3]["matrix"][:3]}
    assert [2.5, pytest.approx(sum(gains.values()) / 3)] in browser.run(marks)


def test_curves_hide_and_show_runs(browser: Browser, drawn: Draw, tmp_path: Path) -> None:
    page, data = drawn(quickstart(tmp_path))
    browser.open(page, width=1280)
    strokes = """new Set([...document.querySelectorAll('#curves .chart path')].map((path) =>
      path.getAttribute('stroke'))).size"""
    assert [curve["key"] for curve in data["curves"]] == [
        "train/loss", "train/learning_rate", "validation/accuracy",
    ]  # fmt: skip
    assert browser.run(strokes) == 3
    browser.run("document.querySelector('#curves .legend button').click()")
    assert browser.run(strokes) == 2
    pressed = "document.querySelector('#curves .legend button').getAttribute('aria-pressed')"
    assert browser.run(pressed) == "false"


def test_everything_works_from_the_keyboard(browser: Browser, drawn: Draw, tmp_path: Path) -> None:
    page, _ = drawn(quickstart(tmp_path))
    browser.open(page, width=1280)
    value = "document.activeElement.dataset.value"
    tip = (
        "document.getElementById('tip').hidden ? null : document.getElementById('tip').textContent"
    )
    for _ in range(20):  # past the links at the top and the checks, into the matrix
        browser.key("Tab")
        if browser.run(value):
            break
    assert float(browser.run(value)) == 0.91
    assert "sentiment on sentiment" in browser.run(tip)
    browser.key("ArrowRight")
    assert float(browser.run(value)) == pytest.approx(TASKS["topic"][1] - 0.03)
    browser.key("ArrowDown")
    assert float(browser.run(value)) == 0.88
    assert "topic on topic" in browser.run(tip)
    browser.key("Tab")  # one stop for the whole table
    assert browser.run("document.activeElement.tagName") == "SELECT"
    stops = set()
    for _ in range(40):
        browser.key("Tab")
        stops.add(browser.run("document.activeElement.closest('section')?.id ?? ''"))
    assert {"costs", "curves", "lineage", "runs"} <= stops


def test_curve_tells_its_values_at_a_step(browser: Browser, drawn: Draw, tmp_path: Path) -> None:
    page, _ = drawn([trained(tmp_path, "topic")])
    browser.open(page, width=1280)
    browser.run("document.querySelectorAll('#curves .chart svg')[2].focus()")
    browser.key("ArrowLeft")
    text = browser.run("document.getElementById('tip').textContent")
    assert text == f"step 50topic{0.88 - 0.3 * 2.718281828459045 ** (-50 / 15):.4g}"


def test_runs_can_be_sorted_and_lead_to_their_files(
    browser: Browser, drawn: Draw, tmp_path: Path
) -> None:
    page, _ = drawn(quickstart(tmp_path))
    browser.open(page, width=1280)
    names = "[...document.querySelectorAll('#runs td:first-child b')].map((b) => b.textContent)"
    assert browser.run(names) == [*TASKS, "average"]
    browser.run("document.querySelectorAll('#runs th button')[4].click()")  # by score
    assert browser.run(names) == ["intent", "sentiment", "topic", "average"]
    links = browser.run(
        "[...document.querySelectorAll('#runs a, #lineage a')].map((a) => a.getAttribute('href'))"
    )
    assert len(links) == 12
    for link in links:
        assert not link.startswith("/")
        assert (page.parent / link).is_file(), link


def test_the_mean_over_seeds_wins_and_says_so(
    browser: Browser, drawn: Draw, tmp_path: Path
) -> None:
    """The ring is on the mean; its interval and its count are those of the seeds."""
    records = [
        trained(tmp_path, "topic", name=name, seed=seed, seedless_hash=name * 4)
        for name in ("one", "two")
        for seed in (1, 2, 3)
    ]
    page, data = drawn(records)
    browser.open(page, width=1280)
    found = browser.run(
        "[...document.querySelectorAll('.heat tr')].filter((row) => row.querySelector('td.best'))"
        ".map((row) => row.querySelector('th').textContent)"
    )
    assert found == ["onemean of 3 seeds"]
    assert browser.run("document.querySelector('#headline .winner').textContent") == (
        "one · mean of 3 seeds"
    )
    text = browser.run("document.querySelector('#headline').textContent")
    assert "Winner of 2" in text and "3 seeds" in text and "test examples" not in text
    figure = data["matrix"]["rows"][0]["cells"][0]
    assert figure["value"] == pytest.approx(0.9) and figure["n"] == 3
    assert figure["high"] - figure["value"] == pytest.approx(4.3027 * 0.01 / 3**0.5, rel=1e-4)


def test_only_answers_that_can_be_right_are_marked(
    browser: Browser, drawn: Draw, tmp_path: Path
) -> None:
    """A label is right or wrong; a text that goes on otherwise is neither."""
    record = trained(tmp_path, "topic")
    said = {"input": "x", "prediction": "a"}
    record["samples"] = [
        {**said, "reference": "a", "right": True},
        {**said, "reference": "b", "right": False},
        {**said, "reference": "b", "right": None},
        {**said, "reference": "b"},
    ]
    page, _ = drawn([record])
    browser.open(page, width=1280)
    texts = browser.run(
        "[...document.querySelectorAll('.sample:not(.sample-head) > div:nth-child(2) p')]"
        ".map((each) => each.textContent)"
    )
    assert texts == ["✓ a", "✗ a", "a", "a"]


def test_a_cell_names_whose_head_answered(browser: Browser, drawn: Draw, tmp_path: Path) -> None:
    """A small mark with its legend, and the name in the cell's tooltip."""
    page, data = drawn(quickstart(tmp_path))
    browser.open(page, width=1280)
    first = data["matrix"]["rows"][0]
    assert [cell["head"] for cell in first["cells"]] == list(TASKS)
    marks = browser.run("[...document.querySelectorAll('.heat sup')].length")
    assert marks == len(TASKS) * (len(TASKS) - 1)
    assert browser.run("document.querySelector('.key .borrowed').textContent").startswith("†")
    told = []
    for at in (0, 1):
        cell = f"document.querySelectorAll('.heat tbody td[tabindex]')[{at}]"
        browser.run(f"{cell}.dispatchEvent(new PointerEvent('pointermove', {{bubbles: true}}))")
        told.append(browser.run("document.getElementById('tip').textContent"))
    own, other = list(TASKS)[:2]
    assert "headits own" in told[0] and f"headthat of {other}" in told[1], (own, told)


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


def test_hostile_texts_stay_texts(browser: Browser, drawn: Draw, tmp_path: Path) -> None:
    evil = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"
    record = trained(tmp_path, "topic", name="plain")
    record["name"] = evil
    record["samples"] = [
        {"input": evil + "{{style}} &amp; \u2028 €", "prediction": evil, "reference": "{{data}}"}
    ]
    record["checks"] = {evil: {"value": "<b>", "tolerance": None, "passed": False}}
    page, data = drawn([record, trained(tmp_path, "intent")], title=evil)
    browser.open(page, width=390)
    assert browser.run("window.hacked ?? null") is None
    assert browser.messages == []
    assert browser.run("document.querySelector('h1').textContent") == evil
    assert browser.run("document.querySelector('.sample .said p').textContent") == (
        evil + "{{style}} &amp; \u2028 €"
    )
    assert data["samples"][0]["reference"] == "{{data}}"
    assert browser.run("document.documentElement.scrollWidth") == 390


def test_failures_come_first_and_are_named(browser: Browser, drawn: Draw, tmp_path: Path) -> None:
    record = trained(tmp_path, "topic")
    record["checks"]["unplugged equals bare"] = {
        "value": 3.1e-4,
        "tolerance": 1e-5,
        "passed": False,
    }
    page, _ = drawn([record, many(tmp_path)[-1]])
    browser.open(page, width=1280)
    assert browser.run("document.querySelector('#checks .verdict').textContent") == (
        "1 of 2 runs failed, 1 of 2 checks failed"
    )
    assert browser.run("document.querySelector('#checks details').open") is True
    lines = browser.run("[...document.querySelectorAll('#checks li')].map((li) => li.textContent)")
    assert lines[0] == "✗x: the loss became NaN at step 41"
    assert lines[1] == "✗topic: unplugged equals bare (0.00031, tolerance 1.0e-5)"


def test_page_is_one_file_without_addresses(drawn: Draw, tmp_path: Path) -> None:
    page, _ = drawn(quickstart(tmp_path))
    text = page.read_text(encoding="utf-8")
    assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", text)
    assert not re.findall(r"<(?:link|script|img)[^>]*(?:src|href)=\"(?!data:)", text)
    assert not re.findall(r"\{\{\w+\}\}", text)
    assert "default-src 'none'" in text


def test_title_is_what_the_runs_have_in_common(drawn: Draw, tmp_path: Path) -> None:
    one, two = trained(tmp_path, "topic"), trained(tmp_path, "topic", seed=1)
    whole = new_record(
        operation="sequence", recipe="quickstart", name="quickstart", seed=0, config_hash="s"
    )
    found = compared(tmp_path / "compared")
    sets = ([one], [one, two], [whole, one], [], found)
    titles = [drawn(records)[1]["title"] for records in sets]
    assert titles == ["task/topic · topic", "task/topic · 2 runs", "quickstart", "0 runs",
                      "compare/bricks · compared"]  # fmt: skip


def test_script_json_is_json_and_cannot_end_its_element() -> None:
    data = {"a": "</SCRIPT><!-- <script>", "b": "\u2028\u2029 & é", "c": [1.5, None, True]}
    text = as_script_json(data)
    assert json.loads(text) == data
    assert not set("<>&\u2028\u2029") & set(text)


def test_an_invalid_record_is_refused_and_nothing_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="operation"):
        draw([{"recipe": "x"}], tmp_path / "dashboard.html")
    assert not list(tmp_path.iterdir())
