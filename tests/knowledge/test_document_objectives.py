"""What is minimised: by value against plain loops in float64, and what has to be zero."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cfm_train.data.tasks import IGNORED
from cfm_train.errors import UserError
from cfm_train.knowledge.distractors import Distractors
from cfm_train.knowledge.objectives.objective import (
    Learning,
    divergence,
    drift,
)
from cfm_train.library.card import check_name
from cfm_train.training.objectives import BESIDE, count_items
from tests.backbones import plain_model, tiny
from tests.knowledge.handbooks import documents
from tests.knowledge.learning import (
    batch_of,
    cartridge,
    learning_on,
    lora,
    objective,
    reader_on,
)
from tests.training.runs import train


def log_p(model: Any, ids: list[int]) -> Tensor:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0]
    return torch.log_softmax(logits.double(), dim=-1)


def test_divergence_is_a_plain_loop_in_float64() -> None:
    teacher, student = torch.randn(2, 3, 7), torch.randn(2, 3, 7)
    targets = torch.tensor([[4, IGNORED, 1], [IGNORED, 0, IGNORED]])
    total, rows = 0.0, [0.0, 0.0]
    for row in range(2):
        for place in range(3):
            if targets[row, place] == IGNORED:
                continue
            p = torch.softmax(teacher[row, place].double(), 0)
            q = torch.softmax(student[row, place].double(), 0)
            value = sum(float(a * (a.log() - b.log())) for a, b in zip(p, q, strict=True))
            total, rows[row] = total + value, rows[row] + value
    found = divergence(teacher, student, targets)
    assert found.loss.item() == pytest.approx(total, rel=1e-5)
    assert found.row_loss.tolist() == pytest.approx(rows, rel=1e-5)
    assert (found.count, found.row_count.tolist()) == (3, [2, 1])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_distillation_is_a_plain_loop_with_transformers(family: str, tmp_path: Path) -> None:
    """Teacher: the plain model on passage and row, one by one; student: the same with a LoRA."""
    backbone, plain = tiny(family), plain_model(family)
    distil = objective("distill", reader_on(backbone, tmp_path, passage=20))
    encoded, brick = distil.train_rows(), lora(backbone, noise=0.3)
    rows = [0, 3, len(encoded) - 1]  # sentences, and a question
    batch = batch_of(encoded, rows)
    with backbone.slots.plugged([brick]):
        found = distil.loss(backbone, batch)
        expected, count = 0.0, 0
        for row in rows:
            ids = encoded.slice("input_ids", row).tolist()
            context = encoded.slice("context_ids", row).tolist()
            labels = encoded.slice("token_labels", row)
            p = log_p(plain, context + ids)[len(context) :]
            with torch.no_grad():
                q = torch.log_softmax(
                    backbone.logits(input_ids=torch.tensor([ids]))[0].double(), dim=-1
                )
            for i in range(1, len(ids)):
                if labels[i] != IGNORED:
                    expected += float((p[i - 1].exp() * (p[i - 1] - q[i - 1])).sum())
                    count += 1
    assert expected > 1e-2
    assert found.loss.item() == pytest.approx(expected, rel=1e-4)
    assert found.count == count == count_items("causal", batch)


@pytest.mark.parametrize("kind", ["lora", "cartridge"])
def test_a_student_that_reads_the_passage_is_a_plain_loop(kind: str, tmp_path: Path) -> None:
    """Rows one by one behind their passage; only in training, and as often as was asked for."""
    backbone, plain = tiny("llama"), plain_model("llama")
    distil = objective("distill", reader_on(backbone, tmp_path, passage=20), with_text=1.0)
    encoded = distil.train_rows()
    brick = lora(backbone, noise=0.3) if kind == "lora" else cartridge(backbone, 1)
    rows = [0, 3, len(encoded) - 1]
    batch = batch_of(encoded, rows)
    with backbone.slots.plugged([brick]):
        found = distil.loss(backbone, batch, training=True)
        read = distil.tokens_read(batch)
        expected, count = 0.0, 0
        for row in rows:
            ids = encoded.slice("input_ids", row).tolist()
            context = encoded.slice("context_ids", row).tolist()
            labels = encoded.slice("token_labels", row)
            p = log_p(plain, context + ids)[len(context) :]
            with torch.no_grad():
                q = backbone.logits(input_ids=torch.tensor([context + ids]))[0].double()
            q = torch.log_softmax(q, dim=-1)[len(context) :]
            for i in range(1, len(ids)):
                if labels[i] != IGNORED:
                    expected += float((p[i - 1].exp() * (p[i - 1] - q[i - 1])).sum())
                    count += 1
        without = distil.loss(backbone, batch)
    assert expected > 1e-3
    assert found.loss.item() == pytest.approx(expected, rel=1e-4) and found.count == count
    assert found.loss.requires_grad
    assert without.loss.item() != pytest.approx(expected, rel=1e-2)
    # The teacher's pass over both, and the student's over the passage with gradients: 4N for 2N.
    passages = sum(len(encoded.slice("context_ids", row)) for row in rows)
    assert read == batch["tokens"] + passages + 2 * passages
    assert distil.tokens_read(batch) == batch["tokens"] + passages


def test_the_share_of_rows_with_text_is_drawn_by_micro_batch(tmp_path: Path) -> None:
    """The same for the same seed, and nothing is drawn where the share is 0."""
    backbone = tiny("llama")
    reader = reader_on(backbone, tmp_path)
    seen = dict.fromkeys((0.0, 0.3, 1.0), 0)
    for share in seen:
        distil = objective("distill", reader, with_text=share)
        batch = batch_of(distil.train_rows(), range(2))
        with backbone.slots.plugged([lora(backbone)]), torch.no_grad():
            for seed in range(60):
                torch.manual_seed(seed)
                distil.loss(backbone, batch, training=True)
                seen[share] += batch["shown"]
                torch.manual_seed(seed)
                assert float(torch.rand(())) >= share or batch["shown"]
    assert seen[0.0] == 0 and seen[1.0] == 60 and 8 <= seen[0.3] <= 28


def test_a_lora_learns_on_top_of_another(tmp_path: Path) -> None:
    """Beside a frozen one its loss is that of a model with the other's update in its weights."""
    backbone, plain = tiny("llama"), plain_model("llama")
    lm = objective("lm", reader_on(backbone, tmp_path))
    encoded, other, brick = lm.train_rows(), lora(backbone, noise=0.3), lora(backbone)
    other.eval().requires_grad_(False)
    for plug in other.plugs():
        weight = plain.get_submodule(backbone.sites[plug.site].module).weight
        with torch.no_grad():
            weight += plug.scale * plug.B @ plug.A
    rows = [i for i in range(len(encoded)) if int(encoded.slice("position_ids", i).max()) > 0][:2]
    learning, batch = Learning(lm, None, Distractors([other])), batch_of(encoded, rows)
    found = {}
    with backbone.slots.plugged([brick]):
        for seed in range(12):
            torch.manual_seed(seed)
            result = learning.loss(backbone, brick, batch, training=True)
            found[len(backbone.slots.plan)] = result.loss
        found[0] = learning.loss(backbone, brick, batch, training=False).loss
    logits = plain(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum"
    )
    assert set(found) == {0, 1, 2}
    assert found[2].item() == pytest.approx(expected.item(), rel=1e-5)
    assert found[1].item() == found[0].item() != pytest.approx(expected.item(), rel=1e-3)
    found[2].backward()
    assert all(p.grad is None for p in other.parameters())
    assert any(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in brick.parameters())


def test_a_teacher_without_context_teaches_nothing_new(tmp_path: Path) -> None:
    """A kind that starts as identity begins at loss 0, and only the brick gets gradients."""
    backbone = tiny("llama")
    distil = objective("distill", reader_on(backbone, tmp_path))
    batch = batch_of(distil.train_rows(), range(4))
    with backbone.slots.plugged([lora(backbone)]):
        assert distil.loss(backbone, batch).loss.item() > 0.1
        for key in ("context_ids", "context_mask"):
            del batch[key]
        assert distil.loss(backbone, batch).loss.item() == 0.0


def test_language_modelling_is_transformers_own_loss(tmp_path: Path) -> None:
    """Documents whole and answers alone, packed, against each piece in a pass of its own."""
    backbone, plain = tiny("llama"), plain_model("llama")
    reader = reader_on(backbone, tmp_path)
    lm = objective("lm", reader)
    encoded = lm.train_rows()
    found = lm.loss(backbone, batch_of(encoded, range(len(encoded))))
    end = backbone.tokenizer.eos_token_id
    expected, count = 0.0, 0
    whole = [*backbone.tokenizer(reader.documents.rows[0]["text"][0])["input_ids"], end]
    for begin in range(0, len(whole) - 1, 31):
        ids = whole[begin : begin + 32]
        p = log_p(plain, ids)
        expected -= sum(float(p[i - 1, ids[i]]) for i in range(1, len(ids)))
        count += len(ids) - 1
    for question in reader.documents.questions["train"]:
        ids = backbone.tokenizer(f"{question.prompt} {question.answer}")["input_ids"]
        p = log_p(plain, ids)
        start = len(backbone.tokenizer(question.prompt)["input_ids"])
        expected -= sum(float(p[i - 1, ids[i]]) for i in range(start, len(ids)))
        count += len(ids) - start
    assert found.count == count
    assert found.loss.item() == pytest.approx(expected, rel=1e-4)


def test_drift_is_zero_for_a_brick_that_does_nothing(tmp_path: Path) -> None:
    backbone = tiny("llama")
    rows = documents(tmp_path, seed=3).rows
    beside = reader_on(backbone, tmp_path).blocks(rows, [])
    batch = batch_of(beside, range(len(beside)), BESIDE)
    with backbone.slots.plugged([lora(backbone)]):
        assert drift(backbone, batch).loss.item() == 0.0
    with backbone.slots.plugged([lora(backbone, noise=0.3)]):
        found = drift(backbone, batch)
        assert found.loss.item() > 0.1
        assert found.loss.requires_grad


def test_a_brick_does_not_answer_for_what_stands_beside_it(tmp_path: Path) -> None:
    """One that does nothing drifts by nothing, whatever its distractors do to the text."""
    backbone = tiny("llama")
    reader = reader_on(backbone, tmp_path)
    beside = reader.blocks(documents(tmp_path, seed=3).rows, [])
    batch = batch_of(beside, range(len(beside)), BESIDE)
    nothing, other = lora(backbone), lora(backbone, noise=0.3)
    learning = Learning(objective("lm", reader, keep=1.0), beside, Distractors([other]))
    with backbone.slots.plugged([nothing]):
        for seed in range(8):  # alone, and before or after the other
            torch.manual_seed(seed)
            moved = learning.loss(backbone, nothing, batch, training=True).loss
            assert abs(moved.item()) < 1e-4
    with backbone.slots.plugged([other, nothing]):
        assert drift(backbone, batch).loss.item() > 0.1


def test_no_run_can_be_called_as_other_text_is() -> None:
    """Else its own rows would be held to the bare backbone in place of being learnt."""
    with pytest.raises(UserError, match="cannot name an artifact"):
        check_name(BESIDE)


def test_keeping_close_keeps_close(tmp_path: Path) -> None:
    """With a weight on it, unrelated text moves less for the same training."""
    backbone = tiny("llama")
    moved = {}
    for keep in (0.0, 20.0):
        learning, tasks = learning_on(backbone, tmp_path, "lm", 0, keep=keep)
        reader = learning.objective.reader
        rows = reader.blocks(reader.documents.unrelated["test"], [])
        brick = lora(backbone)
        settings = {"max_steps": 25, "validate_every": 25}
        train(backbone, brick, tasks, tmp_path / f"keep {keep}", learning=learning, **settings)
        with backbone.slots.plugged([brick]), torch.no_grad():
            moved[keep] = drift(backbone, batch_of(rows, range(len(rows)))).loss.item()
    assert moved[20.0] < 0.5 * moved[0.0]


def test_distractors_are_drawn_around_the_brick() -> None:
    """Any number of them, in any place, never the same one twice; the same for the same seed."""
    backbone = tiny("llama")
    others, brick = [cartridge(backbone, seed) for seed in (1, 2)], cartridge(backbone, 0)
    drawing = Distractors(others)
    seen = set()
    for seed in range(60):
        torch.manual_seed(seed)
        drawn = drawing.around(brick)
        torch.manual_seed(seed)
        assert drawn == drawing.around(brick)
        assert brick in drawn and len(set(map(id, drawn))) == len(drawn)
        seen.add(tuple(map(id, drawn)))
    assert len(seen) == 1 + 2 * 2 + 2 * 3  # alone; one other before or after; both in any order
