"""Facts computed from vectors: the laws, plain transformers beside them, adding and taking out."""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cfm_train.backbone.load import Backbone
from cfm_train.bricks.brick import parameter_name
from cfm_train.bricks.encoded_rows import EncodedRows
from cfm_train.bricks.fact_gate import Encoder
from cfm_train.bricks.map import Map
from cfm_train.bricks.mention import mentioned
from cfm_train.data.facts import Fact
from cfm_train.errors import UserError
from cfm_train.knowledge.calibrating import calibrate
from cfm_train.knowledge.fact_figures import generate, judge
from cfm_train.knowledge.teach import prompt_ids
from tests import brick_laws as laws
from tests.backbones import answers, bare, batch, plain_model, randomise, section, tiny
from tests.fact_cases import FACTS, TOLD, solo

KINDS: dict[str, Any] = {
    "encoded_rows": lambda: EncodedRows(rows=2, told="answer", sites=["attn"], layers=None),
    "map": lambda: Map(tokens=2, told="statement"),
}
NEW = {"subject": "w6", "prompt": "w6 w10 w11", "answer": "w26", "paraphrases": ["w12 w6 w10"]}


@functools.cache
def encoder() -> Encoder:
    return Encoder(section("bert"))


def made(kind: str, backbone: Backbone, facts: list[dict[str, Any]] = FACTS) -> Any:
    return KINDS[kind]().for_facts(facts).read(encoder()).build(backbone)


def acting(kind: str, backbone: Backbone, facts: list[dict[str, Any]] = FACTS) -> Any:
    """A brick that does something, as it is in use."""
    brick = made(kind, backbone, facts)
    randomise(brick, scale=0.1)
    return brick.eval().requires_grad_(False)


def named(backbone: Backbone) -> dict[str, Tensor]:
    """Four rows, padded on the right; the second fact's, none's, the first's and the third's."""
    inputs = batch(backbone, rows=4)
    for row, subject in ((0, "w4"), (2, "w3"), (3, "w5")):
        inputs["input_ids"][row, 2] = int(subject[1:])
    return inputs


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", KINDS)
class TestLaws:
    def test_unplugs_exactly(self, kind: str, family: str) -> None:
        for dtype in ("float32", "bfloat16"):
            backbone = tiny(family, dtype)
            brick, inputs = acting(kind, backbone), named(backbone)
            brick.fire(torch.tensor([1, -1, 0, 2]))
            before, checksum = bare(backbone, inputs), backbone.checksum()
            changed = laws.plugged(backbone, [brick], inputs)
            assert changed.dtype == before.dtype and (changed - before).abs().max() > 1e-3
            assert torch.equal(bare(backbone, inputs), before) and backbone.checksum() == checksum

    def test_one_fact_for_each_row(self, kind: str, family: str) -> None:
        backbone = tiny(family)
        brick, inputs = acting(kind, backbone), named(backbone)
        solo(brick, backbone, inputs)
        brick.fire(torch.tensor([-1, -1, -1, -1]))
        assert torch.equal(laws.plugged(backbone, [brick], inputs), bare(backbone, inputs))

    def test_only_the_maps_learn(self, kind: str, family: str) -> None:
        backbone = tiny(family)
        brick = made(kind, backbone).train()
        brick.fire(torch.tensor([1, -1, 0, 2]))
        with backbone.slots.plugged([brick]):
            answers(backbone, named(backbone)).square().mean().backward()
        for name, value in brick.named_parameters():
            assert value.grad is not None and value.grad.abs().sum() > 0, name
        assert all(p.grad is None for p in backbone.parameters())

    def test_saved_taken_out_and_added(self, kind: str, family: str) -> None:
        """Round trip to the bit; `only` and `with_more` leave the others to the bit."""
        backbone = tiny(family)
        brick, inputs = acting(kind, backbone), named(backbone)
        brick.gate = calibrate(TOLD, encoder(), false_fires=0.0, threshold=-1.0).gate

        def said(one: Any, facts: list[int]) -> Tensor:
            one.fire(torch.tensor(facts))
            found = laws.plugged(backbone, [one], inputs)
            one.fire(None)
            return found

        whole = said(brick, [1, -1, 0, 2])
        interface = json.loads(json.dumps(brick.interface()))
        again = type(brick).restore(interface, brick.files(), backbone).eval()
        again.requires_grad_(False)
        assert torch.equal(said(again, [1, -1, 0, 2]), whole)
        assert again.files() == brick.files() and again.interface() == brick.interface()
        assert again.needs() == [encoder().fingerprint]

        less = brick.only([0, 2], backbone).eval().requires_grad_(False)
        assert torch.equal(said(less, [-1, -1, 0, 1])[2:], whole[2:])
        assert torch.equal(less.mean, brick.mean)  # of what was taught, not of what is left

        more = again.with_more([NEW], encoder(), backbone).eval().requires_grad_(False)
        assert torch.equal(said(more, [1, -1, 0, 2]), whole)
        assert [fact["subject"] for fact in more.facts] == ["w3", "w4", "w5", "w6"]
        assert more.gate.find(["w6 w10 w11", "w3 w10 w11", "w50"]) == [3, 0, -1]
        inputs["input_ids"][1, 2] = 6
        assert (said(more, [1, 3, 0, 2])[1] - bare(backbone, inputs)[1]).abs().max() > 1e-3
        # To read it later comes to what it would have been, had it been read at once.
        at_once = made(kind, backbone, [*FACTS, NEW]).eval()
        assert torch.equal(at_once.vectors, more.vectors)

    def test_generation_keeps_its_fact(self, kind: str, family: str) -> None:
        """With a cache, what is written equals passes over the whole text without one."""
        backbone = tiny(family)
        brick = acting(kind, backbone)
        prompts = ["w4 w10 w11", "w50 w10 w11", "w3 w10 w11"]
        fired = torch.tensor([1, -1, 0])
        said = generate(backbone, brick, prompts, fired.tolist(), 4)
        ids = torch.tensor([prompt_ids(backbone, text) for text in prompts])
        start = ids.shape[1]
        brick.fire(fired)
        with backbone.slots.plugged([brick]), torch.inference_mode():
            for _ in range(4):
                new = backbone.model(ids, use_cache=False).logits[:, -1].argmax(-1)
                ids = torch.cat([ids, new[:, None]], dim=1)
        whole = backbone.tokenizer.batch_decode(ids[:, start:], skip_special_tokens=True)
        assert all(other.startswith(one) for one, other in zip(said, whole, strict=True))
        assert any(said)
        brick.fire(None)


def entry(brick: Any, fact: int, part: int) -> Tensor:
    """What a map reads of a fact, written out."""
    text = {"prompt": "{prompt}", "answer": "{answer}", "statement": "{prompt} {answer}."}
    words = text[brick.parts()[part]]
    vectors = encoder().encode([words.format(**one) for one in FACTS]).half().float()
    deviation = (vectors - vectors.mean(0)).double().square().mean().sqrt().float()
    return (vectors[fact] - vectors.mean(0)) / deviation


def test_rows_are_keys_and_values_of_a_plain_cache() -> None:
    """Against transformers alone: affine maps by hand, put into a cache of its own.

    Row 0 sees the second fact; real tokens keep the positions that they have without rows.
    """
    from transformers import DynamicCache

    backbone, plain = tiny("llama"), plain_model("llama")
    plain.set_attn_implementation("eager")
    brick = acting("encoded_rows", backbone)
    cache = DynamicCache()
    for layer, name in enumerate(brick.site_names):
        key = parameter_name(name)
        states = [
            (maps[key].weight @ entry(brick, 1, part) + maps[key].bias).reshape(2, 2, 8)
            for part, maps in enumerate((brick.keys, brick.values))
        ]
        cache.update(*(one.transpose(0, 1)[None] for one in states), layer)
    ids = torch.tensor([[4, 10, 11, 20]])
    with torch.no_grad():
        expected = plain(
            input_ids=ids,
            past_key_values=cache,
            attention_mask=torch.ones(1, 6, dtype=torch.int64),
            position_ids=torch.arange(4)[None],
        ).logits
        brick.fire(torch.tensor([1]))
        with backbone.slots.plugged([brick]):
            found = backbone.logits(input_ids=ids)
        without = plain(input_ids=ids).logits
    assert (expected - without).abs().max() > 1e-2
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_without_a_gate_attention_chooses_among_all_rows() -> None:
    backbone = tiny("llama")
    brick = acting("encoded_rows", backbone)
    inputs = batch(backbone)
    brick.fire(torch.tensor([0, 1, -1, 0]))
    assert brick.members(brick.hyper["rows"], 4).sum(1).tolist() == [2, 2, 0, 2]
    brick.fire(None)
    assert bool(brick.members(brick.hyper["rows"], 4).all())
    assert (laws.plugged(backbone, [brick], inputs) - bare(backbone, inputs)).abs().max() > 1e-3


def test_a_map_adds_to_the_embeddings_of_each_mention() -> None:
    """Against transformers alone, given embeddings: two mentions, one at the very start."""
    backbone, plain = tiny("llama"), plain_model("llama")
    brick = acting("map", backbone)
    ids = torch.tensor([[4, 10, 4, 11, 20], [4, 10, 30, 11, 20], [30, 31, 32, 33, 4]])
    embeddings = plain.get_input_embeddings()(ids).detach()
    last = (brick.affine.weight @ entry(brick, 1, 0) + brick.affine.bias).reshape(2, -1)[1]
    for row, token in ((0, 0), (0, 2), (2, 4)):  # mentions of one token: the last embedding alone
        embeddings[row, token] += last
    brick.fire(torch.tensor([1, -1, 1]))
    with torch.no_grad(), backbone.slots.plugged([brick]):
        found = backbone.logits(input_ids=ids)
        expected = plain(inputs_embeds=embeddings).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    # Without a gate a fact acts wherever its subject stands; here it does so in all rows.
    brick.fire(None)
    embeddings[1, 0] += last
    with torch.no_grad(), backbone.slots.plugged([brick]):
        found = backbone.logits(input_ids=ids)
        expected = plain(inputs_embeds=embeddings).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_a_mention_of_several_tokens_takes_several_embeddings() -> None:
    backbone = tiny("llama")
    told = [{**FACTS[0], "subject": "w3 w10", "paraphrases": []}]
    brick = acting("map", backbone, told)
    ids = torch.tensor([[30, 3, 10, 11], [3, 10, 11, 12]])
    brick.fire(torch.tensor([0, 0]))
    with torch.no_grad():
        y = backbone.model.get_input_embeddings()(ids)
        with backbone.slots.plugged([brick]):
            added = backbone.model.get_input_embeddings()(ids) - y
        both = brick.mapped(brick.affine, 0)[0].reshape(2, -1)
    expected = torch.zeros_like(y)
    expected[0, 1:3], expected[1, 0:2] = both, both
    torch.testing.assert_close(added, expected, atol=1e-6, rtol=0)


def test_a_mention_is_found_among_pieces_of_words() -> None:
    """As whole words, by a tokenizer whose tokens are characters; padding stands for nothing."""

    class Characters:
        def decode(self, ids: Any, skip_special_tokens: bool) -> str:
            return "".join(map(chr, filter(None, ids)))

    text = "Is  LYON in Lyons? Lyon"
    ids = [0, 0, *map(ord, text)]
    spans = mentioned(Characters(), ids, "lyon")
    assert ["".join(map(chr, ids[a : b + 1])).strip() for a, b in spans] == ["LYON", "Lyon"]
    assert mentioned(Characters(), ids, "Paris") == []


@pytest.mark.parametrize("kind", KINDS)
def test_what_it_is_computed_from_must_be_there(kind: str) -> None:
    backbone = tiny("llama")
    with pytest.raises(UserError, match=f"recipe=knowledge/facts brick={kind}"):
        KINDS[kind]().build(backbone)
    brick = acting(kind, backbone)
    interface = brick.interface()
    with pytest.raises(UserError, match="2 facts and 3 vectors"):
        type(brick).restore({**interface, "facts": FACTS[:2]}, brick.files(), backbone)
    from safetensors.torch import save

    with pytest.raises(UserError, match="no vectors"):
        type(brick).restore(interface, {"brick.safetensors": save({"x": torch.ones(1)})}, backbone)


def test_a_map_of_vectors_that_are_given() -> None:
    """They are brought to unit length, no encoder is asked for, and more can be added."""
    backbone, given = tiny("llama"), torch.tensor([[3.0, 4, 0], [0, 0, 2], [1, 2, 2]])
    brick: Any = Map(tokens=1, told="vector").for_facts(FACTS).read(None, given).build(backbone)
    randomise(brick, scale=0.1)
    brick.eval().requires_grad_(False)
    unit = torch.tensor([[0.6, 0.8, 0], [0, 0, 1], [1 / 3, 2 / 3, 2 / 3]])
    torch.testing.assert_close(brick.vectors[:, 0].float(), unit, atol=1e-3, rtol=0)
    assert brick.needs() == [] and brick.interface()["width"] == 3
    again = Map.restore(json.loads(json.dumps(brick.interface())), brick.files(), backbone)
    more = again.with_more([NEW], None, backbone, torch.tensor([[0.0, 5, 0]]))
    assert torch.equal(more.vectors[:3], brick.vectors)
    assert more.vectors[3, 0].tolist() == [0, 1, 0]


def test_given_vectors_may_be_of_any_size() -> None:
    given = torch.tensor([[3e300, 4e300], [3e-300, 4e-300], [3, 4]], dtype=torch.float64)
    brick: Any = Map(tokens=1, told="vector").for_facts(FACTS).read(None, given)
    assert brick.vectors.isfinite().all()
    assert torch.equal(brick.vectors, brick.vectors[2:].expand(3, 1, 2))


def test_new_facts_are_judged_beside_those_that_are_there() -> None:
    """A fact that is nearer to a prompt takes it, whichever of them is new."""
    backbone, brick = tiny("llama"), acting("map", tiny("llama"))
    brick.gate = calibrate(TOLD, encoder(), false_fires=0.0, threshold=-1.0).gate
    own, taken = "w3 w30 w31", TOLD[0].prompt
    new = Fact("w3", own, "w26", held_out=(taken,))
    more = brick.with_more([new.taught()], encoder(), backbone).eval().requires_grad_(False)
    figures, samples = judge(
        backbone, more, [*TOLD, new], unrelated=None, bootstrap=5, seed=0, first=len(TOLD)
    )
    assert figures["prompt/gate finds the fact"]["value"] == 1
    assert figures["prompt/gate finds the fact"]["n"] == 1
    assert figures["held_out/gate finds the fact"]["value"] == 0
    assert [one["input"] for one in samples] == [own, taken]


def test_a_stored_gate_opens_its_encoder_wherever_it_is_asked() -> None:
    backbone, brick = tiny("llama"), acting("map", tiny("llama"))
    brick.gate = calibrate(TOLD, encoder(), false_fires=0.0, threshold=-1.0).gate
    inputs = named(backbone)
    expected = laws.plugged(backbone, [brick], inputs)
    again = Map.restore(json.loads(json.dumps(brick.interface())), brick.files(), backbone)
    again.eval().requires_grad_(False)
    with torch.inference_mode():
        assert torch.equal(laws.plugged(backbone, [again], inputs), expected)
    assert not next(again.gate.encoder.model.parameters()).is_inference()


def test_maps_start_as_they_should() -> None:
    """A new map changes nothing; new rows are those of random tokens, whatever the fact."""
    backbone = tiny("llama")
    inputs = named(backbone)
    brick = made("map", backbone).eval()
    brick.fire(torch.tensor([1, -1, 0, 2]))
    assert torch.equal(laws.plugged(backbone, [brick], inputs), bare(backbone, inputs))
    rows = made("encoded_rows", backbone).eval()
    key = parameter_name(rows.site_names[0])
    keys = rows.mapped(rows.keys[key], 0)
    assert torch.equal(keys, keys[:1].expand_as(keys)) and keys.abs().sum() > 0
    assert isinstance(rows.keys[key], nn.Linear)
