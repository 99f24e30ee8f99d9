"""Asked about items: captions and their references, messages, two modalities in one prompt."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cfm_train.launch.cli import main
from cfm_train.modality.asking import Sense, alike, asked_ids, features_of_rows, said_ids
from cfm_train.modality.encoding import given, row_ids, shuffled
from cfm_train.modality.items import Reader, check_items, read_rows
from cfm_train.modality.scoring import class_scores
from cfm_train.modality.writing import generate, write_texts
from tests.backbones import folder, tiny
from tests.coloured_items import ALIGN, run
from tests.modality.test_modality import WIDTH, features, modality

QUIET = ["evaluation.bootstrap=20", "tracking=disabled"]


def message(role: str, *parts: str) -> dict[str, Any]:
    """A message with typed parts; ``image:1.npy`` is an item, all else text."""
    content = []
    for part in parts:
        kind, colon, path = part.partition(":")
        content.append({"type": kind, kind: path} if colon else {"type": "text", "text": part})
    return {"role": role, "content": content}


def test_captions_are_scored_against_all_references(
    items: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(folder("llama"), "lm")
    rows = [json.loads(line) for line in (items / "items.jsonl").read_text().splitlines()]
    for row in rows:
        row["text"] = [f"{row['text']} w9 w10", f"{row['text']} w9 w10 w11"]
    (items / "items.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run(capsys, *ALIGN, "backbone.path=./lm", "trainer.max_steps=80")
    command = ["recipe=modality/caption", "bricks=[eyes]", "data.items=items.jsonl", *QUIET]
    record, _ = run(capsys, *command, "max_new_tokens=6")
    found = record["metrics"]
    assert found["test/cider"]["n"] == 30  # two references, one item
    assert found["test/cider"]["value"] > found["shuffled/cider"]["value"]
    assert found["gain over shuffled/cider"]["low"] > 0
    (first, *_) = record["samples"]
    assert first["reference"] == " | ".join(rows[0]["text"])
    (items / "one.jsonl").write_text(json.dumps(rows[0]))
    assert main([*command[:2], "data.items=one.jsonl"]) == 2
    assert "give two or more" in capsys.readouterr().err


def test_texts_of_one_item_are_rows_that_stay_together(items: Path) -> None:
    rows = [{"image": f"img/{i}.npy", "text": ["w5", "w6", "w7"]} for i in range(10)]
    (items / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    section = {"items": "rows.jsonl", "validation": None, "test": None, "root": None,
               "text": "text", "prompt": "<item>", "validation_fraction": 0.0,
               "test_fraction": 0.4, "limit": None}  # fmt: skip
    checked, _ = check_items(section, "image", "x")
    sides = [{row["_items"][0] for row in checked.rows[name]} for name in ("train", "test")]
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 10
    assert sum(len(checked.rows[name]) for name in ("train", "test")) == 30
    everything = [*checked.rows["train"], *checked.rows["test"]]
    others: dict[str, set[str]] = {}
    for row, other in zip(everything, shuffled(everything, 0), strict=True):
        assert other != row["text"][:1]
        others.setdefault(row["_items"][0], set()).add(other[0])
    assert all(len(given) == 1 for given in others.values())


class Held:
    """A cache that holds its features in memory."""

    def __init__(self, *sizes: int) -> None:
        draw = np.random.default_rng(len(sizes))
        self.features = [draw.standard_normal((n, WIDTH)).astype(np.float32) for n in sizes]
        self.names: list[str] = []

    def read(self, item: str) -> np.ndarray:
        if item not in self.names:
            self.names.append(item)
        return self.features[self.names.index(item)]

    def length(self, item: str) -> int:
        return len(self.read(item))


def two_senses() -> dict[str, Sense]:
    """An image brick and one for features, random, with a placeholder each."""
    eyes, numbers = modality(), modality("mlp", seed=2, tags=False, name="features")
    numbers.sentinel = -3
    caches: list[Any] = [Held(2, 1, 3), Held(3, 2)]
    pairs = zip((eyes, numbers), caches, strict=True)
    return {brick.modality: Sense(brick, cache) for brick, cache in pairs}


def test_messages_with_items_of_two_modalities_are_scored_as_whole_texts(items: Path) -> None:
    """Two images and a vector in one prompt, against embeddings put together by hand."""
    np.save("v.npy", np.zeros(WIDTH, np.float32))
    turns = [
        message("user", "w5 ", "image:img/0.npy", " w6 ", "features:v.npy"),
        message("assistant", "w7"),
        message("user", "image:img/1.npy", " w8"),
        message("assistant", "w9"),
    ]
    (items / "rows.jsonl").write_text(json.dumps({"messages": turns}))
    section = {"text": "text", "prompt": "<item>"}
    (row,) = read_rows("rows.jsonl", section, ["image", "features"], Reader(None, items))
    assert row["_kinds"] == ["image", "features", "image"]
    backbone, senses = tiny("llama"), two_senses()
    held = [row["text"][:3]]
    (prompt,) = asked_ids(
        [row], held, senses, backbone.tokenizer, room=2, limit=500, what="a class"
    )
    names = ["w9", "w10 w11"]
    classes = [said_ids(row, name, senses, backbone.tokenizer) for name in names]
    queues = {
        "<image>": [senses["image"].tokens(held[0][i]) for i in (0, 2)],
        "<features>": [senses["features"].tokens(held[0][1])],
    }
    whole, marks = row_ids(row, queues, backbone.tokenizer)
    assert whole[: len(prompt) + len(classes[0])] == prompt + classes[0]
    assert marks[len(prompt) : len(prompt) + len(classes[0])] == classes[0]
    batch = features_of_rows([row], held, senses)
    with backbone.slots.plugged([sense.brick for sense in senses.values()]):
        found = class_scores(backbone, [prompt], classes, batch, "sum")
    embed = backbone.model.get_input_embeddings()
    tokens: dict[int, list[torch.Tensor]] = {}
    for kind, numbers in (("image", (0, 2)), ("features", (1,))):
        brick = senses[kind].brick
        for i in numbers:
            item = torch.tensor(senses[kind].cache.read(held[0][i]))[None]
            made, there = brick.tokens_of(item, torch.ones(item.shape[:2]).bool())
            tokens.setdefault(brick.sentinel, []).extend(made[there])
    for j, name in enumerate(classes):
        queues_by_hand = {sentinel: list(made) for sentinel, made in tokens.items()}
        vectors = [
            queues_by_hand[i].pop(0) if i < 0 else embed(torch.tensor(i)) for i in prompt + name
        ]
        with torch.inference_mode():
            logits = backbone.model(inputs_embeds=torch.stack(vectors)[None]).logits[0].double()
        told = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        expected = sum(float(told[k, token]) for k, token in enumerate(name))
        assert found[0, j] == pytest.approx(expected, abs=1e-4)


def test_prompts_of_one_length_are_written_to_together_as_one_by_one() -> None:
    backbone, senses = tiny("llama"), two_senses()
    eyes = senses["image"].brick
    prompts = [[5 + i, *[eyes.sentinel] * eyes.count(2), 7] for i in range(3)]
    draw = np.random.default_rng(1)
    features = draw.standard_normal((3, 2, WIDTH)).astype(np.float32)
    with backbone.slots.plugged([eyes]):
        together = write_texts(backbone, prompts, given("image", [[f] for f in features]), 5)
        for i in range(3):
            alone = generate(backbone, prompts[i], given("image", [[features[i]]]), 5)
            assert together[i] == alone
    assert list(alike([[1], [1, 2], [3], [4]], 2)) == [[0, 2], [3], [1]]


def test_writing_is_greedy_whatever_the_model_would_rather() -> None:
    """A penalty on what was there before looks up ids, and placeholders have none."""
    backbone, senses = tiny("llama"), two_senses()
    eyes, settings = senses["image"].brick, backbone.model.generation_config
    prompt = [5, *[eyes.sentinel] * eyes.count(2), 7]
    (row,) = features([[2]])
    with backbone.slots.plugged([eyes]):
        plain = generate(backbone, prompt, given("image", [row]), 8)
        settings.repetition_penalty, settings.no_repeat_ngram_size = 1.3, 1
        try:
            assert generate(backbone, prompt, given("image", [row]), 8) == plain
        finally:
            settings.repetition_penalty, settings.no_repeat_ngram_size = 1.0, 0


def test_several_images_and_vectors_are_classified_and_asked(
    items: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Messages with two images and features, for two bricks; one prompt with a file for each."""
    shutil.copytree(folder("llama"), "lm")
    rows, other = [], []
    for i in range(12):
        np.save(f"img/v{i}.npy", np.array([i % 2, i, 0], np.float32))
        asked = message("user", f"image:img/{i}.npy", f"image:img/{i + 1}.npy", " w8 ",
                        f"features:img/v{i}.npy")  # fmt: skip
        rows.append(json.dumps({"messages": [asked, message("assistant", ("w5", "w6")[i % 2])]}))
        other.append(json.dumps({"features": f"img/v{i}.npy", "text": ("w5", "w6")[i % 2]}))
    (items / "rows.jsonl").write_text("\n".join(rows))
    (items / "vectors.jsonl").write_text("\n".join(other))
    short = ["backbone.path=./lm", "trainer.max_steps=2"]
    run(capsys, *ALIGN, *short)
    vectors = ["name=numbers", "encoder=vectors", "encoder.numbers=3", "data.items=vectors.jsonl"]
    kept = [one for one in ALIGN if not one.startswith(("name=", "encoder", "data.items"))]
    run(capsys, *kept, *vectors, *short)
    classify = ["recipe=modality/classify", "bricks=[eyes,numbers]", "data.items=rows.jsonl"]
    record, _ = run(capsys, *classify, *QUIET)
    assert record["metrics"]["test/accuracy"]["n"] == 12
    assert record["samples"][0]["reference"] == "w5"
    asked, _ = run(
        capsys, "recipe=generate", "bricks=[eyes,numbers]", "prompt=<image> w8 <features> w9",
        "image=img/0.npy", "features=img/v0.npy", "max_new_tokens=2", "tracking=disabled",
    )  # fmt: skip
    assert asked["samples"][0]["input"] == "<image> w8 <features> w9"
    both = ["recipe=generate", "bricks=[eyes,numbers]", "prompt=w8 <item> w9", "tracking=disabled"]
    asked, _ = run(capsys, *both, "features=img/v0.npy", "image=img/0.npy", "max_new_tokens=2")
    assert asked["samples"][0]["input"] == "w8 <image><features> w9"
    assert main(both) == 2
    assert "asks for <item>: give image=FILE or features=FILE" in capsys.readouterr().err
    assert main(["recipe=modality/classify", "bricks=[eyes]", "data.items=rows.jsonl"]) == 2
    assert "a text or of type image, found 'features'" in capsys.readouterr().err
