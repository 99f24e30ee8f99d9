"""From items to answers: a connector trained, killed caches, classes, a prompt with an image."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

from cfm_train.errors import UserError
from cfm_train.launch.cli import main
from cfm_train.modality.cache import FeatureCache
from cfm_train.modality.finding import find_encoder
from cfm_train.modality.items import Reader, check_items
from cfm_train.modality.judging import by_items
from cfm_train.modality.writing import generate
from tests.backbones import folder, tiny
from tests.coloured_items import ALIGN, run

PATCHES = {"kind": "patches", "size": 16, "patch": 8}


def test_a_connector_learns_classifies_and_is_asked(
    items: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder("llama"), "lm")
    record, _ = run(capsys, *ALIGN, "backbone.path=./lm", "trainer.max_steps=60")
    assert all(check["passed"] for check in record["checks"].values())
    assert record["checks"]["text logits"]["value"] == 0.0
    metrics = record["metrics"]
    assert metrics["shuffled/loss"]["value"] > metrics["test/loss"]["value"] + 0.3
    assert metrics["gain over shuffled/loss"]["low"] > 0
    from cfm_train.library.store import Library

    card = Library("outputs/library").find("eyes")
    assert card.kind == "modality" and len(card.requires) == 2
    assert "path" not in card.interface["hyper"]["encoder"]
    classed, _ = run(
        capsys,
        "recipe=modality/classify",
        "bricks=[eyes]",
        "data.items=items.jsonl",
        "evaluation.bootstrap=20",
        "tracking=disabled",
    )
    assert classed["metrics"]["test/accuracy"]["value"] > 0.9
    assert classed["metrics"]["shuffled/accuracy"]["value"] < 0.7
    word = json.loads((items / "items.jsonl").read_text().splitlines()[0])["text"]
    asked, out = run(
        capsys,
        "recipe=generate",
        "bricks=[eyes]",
        "prompt=<image>",
        "image=img/0.npy",
        "max_new_tokens=3",
        "tracking=disabled",
    )
    assert asked["samples"][0]["prediction"].split()[0] == word and word in out
    capsys.readouterr()
    assert main(["recipe=generate", "bricks=[eyes]", "prompt=a", "audio=img/0.npy"]) == 2
    assert "no brick reads <audio>" in capsys.readouterr().err
    short = ["recipe=modality/classify", "bricks=[eyes]", "data.items=items.jsonl"]
    assert main([*short, "data.max_length=4", "tracking=disabled"]) == 2
    assert "items.jsonl:1: its items, its prompt and a class take" in capsys.readouterr().err


WITHIN = {
    "series": ["encoder.patch=4", "encoder.stride=4", "connector=window_qformer",
               "connector.window=2", "connector.layers=1", "connector.ff=16"],
    "table": ["encoder.numbers={age: [0, 100]}", "encoder.texts=[town]", "encoder.buckets=4",
              "connector=gated_cross_attention", "connector.every=1", "connector.depth=1"],
}  # fmt: skip


@pytest.mark.parametrize("kind", WITHIN)
def test_items_that_stand_within_their_rows_are_learned(
    kind: str, items: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Series and table rows, through windows and from inside the layers; asked by file."""
    shutil.copytree(folder("llama"), "lm")
    draw, rows = np.random.default_rng(0), []
    for i in range(40):
        sign = (-1, 1)[i % 2]
        series = (sign * np.arange(12) + draw.normal(0, 0.5, 12)).round(3).tolist()
        table = {"age": 50 + sign * int(draw.integers(10, 50)), "town": f"w{draw.integers(9)}"}
        item = {"series": series, "table": table}[kind]
        rows.append(json.dumps({kind: item, "text": ("w5", "w6")[i % 2]}))
    Path("items.jsonl").write_text("\n".join(rows))
    kept = [one for one in ALIGN if not one.startswith(("encoder", "connector"))]
    record, _ = run(
        capsys,
        *kept,
        "backbone.path=./lm",
        f"encoder={kind}",
        *WITHIN[kind],
        "connector.tokens=2",
        "connector.inner=16",
        "connector.heads=2",
        "cache.dtype=float32",
        "trainer.max_steps=150",
        "trainer.epochs=200",
        "trainer.rows_per_batch=16",
        "trainer.learning_rate=2e-2",
    )
    assert all(check["passed"] for check in record["checks"].values())
    assert record["metrics"]["gain over shuffled/loss"]["value"] > 0.3
    more = ["bricks=[eyes]", "tracking=disabled"]
    classed, _ = run(
        capsys,
        "recipe=modality/classify",
        "data.items=items.jsonl",
        "cache.dtype=float32",
        "evaluation.bootstrap=20",
        *more,
    )
    assert classed["metrics"]["test/accuracy"]["value"] > 0.9
    Path("one.json").write_text(json.dumps(json.loads(rows[0])[kind]))
    given = [f"prompt=<{kind}>", f"{kind}=one.json", "max_new_tokens=3"]
    asked, _ = run(capsys, "recipe=generate", *given, *more)
    assert asked["samples"][0]["prediction"].split()[0] == "w5"


def test_one_test_row_has_no_control(items: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its items cannot be swapped with another row's."""
    shutil.copytree(folder("llama"), "lm")
    (items / "one.jsonl").write_text((items / "items.jsonl").read_text().splitlines()[0])
    short = ["backbone.path=./lm", "data.test=one.jsonl", "trainer.max_steps=2"]
    record, out = run(capsys, *ALIGN, *short)
    assert [name for name in record["metrics"] if name.startswith("test")] == ["test/loss"]
    assert not any("shuffled" in name for name in record["metrics"])
    assert "all rows are about one item, so there is no control" in out
    row = json.loads((items / "one.jsonl").read_text())
    (items / "one.jsonl").write_text(json.dumps({**row, "text": ["w5", "w6", "w7"]}))
    record, out = run(capsys, *ALIGN, *short)  # three rows, and no other item
    assert not any("shuffled" in name for name in record["metrics"])


def test_a_factor_that_fits_no_grid_is_refused_before_a_run_exists(
    items: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = [one for one in ALIGN if not one.startswith("connector")]
    shutil.copytree(folder("llama"), "lm")
    more = ["backbone.path=./lm", "connector=pixel_shuffle", "connector.factor=3"]
    assert main([*kept, *more]) == 2
    assert "connector.factor=3: an item has 4 feature vectors" in capsys.readouterr().err
    assert not (items / "outputs").exists()


@pytest.mark.slow
def test_killed_is_not_lost(
    items: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGKILL while features are cached and after some steps: the same brick and figures."""
    shutil.copytree(folder("llama"), "lm")
    long = [*ALIGN, "backbone.path=./lm", "tags=true", "trainer.max_steps=30"]
    long += ["trainer.checkpoint_every=3", "trainer.rows_per_batch=8", "trainer.threads=1"]
    whole, _ = run(capsys, *long, "outputs=a", "library=a/library")
    monkeypatch.setenv("CFM_CACHE", str(items / "another"))
    for reached in ("another/features/*/data.bin", "b/runs/*/*/checkpoints/last.ckpt"):
        command = [sys.executable, "-m", "cfm_train", *long, "outputs=b", "library=b/library"]
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=dict(os.environ)
        )
        until = time.monotonic() + 300
        while not list(items.glob(reached)) and time.monotonic() < until:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    again, _ = run(capsys, *long, "outputs=b", "library=b/library")
    assert again["metrics"] == whole["metrics"]
    assert again["brick"]["version"] == whole["brick"]["version"]
    curves = [next(items.glob(f"{at}/runs/*/*/metrics.jsonl")).read_bytes() for at in "ab"]
    assert curves[0] == curves[1]


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_a_backbone_that_cannot_go_on_after_a_prompt_is_refused(family: str) -> None:
    with pytest.raises(UserError, match="from left to right"):
        generate(tiny(family), [5, 6], {}, 2)


def test_numbers_that_the_cache_cannot_hold_are_refused(items: Path) -> None:
    """float16 ends at 65504: an infinite feature would be standardised to NaN."""
    found = find_encoder({"kind": "vectors", "numbers": 2})
    np.save("big.npy", np.array([1.0, 7e4], np.float32))
    names = {"0" * 64: ("big.npy", "here")}
    half, full = (FeatureCache(items / "cache", found.fingerprint, f"float{n}") for n in (16, 32))
    with pytest.raises(UserError, match=r"here: .* 7e\+04.* cache\.dtype=float32"):
        half.fill(found.open(), names, Reader(None, items).read, 1.0, {})
    assert not half.index
    full.fill(found.open(), names, Reader(None, items).read, 1.0, {})
    np.testing.assert_array_equal(full.read("0" * 64), [[1, 7e4]])


def test_after_a_system_message_rows_are_told_apart_by_what_is_asked(items: Path) -> None:
    """The item goes to the user's first message; another question is another row."""
    lines = []
    for asked in ("What?", "Where?"):
        turns = [("system", "Be kind."), ("user", asked), ("assistant", "A cat.")]
        messages = [{"role": role, "content": content} for role, content in turns]
        lines.append(json.dumps({"image": "img/0.npy", "messages": messages}))
    (items / "train.jsonl").write_text("\n".join(lines))
    (items / "test.jsonl").write_text(lines[0])
    section = {"items": "train.jsonl", "validation": None, "test": "test.jsonl", "root": None,
               "text": "text", "prompt": "<item>", "validation_fraction": 0.0,
               "test_fraction": 0.0, "limit": None}  # fmt: skip
    checked, _ = check_items(section, "image", "x")
    (row,) = checked.rows["train"]
    assert [turn["content"] for turn in row["turns"][:2]] == ["Be kind.", "<image>\nWhere?"]
    assert checked.leaks.counts == {"train in test": 1}


def test_questions_about_one_item_stay_on_one_side(items: Path) -> None:
    """What is tested was not seen; questions about a single item are cut themselves."""
    lines = []
    for i in range(20):
        for asked in ("What?", "Where?", "Why?"):
            turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": "w5"}]
            lines.append(json.dumps({"image": f"img/{i}.npy", "messages": turns}))
    section = {"items": "rows.jsonl", "validation": None, "test": None, "root": None,
               "text": "text", "prompt": "<item>", "validation_fraction": 0.3,
               "test_fraction": 0.3, "limit": None}  # fmt: skip
    (items / "rows.jsonl").write_text("\n".join(lines))
    checked, _ = check_items(section, "image", "x")
    sides = [{row["_items"][0] for row in rows} for rows in checked.rows.values()]
    assert all(sides) and sum(map(len, sides)) == 20 == len(set.union(*sides))
    assert sum(map(len, checked.rows.values())) == 60
    (items / "rows.jsonl").write_text("\n".join(lines[:3]))
    checked, _ = check_items(section, "image", "x")
    assert len(checked.rows["train"]) < 3 and checked.rows["test"]


def test_losses_of_one_item_are_one_draw() -> None:
    found = by_items(np.array([1.0, 2.0, 4.0, 6.0]), [("a",), ("b",), ("a",), ("b",)])
    np.testing.assert_array_equal(found, [2.5, 4.0])


def test_items_that_cannot_be_read_stop_before_a_run_exists(
    items: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder("llama"), "lm")
    kept = [one for one in ALIGN if not one.startswith(("encoder", "connector"))]
    table = ["encoder=table", "encoder.texts=[town]"]
    for encoder, row, complaint in (
        (["encoder=series"], {"series": [[1, 2], [3, 4]]}, "the series has 2 channels"),
        (table, {"table": {"town": "Ulm", "age": 3}}, "the encoder does not read the column"),
    ):
        (items / "items.jsonl").write_text(json.dumps({**row, "text": "w5"}))
        assert main([*kept, "backbone.path=./lm", *encoder]) == 2
        assert f"items.jsonl:1: {complaint}" in capsys.readouterr().err
    assert not (items / "outputs").exists()


def test_the_cache_is_forecast_refused_and_goes_on(items: Path) -> None:
    found = find_encoder(PATCHES)
    encoder = found.open()
    reader = Reader(None, items)
    names = {f"{i:064d}": (f"img/{i}.npy", "here") for i in range(10)}
    cache = FeatureCache(items / "cache", found.fingerprint, "float32")
    size = 10 * 4 * 192 * 4
    assert cache.forecast(encoder, list(names), names, reader.read) == size
    with pytest.raises(UserError, match=r"cache\.limit_gb"):
        cache.fill(encoder, names, reader.read, size / 1e9 * 0.9, {})
    assert not cache.folder.exists()
    first = dict(list(names.items())[:6])
    cache.fill(encoder, first, reader.read, 1.0, {})
    # A kill between the vectors and their index, and in the middle of a line.
    with (cache.folder / "data.bin").open("ab") as data:
        data.write(b"\x00" * 1000)
    with (cache.folder / "index.jsonl").open("a") as index:
        index.write('{"item": "bro')
    again = FeatureCache(items / "cache", found.fingerprint, "float32")
    assert again.fill(encoder, names, reader.read, 1.0, {})["made"] == 4
    for item, (reference, _) in names.items():
        alone, _ = encoder.encode([encoder.load(reader.read(reference, ""), "")])
        np.testing.assert_array_equal(again.read(item), alone[0].numpy())
    assert again.size() == size


def test_items_from_folders_zips_typed_messages_and_llava(items: Path) -> None:
    base = {"items": "", "validation": None, "test": None, "root": None, "text": "text",
            "prompt": "<item> is", "validation_fraction": 0.0, "test_fraction": 0.0,
            "limit": None}  # fmt: skip
    (items / "tree" / "cat").mkdir(parents=True)
    shutil.copy("img/0.npy", "tree/cat/0.npy")
    with zipfile.ZipFile("pets.zip", "w") as archive:
        archive.write("img/0.npy", "train/cat/0.npy")
    for place in ("tree", "pets.zip", "pets.zip/train"):
        (row,) = check_items({**base, "items": place}, "image", "x")[0].rows["train"]
        assert (row["answer"], row["prompt"]) == ("cat", "<image> is")
    forms = [
        {"image": "train/cat/0.npy", "conversations": [
            {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]},
        {"messages": [{"role": "user", "content": [
            {"type": "image", "image": "train/cat/0.npy"}, {"type": "text", "text": "\nWhat?"}]},
            {"role": "assistant", "content": "A cat."}]},
    ]  # fmt: skip
    turns = []
    for form in forms:
        (items / "rows.jsonl").write_text(json.dumps(form))
        section = {**base, "items": "rows.jsonl", "root": "pets.zip"}
        (row,) = check_items(section, "image", "x")[0].rows["train"]
        turns.append(row["turns"])
    assert turns[0] == turns[1] and turns[0][0]["content"] == "<image>\nWhat?"
    for place in ("img", "pets.zip/train/cat"):
        with pytest.raises(UserError, match=r"0\.npy: stands in no folder of .* its class"):
            check_items({**base, "items": place}, "image", "x")
    (items / "rows.jsonl").write_text('{"image": "nowhere.png", "text": "a"}')
    with pytest.raises(UserError, match=r"rows\.jsonl:1: there is no item nowhere\.png"):
        check_items({**base, "items": "rows.jsonl"}, "image", "x")
