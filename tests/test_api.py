"""`cfm_train.load`: a transformers model that pipelines and `generate` take."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import pipeline

import cfm_train
from cfm_train.bricks.stored import store
from cfm_train.errors import UserError
from cfm_train.library.store import Library
from tests.backbones import folder, randomise, section, tiny
from tests.brick_laws import plugged
from tests.merging.merges import merged
from tests.tasks import task_data
from tests.training.runs import new_brick

TEXTS = ["w5 w6 w7", "w9", "w10 w11 w12 w13 w14 w15"]


def put(family: str, task: str, name: str, place: Path, seed: int = 1) -> str:
    """A random brick with a head in the library; its reference."""
    backbone = tiny(family)
    tasks = {task: task_data(backbone, task)} if task else {}
    brick = new_brick(backbone, tasks, "lora", seed=seed)
    randomise(brick, seed, 0.3)
    return store(brick.eval(), Library(place), backbone, name=name, operation="train").ref


def load(family: str, configuration: str | None, place: Path, **more: object):  # type: ignore[no-untyped-def]
    return cfm_train.load(
        section(family), configuration, library=str(place), dtype="float32", **more
    )


# An encoder with absolute positions is padded on the right alone.
@pytest.mark.parametrize(
    ("family", "side"), [("bert", "right"), ("gpt2", "left"), ("gpt2", "right")]
)
def test_text_classification(family: str, side: str, tmp_path: Path) -> None:
    """The pipeline's scores are those of the head on every row alone, wherever the padding is."""
    put(family, "classification", "mine", tmp_path)
    model = load(family, "mine", tmp_path)
    model.tokenizer.padding_side = side
    run = pipeline("text-classification", model=model, tokenizer=model.tokenizer, device="cpu")
    found = run(TEXTS, batch_size=3, top_k=None)
    for text, scores in zip(TEXTS, found, strict=True):
        ids = model.tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            shares = model(input_ids=ids).logits[0].softmax(-1)
        expected = dict(zip(("no", "yes"), shares.tolist(), strict=True))
        assert {s["label"]: pytest.approx(s["score"], abs=1e-5) for s in scores} == expected
    model.backbone.slots.unplug()
    with torch.inference_mode():
        bare = model(input_ids=ids).logits
        assert torch.equal(bare, model.head(tiny(family).hidden_states(ids), torch.ones_like(ids)))
    assert not torch.allclose(bare[0].softmax(-1), shares, atol=1e-4)


def test_token_classification_and_loss(tmp_path: Path) -> None:
    put("bert", "token", "tags", tmp_path)
    model = load("bert", "tags", tmp_path)
    run = pipeline("token-classification", model=model, tokenizer=model.tokenizer, device="cpu")
    ids = model.tokenizer(TEXTS[2], return_tensors="pt")["input_ids"]
    labels = torch.tensor([[0, 1, -100, 2, 0, 1]])
    with torch.inference_mode():
        output = model(input_ids=ids, labels=labels)
    named = [model.config.id2label[i] for i in output.logits[0].argmax(-1).tolist()]
    said = {entry["index"]: entry["entity"] for entry in run(TEXTS[2])}
    assert said == {i: name for i, name in enumerate(named) if name != "O"}
    kept = labels[0] != -100
    expected = torch.nn.functional.cross_entropy(output.logits[0][kept], labels[0][kept])
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_generation(tmp_path: Path) -> None:
    put("llama", "", "words", tmp_path)
    model = load("llama", "words", tmp_path)
    run = pipeline("text-generation", model=model, tokenizer=model.tokenizer, device="cpu")
    with_brick = run("w5 w6", max_new_tokens=6, min_new_tokens=6, do_sample=False)[0][
        "generated_text"
    ]
    ids = model.tokenizer("w5 w6", return_tensors="pt")["input_ids"]
    for _ in range(6):  # greedy by hand
        with torch.inference_mode():
            logits = model(input_ids=ids).logits[:, -1].clone()
            logits[:, 1] = -torch.inf  # min_new_tokens forbids the end
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    by_hand = model.tokenizer.decode(ids[0], skip_special_tokens=True)
    assert with_brick.replace(" ", "") == by_hand.replace(" ", "")


def test_an_expression_is_the_merge(tmp_path: Path) -> None:
    a = put("bert", "classification", "a", tmp_path, 1)
    put("bert", "regression", "b", tmp_path, 2)
    model = load(
        "bert", f"merge(linear, [{a}, b], weights=[0.3, 0.7])", tmp_path, head="regression"
    )
    backbone = tiny("bert")
    from cfm_train.bricks.stored import open_brick

    parts = [open_brick(Library(tmp_path).find(n), Library(tmp_path), backbone) for n in "ab"]
    ids = torch.arange(3, 12)[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = plugged(backbone, [merged("linear", parts, [0.3, 0.7], backbone).brick], inputs)
    with torch.inference_mode():
        assert torch.equal(model.backbone.hidden_states(**inputs), expected)
        values = parts[1].head_for("regression")(expected, inputs["attention_mask"])
        assert torch.equal(model(**inputs).logits, values)


def test_what_load_refuses(tmp_path: Path) -> None:
    put("bert", "classification", "a", tmp_path, 1)
    put("bert", "regression", "b", tmp_path, 2)
    put("bert", "", "bodies", tmp_path, 3)
    for configuration, more, sentence in (
        ("merge(linear, [a, b])", {}, "has the heads classification, regression: choose one"),
        ("a", {"head": "clasification"}, "no head 'clasification'. Did you mean 'classification'"),
        ("bodies", {"head": "x"}, "has no head 'x'"),
        (None, {"head": "x"}, "head 'x' belongs to a brick"),
        ("merge(linar, [a, b])", {}, "no rule 'linar'. Did you mean 'linear'"),
        ("merge(linear, [a, b], density=0.2)", {}, "no key|does not know the parameter 'density'"),
        ("merge(linear, [a, b], weights=0.5)", {}, "is no list"),
        ("merge(linear, [a, b], weights=[x, y])", {}, "is no finite number"),
        ("stitch([a, b])", {}, "has the heads classification, regression: choose one"),
        ("route(arrow, [a, b])", {}, "cannot be applied"),
        ("c", {}, "c"),
    ):
        with pytest.raises(UserError, match=sentence.replace("(", r"\(")):
            load("bert", configuration, tmp_path, **more)
    with pytest.raises(UserError, match=r"no key 'dtyp'\. Did you mean 'dtype'"):
        cfm_train.load({"path": str(folder("bert")), "dtyp": "float32"})
    with pytest.raises(UserError, match="backbone"):
        cfm_train.load(section("llama"), "a", library=str(tmp_path))


@pytest.mark.parametrize("name", ["v1.2", "train", "keys", "a%2Eb"])
def test_any_task_name_goes_through_the_library(name: str, tmp_path: Path) -> None:
    backbone = tiny("bert")
    data = task_data(backbone, "classification")
    brick = new_brick(backbone, {}, "lora")
    from cfm_train.bricks.stored import open_brick
    from cfm_train.training.task_head import new_head

    brick.add_head(name, new_head(backbone, data, 5))
    card = store(brick, Library(tmp_path), backbone, name="x", operation="train")
    again = open_brick(Library(tmp_path).find("x"), Library(tmp_path), backbone)
    assert list(card.heads) == [name] == list(again.heads)
    weights = (b.head_for(name).linear.weight for b in (brick, again))
    assert torch.equal(*weights)
