"""Objectives against plain transformers models, one row at a time and without padding."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.special import expit, logsumexp

from cfm_train.bricks.heads import Head
from cfm_train.data.encode import Encoded
from cfm_train.training.objectives import compute, count_items
from cfm_train.training.task_head import new_head
from tests.backbones import FAMILIES, plain_model, tiny
from tests.tasks import task_data, whole_batch

HEADED = ("classification", "multilabel", "regression", "token")


@torch.no_grad()
def hidden(family: str, encoded: Encoded, row: int) -> np.ndarray:
    """Last hidden states of one row, ``[tokens, hidden]`` float64, through transformers alone."""
    model = plain_model(family)
    body = model.encoder if family == "t5" else model.base_model
    ids = torch.tensor(encoded.slice("input_ids", row).astype(np.int64))[None]
    return body(input_ids=ids).last_hidden_state[0].double().numpy()


def logits_of(head: Head, states: np.ndarray, family: str, task: str) -> np.ndarray:
    if task != "token":
        states = states[-1] if family in ("llama", "gpt2") else states.mean(0)
    weight, bias = (p.detach().double().numpy() for p in head.linear.parameters())
    return states @ weight.T + bias


def row_loss(task: str, logits: np.ndarray, encoded: Encoded, row: int) -> tuple[float, int]:
    """The formulas by hand: sum and number of items of one row."""
    if task == "token":
        marked = [
            (x, y)
            for x, y in zip(logits, encoded.slice("token_labels", row), strict=True)
            if y != -100
        ]
        return sum(logsumexp(x) - x[y] for x, y in marked), len(marked)
    label = encoded.arrays["labels"][row]
    if task == "classification":
        return logsumexp(logits) - logits[label], 1
    if task == "regression":
        targets = np.array([r["label"] for r in encoded.rows])
        return (logits[0] - (label - targets.mean()) / targets.std()) ** 2, 1
    shares = expit(logits)
    return -sum(math.log(p if on else 1 - p) for p, on in zip(shares, label, strict=True)), 1


@pytest.mark.parametrize(("family", "task"), itertools.product(FAMILIES, HEADED))
def test_headed_tasks(family: str, task: str) -> None:
    backbone = tiny(family)
    data = task_data(backbone, task)
    head = new_head(backbone, data, 0)
    torch.nn.init.normal_(head.linear.bias)
    batch = whole_batch(backbone, task, data.train)
    assert len(set(batch["attention_mask"].sum(1).tolist())) > 1, "rows of several lengths"
    result = compute(task, backbone, head, batch)
    expected = [
        row_loss(task, logits_of(head, hidden(family, data.train, i), family, task), data.train, i)
        for i in range(6)
    ]
    assert result.count == count_items(task, batch) == sum(n for _, n in expected)
    assert result.row_count.tolist() == [n for _, n in expected]
    assert result.loss.item() == pytest.approx(sum(x for x, _ in expected), rel=1e-5)
    assert result.row_loss.tolist() == pytest.approx([x for x, _ in expected], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    ("family", "task"), [*itertools.product(("llama", "gpt2"), ("causal", "instruct"))]
)
def test_language_tasks(family: str, task: str) -> None:
    """Sum and count of transformers' own loss, which is a mean over a row's tokens."""
    backbone = tiny(family)
    data = task_data(backbone, task)
    batch = whole_batch(backbone, task, data.train)
    result = compute(task, backbone, None, batch)
    model = plain_model(family)
    sums, counts = [], []
    for i in range(6):
        ids, labels = (
            torch.tensor(data.train.slice(name, i).astype(np.int64))[None]
            for name in ("input_ids", "token_labels")
        )
        counts.append(int((labels[:, 1:] != -100).sum()))
        sums.append(model(input_ids=ids, labels=labels).loss.item() * counts[-1])
    assert result.count == count_items(task, batch) == sum(counts)
    assert result.row_count.tolist() == counts
    assert result.loss.item() == pytest.approx(sum(sums), rel=1e-5)
    assert result.row_loss.tolist() == pytest.approx(sums, rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_packed_documents_do_not_see_each_other(family: str) -> None:
    """A block's loss is the sum of its documents' own, each alone in a row."""
    backbone = tiny(family)
    packed = task_data(backbone, "causal", pack=True, max_length=32).train
    alone = task_data(backbone, "causal", pack=False, max_length=32).train
    assert len(packed) < len(alone)
    a = compute("causal", backbone, None, whole_batch(backbone, "causal", packed, range(3)))
    held = [int(i) for block in range(3) for i in packed.slice("block_rows", block)]
    b = compute("causal", backbone, None, whole_batch(backbone, "causal", alone, np.array(held)))
    assert a.count == b.count
    assert a.loss.item() == pytest.approx(b.loss.item(), rel=1e-5)


def test_sequence_to_sequence() -> None:
    backbone = tiny("t5")
    data = task_data(backbone, "seq2seq")
    batch = whole_batch(backbone, "seq2seq", data.train)
    result = compute("seq2seq", backbone, None, batch)
    model = plain_model("t5")
    sums, counts = [], []
    for i in range(6):
        ids, labels = (
            torch.tensor(data.train.slice(name, i).astype(np.int64))[None]
            for name in ("input_ids", "target_ids")
        )
        counts.append(labels.shape[1])
        sums.append(model(input_ids=ids, labels=labels).loss.item() * counts[-1])
    assert result.count == count_items("seq2seq", batch) == sum(counts)
    assert result.loss.item() == pytest.approx(sum(sums), rel=1e-5)
    assert result.row_loss.tolist() == pytest.approx(sums, rel=1e-4)
