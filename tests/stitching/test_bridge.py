"""Two models joined by a bridge, against transformers' own layers called one by one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cfm_train.backbone.load import Backbone, load_backbone
from cfm_train.backbone.spec import resolve
from cfm_train.data.encode import TaskData
from cfm_train.errors import UserError
from cfm_train.launch.cli import main
from cfm_train.launch.job import prepare
from cfm_train.library.store import Library
from cfm_train.stitching.layers.bridge import Bridge
from cfm_train.stitching.layers.calibrating import moments, similarity
from cfm_train.stitching.layers.measuring import measure
from cfm_train.stitching.layers.ridge import solve
from cfm_train.stitching.layers.stitched import StitchedBackbone
from cfm_train.stitching.layers.stored import load_stitched, store_bridge
from tests.backbones import batch, folder, section, tiny
from tests.stitching.test_layer_slices import sibling
from tests.tasks import task_data
from tests.training.runs import BreakOff, BrokenOff, train

WIDE = {"llama": {"hidden_size": 48}, "gpt2": {"n_embd": 48}}


def opened(family: str, path: Path | None = None) -> Backbone:
    """A backbone of its own, since stitching takes layers out of it."""
    given = {**section(family), "path": str(path or folder(family)), "id": None}
    return load_backbone(resolve(given), dtype="float32")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models of three layers and another width, with the tiny ones' tokenizer."""
    where = tmp_path_factory.mktemp("wide")
    return {
        family: sibling(
            family,
            where,
            family,
            **changes,
            **{"num_hidden_layers": 3} if family == "llama" else {"n_layer": 3},
        )
        for family, changes in WIDE.items()
    }


def states_by_hand(model: Any, ids: Tensor, layers: list[Any], hidden: Tensor | None) -> Tensor:
    """Layers called one by one on unpadded rows; from the embeddings where ``hidden`` is None."""
    places = torch.arange(ids.shape[1])[None]
    causal = torch.full((ids.shape[1],) * 2, -torch.inf).triu(1)[None, None]
    if hasattr(model, "transformer"):
        body = model.transformer
        hidden = body.wte(ids) + body.wpe(places) if hidden is None else hidden
        for layer in layers:
            hidden = layer(hidden, attention_mask=causal)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        return hidden
    body = model.model
    hidden = body.embed_tokens(ids) if hidden is None else hidden
    turns = body.rotary_emb(hidden, places)
    for layer in layers:
        hidden = layer(hidden, attention_mask=causal, position_embeddings=turns)
    return hidden


def plain(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()


def drawn(backbone: StitchedBackbone, seed: int = 0) -> Bridge:
    bridge = Bridge(list(backbone.at)).build(backbone)
    generator = torch.Generator().manual_seed(seed)
    height, width = bridge.weight.shape
    return bridge.set(
        torch.randn(height, width, generator=generator) / width**0.5,
        torch.randn(height, generator=generator) / 10,
    )


@pytest.mark.parametrize("pair", [("llama", "llama"), ("gpt2", "llama"), ("llama", "gpt2")])
@pytest.mark.parametrize("at", [(1, 1), (2, 0), (2, 2)])
def test_logits_as_by_hand(
    pair: tuple[str, str], at: tuple[int, int], wide: dict[str, Path]
) -> None:
    low, high = folder(pair[0]), wide[pair[1]]
    backbone = StitchedBackbone(opened(pair[0]), opened(pair[1], high), at)
    bridge = drawn(backbone)
    inputs = batch(tiny("llama"), length=12)
    below, above = plain(low), plain(high)
    stack = {"llama": lambda m: m.model.layers, "gpt2": lambda m: m.transformer.h}
    with torch.inference_mode(), backbone.slots.plugged([bridge]):
        found = backbone.logits(**inputs)
        for row in range(len(found)):
            ids = inputs["input_ids"][row : row + 1, : int(inputs["attention_mask"][row].sum())]
            hidden = states_by_hand(below, ids, list(stack[pair[0]](below))[: at[0]], None)
            hidden = hidden @ bridge.weight.T + bridge.bias
            hidden = states_by_hand(above, ids, list(stack[pair[1]](above))[at[1] :], hidden)
            norm = above.model.norm if pair[1] == "llama" else above.transformer.ln_f
            expected = above.lm_head(norm(hidden))[0]
            torch.testing.assert_close(found[row, : ids.shape[1]], expected, atol=2e-5, rtol=2e-5)
        some = backbone.logits(**inputs, logits_to_keep=torch.tensor([1, 4]))
        torch.testing.assert_close(some, found[:, [1, 4]], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_model_on_itself_through_the_identity_is_the_model(family: str) -> None:
    whole = opened(family)
    inputs = batch(tiny(family))
    with torch.inference_mode():
        expected = whole.logits(**inputs)
    backbone = StitchedBackbone(whole, opened(family), (1, 1))
    bridge = Bridge([1, 1]).build(backbone).set(torch.eye(32), torch.zeros(32))
    with torch.inference_mode(), backbone.slots.plugged([bridge]):
        assert torch.equal(backbone.logits(**inputs), expected)
    with pytest.raises(UserError, match="No bridge"):
        backbone.logits(**inputs)
    # What is left out is out of memory; what is left has the names that it would have in one model.
    assert list(backbone.sites) == list(tiny(family).sites)


def test_calibration_reads_the_streams_of_both(wide: dict[str, Path]) -> None:
    """The closed form against lstsq on states that transformers' layers put out."""
    import numpy as np

    bottom, top = opened("llama"), opened("llama", wide["llama"])
    task = task_data(bottom, "causal")
    assert task.validation is not None
    seen = moments(bottom, top, (2, 1), task.train, None, 0)
    fit = solve(seen, moments(bottom, top, (2, 1), task.validation, None, 0, like=seen), [0.0])
    below, above = plain(folder("llama")), plain(wide["llama"])
    xs, ys = [], []
    with torch.inference_mode():
        for row in range(len(task.train)):
            ids = torch.from_numpy(task.train.slice("input_ids", row).astype("int64"))[None]
            xs.append(states_by_hand(below, ids, list(below.model.layers), None)[0])
            ys.append(states_by_hand(above, ids, list(above.model.layers)[:1], None)[0])
    x, y = (torch.cat(z).double().numpy() for z in (xs, ys))
    assert seen.count == len(x)
    rows = np.hstack([x, np.ones((len(x), 1))])
    expected = np.linalg.lstsq(rows, y, rcond=None)[0]
    np.testing.assert_allclose(
        rows @ expected, x @ fit.weight.numpy().T + fit.bias.numpy(), atol=1e-3
    )
    bridge = Bridge([2, 1])
    backbone = StitchedBackbone(opened("llama"), opened("llama", wide["llama"]), (2, 1))
    scaled = bridge.build(backbone).random(seen, 3)
    out = x @ scaled.weight.detach().double().numpy().T
    assert np.square(out).sum() == pytest.approx(np.square(y).sum(), rel=1e-4)
    values = similarity(bottom, opened("llama"), task.train, 400, 0)
    assert [len(values), len(values[0])] == [3, 3]
    for n in range(3):
        assert values[n][n] == pytest.approx(1, abs=1e-9)


def test_losses_are_summed_by_document() -> None:
    backbone = opened("llama")
    task = task_data(backbone, "causal", max_length=6)
    assert task.test is not None and len(task.test) > len(task.test.rows)
    found = measure(backbone, task.spec, task.test)
    model = plain(folder("llama"))
    for row, (nats, tokens) in enumerate(zip(found.nats, found.tokens, strict=True)):
        ids = backbone.tokenizer(task.test.rows[row]["text"][0])["input_ids"]
        ids = [*ids, backbone.tokenizer.eos_token_id]
        assert tokens == len(ids) - 1
        total = 0.0
        for start in range(0, len(ids) - 1, 5):
            piece = torch.tensor(ids[start : start + 6])[None]
            with torch.inference_mode():
                logits = model(piece).logits[0, :-1].double()
            total -= logits.log_softmax(-1).gather(1, piece[0, 1:, None]).sum().item()
        assert nats == pytest.approx(total, rel=1e-5)


def test_into_the_library_and_back(tmp_path: Path, wide: dict[str, Path]) -> None:
    backbone = StitchedBackbone(opened("llama"), opened("gpt2", wide["gpt2"]), (1, 2))
    bridge = drawn(backbone)
    library = Library(tmp_path / "library")
    recipe = {"bottom": str(folder("llama")), "top": str(wide["gpt2"])}
    card = store_bridge(bridge, library, backbone, name="joint", recipe=recipe)
    assert card.requires == [backbone.parts[0][1], backbone.parts[1][1]]
    assert card.interface["bottom"]["layers"] == [0, 1]
    assert card.interface["top"]["layers"] == [2, 3]
    assert card.expression == "stitch([llama:0-1, gpt2:2-3])" and not library.verify()
    inputs = batch(tiny("llama"))
    model = load_stitched(library.find("joint"), library)
    with torch.inference_mode(), backbone.slots.plugged([bridge]):
        expected = backbone.logits(**inputs)
        found = model(inputs["input_ids"], inputs["attention_mask"]).logits
        assert torch.equal(found, expected)
        ids = inputs["input_ids"][:1, :3]
        written = model.generate(ids, 4)
        for at in range(3, 7):
            assert written[0, at] == backbone.logits(input_ids=written[:, :at])[0, -1].argmax()
    with pytest.raises(UserError, match="fingerprint"):
        load_stitched(card, library, top=str(folder("gpt2")))
    arguments = ["recipe=evaluate/tasks", "bricks=[joint]", "tasks=[quick_tone]"]
    with pytest.raises(UserError, match="joins two models"):
        prepare([*arguments, f"library={tmp_path / 'library'}", f"outputs={tmp_path / 'out'}"])


def test_broken_off_training_goes_on_as_the_unbroken(tmp_path: Path, wide: dict[str, Path]) -> None:
    def start(into: str, *callbacks: Any) -> dict[str, Tensor]:
        backbone = StitchedBackbone(opened("llama"), opened("llama", wide["llama"]), (1, 1))
        before = backbone.checksum()
        task = task_data(backbone, "causal")
        bridge = drawn(backbone)
        options = {"max_steps": 6, "validate_every": 3, "checkpoint_every": 2}
        train(backbone, bridge, {"causal": task}, tmp_path / into, callbacks=callbacks, **options)
        assert backbone.checksum() == before
        return bridge.tensors()

    whole = start("whole")
    with pytest.raises(BrokenOff):
        start("broken", BreakOff(4))
    again = start("broken")
    assert whole.keys() == {"weight", "bias"}
    for name, value in whole.items():
        assert torch.equal(value, again[name])


def rows(where: Path, count: int = 40) -> Path:
    path = where / "text.jsonl"
    lines = [
        json.dumps({"text": " ".join(f"w{3 + (i * k) % 60}" for k in range(1, 14))})
        for i in range(1, count + 1)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def command(where: Path, bottom: Path, top: Path, *more: str) -> list[str]:
    return [
        "recipe=stitch/bridge",
        "name=joint",
        f"bottom={bottom}",
        f"top={top}",
        f"data.train={rows(where)}",
        "data.max_length=64",
        f"outputs={where / 'outputs'}",
        f"library={where / 'library'}",
        "trainer.max_steps=4",
        "trainer.validate_every=2",
        "evaluation.bootstrap=20",
        "tracking=disabled",
        *more,
    ]


def test_the_recipe(tmp_path: Path, wide: dict[str, Path]) -> None:
    record = prepare(command(tmp_path, folder("llama"), wide["llama"], "depth=[4,5]")).start()
    assert all(check["passed"] for check in record["checks"].values())
    (heatmap,) = record["heatmaps"]
    i, j = heatmap["chosen"]
    assert 4 <= i + 3 - j <= 5 and len(heatmap["values"]) == 3 and len(heatmap["values"][0]) == 4
    metrics = record["metrics"]
    for arm in ("random bridge", "closed form", "trained bridge"):
        penalty = metrics[f"test/{arm}/loss"]["value"] - metrics["test/top model/loss"]["value"]
        assert metrics[f"penalty/{arm}/loss"]["value"] == pytest.approx(penalty, abs=1e-12)
    turned = prepare(
        command(tmp_path, wide["llama"], folder("llama"), "depth=[4,5]", "train=false")
    ).start()["metrics"]
    effect = metrics["order effect/closed form/loss"]
    losses = [m["test/closed form/loss"]["value"] for m in (turned, metrics)]
    assert effect["value"] == pytest.approx(losses[0] - losses[1], abs=1e-9)
    assert effect["low"] <= effect["value"] <= effect["high"] and effect["n"] > 1
    model = load_stitched(
        Library(tmp_path / "library").find("joint"), Library(tmp_path / "library")
    )
    task: TaskData = task_data(model.backbone, "causal")
    assert task.test is not None
    assert measure(model.backbone, task.spec, task.test).loss > 0
    closed = prepare(
        command(
            tmp_path, folder("llama"), wide["llama"], "at=[1,1]", "train=false", "opposite=false"
        )
    ).start()
    assert "order effect/closed form/loss" not in closed["metrics"]
    assert "test/trained bridge/loss" not in closed["metrics"] and "heatmaps" not in closed


def other_words(where: Path, path: Path) -> Path:
    shutil.copytree(path, where / "words")
    text = (where / "words/tokenizer.json").read_text()
    (where / "words/tokenizer.json").write_text(text.replace('"w9"', '"x9"'))
    return where / "words"


WRONG: dict[str, tuple[list[str], str]] = {
    "no such layer": (["at=[3,1]"], "i from 1 to 2"),
    "nothing of the top": (["at=[1,3]"], "j from 0 to 2"),
    "no pair": (["at=[1]"], "stitch point"),
    "impossible depth": (["depth=[6,9]"], "depth"),
    "depth of a given point": (["at=[1,1]", "depth=[2,4]"], "depth"),
    "packed": (["data.pack=true"], "data.pack"),
    "no test rows": (["data.test_fraction=0.0"], "test rows"),
    "too long": (["data.max_length=500"], "128 positions"),
    "no ridge": (["calibration.ridge=[]"], "calibration.ridge"),
}


@pytest.mark.parametrize("case", [*WRONG, "other tokenizer", "an encoder"])
def test_wrong_inputs_end_in_one_sentence(
    case: str, tmp_path: Path, wide: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    bottom, top = folder("llama"), wide["llama"]
    more, named = WRONG.get(case, ([], ""))
    if case == "other tokenizer":
        top, named = other_words(tmp_path, top), "different tokenizers"
    elif case == "an encoder":
        bottom, named = folder("bert"), "no causal language model"
    arguments = command(tmp_path, bottom, top, *more)
    before = sorted(tmp_path.rglob("*"))
    code = main(arguments)
    error = capsys.readouterr().err
    assert code == 2 and named in error and "Traceback" not in error, error
    assert sorted(tmp_path.rglob("*")) == before
