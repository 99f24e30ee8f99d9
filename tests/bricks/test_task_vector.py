"""Task vectors: what demonstrations leave behind, by the model's own states and on real data."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from cfm_train.backbone.load import Backbone, load_backbone
from cfm_train.backbone.spec import resolve
from cfm_train.bricks.brick import parameter_name
from cfm_train.bricks.demonstrations import (
    Example,
    answer_loss,
    common_ending,
    draw_contexts,
    ends_here,
    examples,
)
from cfm_train.bricks.task_vector import TaskVector
from cfm_train.data.encode import Encoded, TaskData
from cfm_train.data.encoders import Settings, encode_instruct
from cfm_train.data.tasks import TaskSpec
from cfm_train.errors import UserError
from tests import brick_laws as laws
from tests.backbones import batch, tiny

SPEC = TaskSpec("toy", "instruct", None, "loss", False, ("text",))
HYPER: dict[str, Any] = {
    "demonstrations": 3,
    "contexts": 4,
    "mode": "add",
    "strength": 1.0,
    "layers": None,
    "validation_rows": 20,
}
#: ``question = answer``, one line for each turn.
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }} ={% else %}"
    "{{ ' ' + m.content + '\n' }}{% endif %}{% endfor %}"
)


def split(backbone: Backbone, pairs: list[tuple[str, str]]) -> Encoded:
    rows = [
        {
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ],
            "_at": f"rows:{i}",
        }
        for i, (question, answer) in enumerate(pairs)
    ]
    settings = Settings(max_length=128, target_max_length=16, pack=False)
    arrays, _ = encode_instruct(rows, SPEC, backbone.tokenizer, settings)
    return Encoded(arrays, rows, 0, 128)


def toy(backbone: Backbone, validation: bool = True) -> TaskData:
    """Two words in, the first of them out."""
    words = [f"w{i}" for i in range(10, 20)]
    pairs = [(f"{a} {b}", a) for a, b in itertools.permutations(words, 2)]
    held = split(backbone, pairs[:12]) if validation else None
    return TaskData(SPEC, split(backbone, pairs[12:]), held, None)


def vector(backbone: Backbone, **changed: Any) -> TaskVector:
    return TaskVector(**HYPER | changed).build(backbone)


def held(backbone: Backbone, token: int | None = None) -> TaskVector:
    """A vector that acts on a token: the one that the laws' first row has in the middle."""
    token = int(batch(backbone)["input_ids"][0, 3]) if token is None else token
    noise = torch.randn(backbone.hidden_size, generator=torch.manual_seed(0))
    return vector(backbone).hold("layer.1", noise, [token])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
class TestLaws:
    def test_starts_as_identity(self, family: str) -> None:
        laws.starts_as_identity(vector, family)

    def test_unplugs_exactly(self, family: str) -> None:
        laws.unplugs_exactly(held, family)

    def test_rows_are_their_own(self, family: str) -> None:
        laws.rows_are_their_own(held, family)

    def test_round_trips(self, family: str) -> None:
        laws.round_trips(held, family)
        laws.round_trips(vector, family)

    def test_generates_with_a_cache(self, family: str) -> None:
        def on_the_last_token(backbone: Backbone) -> TaskVector:
            return held(backbone, int(batch(backbone, length=6)["input_ids"].clamp_min(3)[0, -1]))

        laws.generates_with_a_cache(on_the_last_token, family)


def test_ends_of_prompts_are_found_in_token_ids() -> None:
    rows = [Example(prompt, (1,), ()) for prompt in ((4, 5, 9, 8), (7, 9, 8), (9, 9, 8))]
    assert common_ending(rows) == (9, 8)
    assert common_ending([*rows, Example((3, 4), (1,), ())]) == ()
    ids = torch.tensor([[9, 8, 3, 9, 8, 0], [8, 9, 9, 8, 8, 9]])
    ending = torch.tensor([9, 8])
    assert ends_here(ids, ending).nonzero().tolist() == [[0, 1], [0, 4], [1, 3]]
    assert not ends_here(ids[:, :1], ending).any()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_vector_is_the_mean_of_the_models_own_states(family: str) -> None:
    """Against transformers' ``output_hidden_states``, for both modes."""
    backbone = tiny(family)
    rows = examples(toy(backbone).train)
    contexts = draw_contexts(rows, 3, 4, backbone, seed=5)
    layer = "layer.0"

    def mean(texts: list[list[int]]) -> torch.Tensor:
        states = [
            backbone.model(torch.tensor([ids]), output_hidden_states=True).hidden_states[1][0, -1]
            for ids in texts
        ]
        return torch.stack(states).mean(dim=0)

    shown, alone = mean([c.shown for c in contexts]), mean([c.alone for c in contexts])
    found = vector(backbone, mode="replace")._vectors(backbone, contexts, [layer])[layer]
    torch.testing.assert_close(found, shown, atol=1e-6, rtol=1e-5)
    found = vector(backbone, strength=3.0)._vectors(backbone, contexts, [layer])[layer]
    torch.testing.assert_close(found, 3 * (shown - alone), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", ["replace", "add"])
def test_at_the_last_layer_one_context_is_reproduced_exactly(mode: str) -> None:
    """What the last layer says on the last token decides the logits: with it, as if shown."""
    backbone = tiny("llama")
    rows = examples(toy(backbone).train)
    ending = common_ending(rows)
    context = draw_contexts(rows, 3, 1, backbone, seed=5)[0]
    brick = vector(backbone, mode=mode)
    brick.hold("layer.1", brick._vectors(backbone, [context], ["layer.1"])["layer.1"], ending)
    shown = backbone.logits(input_ids=torch.tensor([context.shown]))[0, -1]
    bare = backbone.logits(input_ids=torch.tensor([context.alone]))[0, -1]
    with backbone.slots.plugged([brick]):
        found = backbone.logits(input_ids=torch.tensor([context.alone]))[0]
    torch.testing.assert_close(found[-1], shown, atol=1e-5, rtol=1e-5)
    assert (found[-1] - bare).abs().max() > 1e-2


@pytest.mark.parametrize("validation", [True, False])
def test_the_layer_that_helps_validation_rows_most_is_kept(validation: bool) -> None:
    backbone = tiny("llama")
    task = toy(backbone, validation)
    brick = vector(backbone)
    derived = brick.fit_without_training(backbone, {"toy": task}, seed=3)
    assert list(derived.scores) == ["without", "layer.0", "layer.1"]
    best = min(("layer.0", "layer.1"), key=derived.scores.__getitem__)
    assert brick.site_names == (best,)
    assert derived.rows == 16 and derived.tokens > 0
    if task.validation is not None:
        rows = [(row.prompt, row.answer) for row in examples(task.validation)]
        assert answer_loss(backbone, rows) == pytest.approx(derived.scores["without"], rel=1e-6)
        with backbone.slots.plugged([brick]):
            assert answer_loss(backbone, rows) == pytest.approx(derived.scores[best], rel=1e-6)
    again = vector(backbone)
    again.fit_without_training(backbone, {"toy": task}, seed=3)
    assert again.files() == brick.files() and again.interface() == brick.interface()


def test_answer_loss_is_that_of_transformers() -> None:
    backbone = tiny("gpt2")
    rows = [(row.prompt, row.answer) for row in examples(toy(backbone).train)[:20]]
    total, count = 0.0, 0
    for prompt, answer in rows:
        ids = torch.tensor([[*prompt, *answer]])
        labels = ids.clone()
        labels[:, : len(prompt)] = -100
        total += backbone.model(ids, labels=labels).loss.item() * len(answer)
        count += len(answer)
    assert answer_loss(backbone, rows) == pytest.approx(total / count, rel=1e-5)


def test_what_it_cannot_be_made_from_is_refused_with_a_sentence() -> None:
    with pytest.raises(UserError, match="is none \\(encoder\\): choose lora"):
        vector(tiny("bert"))
    with pytest.raises(UserError, match="is none \\(encoder-decoder\\)"):
        vector(tiny("t5"))
    backbone = tiny("llama")
    task = toy(backbone)
    other = TaskData(TaskSpec("sst2", "classification", ("a", "b"), "accuracy", True, ("text",)),
                     task.train, None, None)  # fmt: skip
    for tasks, sentence in (
        ({"sst2": other}, "a task of type classification"),
        ({"a": task, "b": task}, "has 2 tasks"),
    ):
        with pytest.raises(UserError, match=sentence):
            vector(backbone).fit_without_training(backbone, tasks, 0)
    with pytest.raises(UserError, match="needs more training rows than that"):
        vector(backbone, demonstrations=90).fit_without_training(backbone, {"toy": task}, 0)
    with pytest.raises(UserError, match="are trained, not derived"):
        from cfm_train.bricks.head import HeadOnly

        HeadOnly().build(backbone).fit_without_training(backbone, {"toy": task}, 0)


def test_beats_the_bare_model_on_a_real_one(shared: Path) -> None:
    """A language model of 7 M parameters that is to repeat the second of two words.

    It has never seen the format: alone it loses 3.8 nats per token, with the vector 2.5, on rows
    that were used for nothing else.
    """
    section = {"id": "lm", "package": None, "path": str(shared / "models" / "domain-lm-7m")}
    backbone = load_backbone(resolve(section | {"revision": None, "sha256": None}), dtype="float32")
    backbone.tokenizer.chat_template = TEMPLATE
    words = [
        *("dog", "cat", "ball", "tree", "house", "car", "bird", "fish"),
        *("boy", "girl", "sun", "hat", "box", "cake", "toy", "bed"),
    ]
    pairs = [(f"{a} {b}", b) for a, b in itertools.permutations(words, 2)]
    pairs = [pairs[i] for i in torch.randperm(len(pairs), generator=torch.manual_seed(0)).tolist()]
    task = TaskData(SPEC, split(backbone, pairs[:100]), split(backbone, pairs[100:140]), None)
    brick = TaskVector(8, 16, "add", 2.0, None, 40).build(backbone)
    derived = brick.fit_without_training(backbone, {"toy": task}, seed=0)
    assert brick.site_names[0] == min(list(derived.scores)[1:], key=derived.scores.__getitem__)
    test = [(row.prompt, row.answer) for row in examples(split(backbone, pairs[140:]))]
    before = answer_loss(backbone, test)
    with backbone.slots.plugged([brick]):
        after = answer_loss(backbone, test)
    assert after < before - 0.7
    # The other way round it leads away from the task.
    away = TaskVector(8, 16, "add", -2.0, None, 40).build(backbone)
    site = brick.site_names[0]
    away.hold(site, -brick.vectors[parameter_name(site)], brick.ending.tolist())
    with backbone.slots.plugged([away]):
        assert answer_loss(backbone, test) > before
