"""Batches: every row once, within the budget, little padding, a function of seed and number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cfm_train.config.compose import option
from cfm_train.data.batches import BatchStream, collate, in_order, padding_share, plan_epoch
from cfm_train.data.encode import Encoded, encode, encode_rows
from cfm_train.data.sources import check
from cfm_train.data.tasks import IGNORED, TaskSpec

one_side = st.lists(st.integers(1, 40), min_size=1, max_size=80).map(np.array)
two_sides = st.lists(
    st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=80
).map(np.array)


@settings(deadline=None)
@given(st.one_of(one_side, two_sides), st.integers(1, 300), st.integers(1, 20), st.integers(0, 9))
def test_every_row_once_within_the_budget(
    lengths: np.ndarray, tokens: int, rows: int, epoch: int
) -> None:
    keys = {"tokens_per_batch": tokens, "rows_per_batch": rows}
    drawn = plan_epoch(lengths, **keys, seed=3, epoch=epoch)
    for batches in (drawn, in_order(lengths, **keys)):
        assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
        for batch in batches:
            padded = len(batch) * lengths[batch].reshape(len(batch), -1).max(axis=0).sum()
            assert len(batch) == 1 or (padded <= tokens and len(batch) <= rows)
    again = plan_epoch(lengths, **keys, seed=3, epoch=epoch)
    assert all(np.array_equal(a, b) for a, b in zip(drawn, again, strict=True))


def test_seeds_and_epochs_draw_other_batches() -> None:
    lengths = np.random.default_rng(0).integers(4, 60, 500)
    keys = {"tokens_per_batch": 512, "rows_per_batch": 64}
    plans = {
        (seed, epoch): [tuple(b) for b in plan_epoch(lengths, **keys, seed=seed, epoch=epoch)]
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len({tuple(plan) for plan in plans.values()}) == 4
    together = [set(map(frozenset, plan)) for plan in plans.values()]
    assert len(together[0] & together[1]) < 0.2 * len(together[0])  # not the same batches reordered
    # Long and short batches come in any order.
    means = [lengths[list(batch)].mean() for batch in plans[0, 0]]
    assert abs(np.corrcoef(np.arange(len(means)), means)[0, 1]) < 0.4


@pytest.mark.parametrize("tokens", [512, 1024, 2048])
def test_padding_on_sst2_is_below_four_per_cent(
    shared: Path, bert: Any, tmp_path: Path, tokens: int
) -> None:
    data = encode(check(option("data", "sst2", root=str(shared / "data/tasks"))), bert, tmp_path)
    plan = plan_epoch(
        data.train.lengths, tokens_per_batch=tokens, rows_per_batch=256, seed=0, epoch=0
    )
    padded = sum(len(b) * max(len(data.train.slice("input_ids", i)) for i in b) for b in plan)
    real = len(data.train.arrays["input_ids"])
    assert padding_share(data.train.lengths, plan) == pytest.approx(1 - real / padded)
    assert 1 - real / padded < 0.04


def stream(sizes: dict[str, int], mixture: float = 1.0, seed: int = 5) -> BatchStream:
    rng = np.random.default_rng(1)
    lengths = {name: rng.integers(5, 50, size) for name, size in sizes.items()}
    return BatchStream(lengths, tokens_per_batch=300, rows_per_batch=8, seed=seed, mixture=mixture)


@pytest.mark.parametrize("mixture", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("sizes", [{"a": 70}, {"a": 300, "b": 20, "c": 90}])
def test_a_batch_is_a_function_of_its_number(sizes: dict[str, int], mixture: float) -> None:
    running = stream(sizes, mixture)
    steps = running.steps(3)
    straight = [running.batch_at(step) for step in range(steps)]
    for step in np.random.default_rng(2).permutation(steps)[:40]:
        task, rows = stream(sizes, mixture).batch_at(int(step))  # a new process after a kill
        assert task == straight[step][0]
        assert np.array_equal(rows, straight[step][1])
    other = stream(sizes, mixture, seed=6)
    assert any(not np.array_equal(other.batch_at(i)[1], straight[i][1]) for i in range(10))


def test_epochs_of_one_task_and_of_several() -> None:
    for sizes in ({"a": 70}, {"a": 300, "b": 20, "c": 90}):
        running = stream(sizes)
        assert running.steps(0) == 0
        for epoch in range(3):
            begin, end = running.steps(epoch), running.steps(epoch + 1)
            assert {running.epoch_of(begin), running.epoch_of(end - 1)} == {epoch}
            assert running.steps(epoch + 0.5) == begin + round((end - begin) / 2)
            held: dict[str, list[int]] = {name: [] for name in sizes}
            for step in range(begin, end):
                task, rows = running.batch_at(step)
                held[task] += rows.tolist()
            for name, size in sizes.items():
                assert sorted(held[name]) == list(range(size))


@pytest.mark.parametrize("mixture", [0.5, 0.0, 2.0])
def test_mixture_gives_each_task_its_share(mixture: float) -> None:
    sizes = {"a": 900, "b": 100, "c": 400}
    running = stream(sizes, mixture)
    whole = stream(sizes).steps(1)
    weights = {name: size**mixture for name, size in sizes.items()}
    for epoch in range(4):
        tasks = [task for task, _ in running.epoch_plan(epoch)]
        for name, weight in weights.items():
            assert abs(tasks.count(name) - whole * weight / sum(weights.values())) <= 1
    # From epoch to epoch each task goes through all of its rows before any of them comes again.
    counts = {name: np.zeros(size, int) for name, size in sizes.items()}
    for step in range(running.steps(4)):
        task, rows = running.batch_at(step)
        counts[task][rows] += 1
        if step + 1 in {running.steps(epoch) for epoch in range(5)}:
            assert all(count.max() - count.min() <= 1 for count in counts.values())


def spec(kind: str, labels: tuple[str, ...] | None = None) -> TaskSpec:
    return TaskSpec("mine", kind, labels, "accuracy", True, ("text",))


LIMITS = {"max_length": 32, "target_max_length": 8, "pack": True}


def encoded(
    kind: str, tokenizer: Any, cache: Path, rows: list[dict[str, Any]], **limits: Any
) -> Encoded:
    labels = ("a", "b", "c") if kind in ("classification", "multilabel", "token") else None
    rows = [{**row, "_at": f"f:{i}"} for i, row in enumerate(rows)]
    return encode_rows(rows, spec(kind, labels), LIMITS | limits, tokenizer, cache)


def test_collate_pads_as_the_tokenizer_does(bert: Any, tmp_path: Path) -> None:
    texts = ["one", "a good deal longer than that", "two words", "middle sized one"]
    rows = [{"text": [text, text[::-1]], "label": i % 3} for i, text in enumerate(texts)]
    data = encode_rows(
        [{**row, "_at": "f:1"} for row in rows],
        TaskSpec("mine", "classification", ("a", "b", "c"), "accuracy", True, ("x", "y")),
        LIMITS,
        bert,
        tmp_path,
    )
    chosen = np.array([2, 0, 3])
    batch = collate(data, chosen, bert.pad_token_id)
    oracle = bert(
        [rows[i]["text"][0] for i in chosen],
        [rows[i]["text"][1] for i in chosen],
        padding=True,
        return_tensors="pt",
    )
    for key in ("input_ids", "attention_mask", "token_type_ids"):
        assert torch.equal(batch[key], oracle[key]) and batch[key].dtype == torch.int64
    assert batch["labels"].tolist() == [2, 0, 0] and batch["labels"].dtype == torch.int64
    assert batch["index"].tolist() == [2, 0, 3]


def test_collate_of_every_answer(bert: Any, llama: Any, tmp_path: Path) -> None:
    many = encoded("multilabel", bert, tmp_path, [{"text": ["x"], "label": [0, 2]}])
    assert collate(many, np.array([0]), 0)["labels"].tolist() == [[1, 0, 1]]
    score = encoded("regression", bert, tmp_path, [{"text": ["x"], "label": 0.5}])
    assert collate(score, np.array([0]), 0)["labels"].dtype == torch.float32
    words = [
        {"text": ["ab cd"], "words": [[0, 2], [3, 5]], "label": [1, 2]},
        {"text": ["ab"], "words": [[0, 2]], "label": [1]},
    ]
    tags = collate(encoded("token", bert, tmp_path, words), np.array([0, 1]), 0)
    assert tags["labels"].shape == tags["input_ids"].shape
    assert (tags["labels"][tags["attention_mask"] == 0] == IGNORED).all()
    assert tags["labels"][1, 1] == 1
    none = collate(encoded("multilabel", bert, tmp_path, [{"text": ["x"]}]), np.array([0]), 0)
    assert "labels" not in none


def test_packed_documents_do_not_see_each_other(shared: Path, tmp_path: Path) -> None:
    """The loss of every document in a block equals its loss alone."""
    from cfm_train.backbone.load import load_backbone
    from cfm_train.backbone.spec import resolve
    from cfm_train.training.objectives import compute

    keys = {"id": "x", "package": None, "revision": None, "sha256": None, "dtype": "float32"}
    path = str(shared / "models" / "lm-tiny1m")
    backbone = load_backbone(resolve({**keys, "path": path}), dtype="float32")
    texts = [
        "Once upon a time there was a dog.",
        "Lily ran.",
        "Tom saw a big red ball.",
        "The end.",
    ]
    rows = [{"text": [text]} for text in texts]
    losses = {}
    for packed in (True, False):
        data = encoded("causal", backbone.tokenizer, tmp_path, rows, pack=packed, max_length=48)
        assert (len(data) < len(texts)) == packed
        with torch.inference_mode():
            batch = collate(data, np.arange(len(data)), backbone.tokenizer.pad_token_id)
            result = compute("causal", backbone, None, batch)
        losses[packed] = (float(result.loss), result.count)
    assert losses[True][1] == losses[False][1]
    assert losses[True][0] == pytest.approx(losses[False][0], rel=1e-5)
