"""Predictions, the lower bound, the matrix and generation, against naive loops."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cfm_train.backbone.load import Backbone
from cfm_train.bricks.heads import Head, pool
from cfm_train.data.encode import Encoded
from cfm_train.evaluation import judge as judging
from cfm_train.evaluation.evaluator import Answers, predict
from cfm_train.evaluation.floor import train_head
from cfm_train.evaluation.generation import answer_texts
from cfm_train.evaluation.judge import judge
from cfm_train.evaluation.matrix import REFITTED, cells_of, figures_of, heads_of, row
from cfm_train.evaluation.scorer import Body, Scorer
from cfm_train.evaluation.shelf import Shelf
from cfm_train.training.samples import show
from cfm_train.training.task_head import new_head
from tests.backbones import plain_model, randomise, tiny
from tests.tasks import TRAINER, task_data
from tests.training.runs import new_brick, train

SETTINGS = {"bootstrap": 0, "head_only": False}


def test_pooling_leaves_padding_out() -> None:
    """Padding on either side; every row by hand."""
    states = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 1, 1], [0, 1, 1, 1, 0]])
    kept = [states[i][m.bool()] for i, m in enumerate(mask)]
    for name, take in (
        ("mean", lambda x: x.mean(0)),
        ("last", lambda x: x[-1]),
        ("first", lambda x: x[0]),
    ):
        torch.testing.assert_close(pool(states, mask, name), torch.stack([take(x) for x in kept]))
    assert torch.equal(pool(states, mask, "none"), states)


@pytest.mark.parametrize(
    ("family", "task"),
    [
        *itertools.product(
            ("bert", "llama"), ("classification", "multilabel", "regression", "token")
        )
    ],
)
def test_predictions_do_not_depend_on_batches(family: str, task: str) -> None:
    backbone = tiny(family)
    data = task_data(backbone, task)
    brick = new_brick(backbone, {task: data}, "lora")
    randomise(brick, 3, 0.3)
    head = brick.eval().head_for(task)
    with backbone.slots.plugged([brick]), torch.inference_mode():
        ways = [
            predict(backbone, head, data.spec, data.train, tokens_per_batch=n)
            for n in (1, 60, 9999)
        ]
        naive = []
        for i in range(len(data.train)):
            ids = torch.tensor(data.train.slice("input_ids", i).astype(np.int64))[None]
            naive.append(head(backbone.hidden_states(ids), torch.ones_like(ids))[0])
    for answers in ways:
        assert sorted(answers.predictions) == list(range(len(data.train)))
        for i, logits in enumerate(naive):
            found = answers.predictions[i]
            if task == "classification":
                assert found == logits.argmax().item()
            elif task == "regression":
                assert found == pytest.approx(logits.item(), abs=1e-5)
            elif task == "multilabel":
                assert found.tolist() == (logits > 0).int().tolist()
            else:
                kept = data.train.slice("token_labels", i) != -100
                assert found.tolist() == logits.argmax(-1)[torch.from_numpy(kept)].tolist()
        assert answers.loss() == pytest.approx(ways[0].loss(), rel=1e-5)


@pytest.mark.parametrize("task", ["classification", "token", "regression"])
def test_the_floor_is_the_head_trained_on_the_running_backbone(task: str, tmp_path: Path) -> None:
    """Features kept, or computed at every step: the same head, with the same budget."""
    backbone = tiny("bert")
    data = task_data(backbone, task)
    options: dict[str, Any] = {"max_steps": 15, "accumulate": 2, "validate_every": 4, "clip": 0.1}
    options |= {"weight_decay": 0.1}
    brick = new_brick(backbone, {task: data}, "head", seed=3)
    train(backbone, brick, {task: data}, tmp_path / "run", seed=3, **options)
    head = train_head(backbone, data, {**TRAINER, **options}, seed=3)
    for a, b in zip(head.parameters(), brick.head_for(task).parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert (head.linear.weight - new_head(backbone, data, 3).linear.weight).abs().max() > 0.01


def constant(label: int) -> Head:
    """A head that says one label to everything."""
    head = Head("classification", ["no", "yes"], 32, "mean")
    torch.nn.init.zeros_(head.linear.weight)
    with torch.no_grad():
        head.linear.bias[label] = 1
    return head


def test_cells_use_the_right_heads() -> None:
    """Own head first, then that of the task's own brick, and a refitted one says so."""
    backbone = tiny("bert")
    data = task_data(backbone, "classification")
    share = float(np.mean(data.test.arrays["labels"] == 1))
    yes, no, several, none = (new_brick(backbone, {}, "lora") for _ in range(4))
    yes.add_head("classification", constant(1))
    no.add_head("classification", constant(0))
    several.add_head("classification", constant(0))
    several.add_head("other", constant(0))
    bodies = {
        name: Body(name, brick, name, "brick")
        for name, brick in {"yes": yes, "no": no, "several": several, "none": none}.items()
    }
    heads = heads_of([bodies["several"], bodies["yes"]])
    assert heads["classification"] == (yes.head_for("classification"), "yes")
    assert heads["other"] == (several.head_for("other"), "several")
    scorer = Scorer(
        backbone,
        {"classification": data},
        {"classification": {"train": "a", "test": "b"}},
        tokenizer="c",
        trainer={**TRAINER, "max_steps": 2},
        evaluation=SETTINGS,
        seed=0,
        shelf=Shelf(None),
    )

    def cell(name: str, given: Any) -> dict[str, Any]:
        scored = row(scorer, bodies[name], ["classification"], given)
        figures, cells = figures_of(scored), cells_of(scored)
        assert figures["test/classification/accuracy"]["value"] == cells[0]["value"]
        return cells[0]

    assert cell("yes", heads)["value"] == pytest.approx(share)
    assert cell("no", heads)["value"] == pytest.approx(1 - share)
    assert cell("several", heads)["value"] == pytest.approx(1 - share)
    assert cell("none", heads)["value"] == pytest.approx(share)
    assert cell("none", heads)["metric"] == "accuracy"
    assert [cell(name, heads)["head"] for name in ("yes", "no", "none")] == ["yes", "no", "yes"]
    assert cell("none", {})["head"] == REFITTED
    assert cell("none", {})["metric"] == f"accuracy ({REFITTED})"


def test_the_unplugged_check_fails_where_something_stays() -> None:
    backbone = tiny("llama")
    data = task_data(backbone, "causal")
    left = new_brick(backbone, {}, "lora", sites=["attn.q"])
    randomise(left)
    left.eval()
    clean = judge(backbone, left, {"causal": data}, SETTINGS, seed=0)
    assert clean.unplugged["passed"] is True
    backbone.slots.plug([left])
    try:
        assert (
            judge(backbone, left, {"causal": data}, SETTINGS, seed=0).unplugged["passed"] is False
        )
    finally:
        backbone.slots.unplug()
    bare = judging.probe(backbone, {"causal": data})
    hook = backbone.model.lm_head.register_forward_hook(lambda m, i, o: o * 1.001)
    try:  # something that no plan knows of
        found = judge(backbone, left, {"causal": data}, SETTINGS, seed=0, bare=bare)
        assert found.unplugged["passed"] is False
    finally:
        hook.remove()


def naive_texts(backbone: Backbone, encoded: Encoded, rows: range, family: str) -> list[str]:
    """Row by row through transformers' own ``generate``, without any padding."""
    model, said = plain_model(family), []
    for i in rows:
        ids = encoded.slice("input_ids", i).astype(np.int64)
        if family != "t5":
            ids = ids[: int(encoded.arrays["answer_starts"][i])]
        written = model.generate(
            input_ids=torch.tensor(ids)[None],
            attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
            max_new_tokens=20,
            do_sample=False,
            pad_token_id=0,
        )[0]
        new = written if family == "t5" else written[len(ids) :]
        said.append(backbone.tokenizer.decode(new, skip_special_tokens=True).strip())
    return said


@pytest.mark.parametrize(
    ("family", "task"), [("llama", "instruct"), ("gpt2", "instruct"), ("t5", "seq2seq")]
)
def test_generation_equals_row_by_row(family: str, task: str) -> None:
    """Decoders are padded on the left, encoders on the right: neither changes a word."""
    backbone = tiny(family)
    data = task_data(backbone, task)
    rows = range(6)
    found = answer_texts(backbone, data.spec, data.test, rows, limit=20)
    alone = [answer_texts(backbone, data.spec, data.test, [i], limit=20)[0] for i in rows]
    shown = show(backbone, data.spec, data.test, Answers(data.spec), 2)
    assert [sample["right"] for sample in shown] == [None, None], "no text is right or wrong"
    naive = naive_texts(backbone, data.test, rows, family)
    for (said, right), (one, _), plain, i in zip(found, alone, naive, rows, strict=True):
        words = max(len(said.split()), 1)
        assert plain.split()[:words] == said.split() or (not said and not plain), i
        assert one.split() == said.split()[: len(one.split())]
        assert right == data.test.row(i).get("target", right)
    assert len({len(data.test.slice("input_ids", i)) for i in rows}) > 1
