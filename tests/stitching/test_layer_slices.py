"""Backbones made from layers of others, against models stitched by hand in transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from cfm_train.backbone.fingerprint import fingerprint
from cfm_train.backbone.load import load_backbone
from cfm_train.backbone.spec import resolve
from cfm_train.errors import UserError
from cfm_train.launch.cli import main
from cfm_train.launch.job import prepare
from cfm_train.library.store import Library
from cfm_train.stitching.layers.sources import stack_of
from tests.backbones import VOCABULARY, batch, folder, plain_model, section, tiny

STACKS = {"bert": "encoder.layer", "llama": "model.layers", "gpt2": "transformer.h"}


def sibling(family: str, where: Path, name: str = "other", **changes: Any) -> Path:
    """Another model of the same shape (or with config changes), other weights, same tokenizer."""
    model = plain_model(family)
    if changes:
        config = type(model.config)(**{**model.config.to_dict(), **changes})
        options = {"add_pooling_layer": False} if family == "bert" else {}
        model = type(model)(config, **options)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.1 * torch.randn(value.shape, generator=generator))
    path = where / name
    model.save_pretrained(path)
    for file in folder(family).glob("*token*"):
        shutil.copy(file, path / file.name)
    return path


def stitch(where: Path, slices: list[str], *more: str, name: str = "made") -> dict[str, Any]:
    """Runs the recipe and returns the record."""
    job = prepare(
        [
            "recipe=stitch/layers",
            f"name={name}",
            f"slices=[{','.join(slices)}]",
            f"out={where / name}",
            f"outputs={where / 'outputs'}",
            f"library={where / 'library'}",
            "tracking=disabled",
            *more,
        ]
    )
    return job.start()


def outputs(path: Path, family: str) -> torch.Tensor:
    """Logits, or hidden states, of a folder through transformers alone."""
    model = type(plain_model(family)).from_pretrained(
        path, dtype=torch.float32, **({"add_pooling_layer": False} if family == "bert" else {})
    )
    return run(model.eval(), family)


def run(model: Any, family: str) -> torch.Tensor:
    inputs = batch(tiny(family))
    with torch.inference_mode():
        result = model(**inputs, **({} if family == "bert" else {"use_cache": False}))
    return result.last_hidden_state if "logits" not in result else result.logits


def by_hand(slices: list[tuple[Any, int]], family: str, bottom: Any, top: Any) -> torch.Tensor:
    """The same model put together from modules: embeddings, layers one by one, the rest."""
    config = type(bottom.config)(**{**bottom.config.to_dict(), "num_hidden_layers": len(slices)})
    options = {"add_pooling_layer": False} if family == "bert" else {}
    model = type(bottom)(config, **options).eval()
    before = {"bert": "embeddings.", "llama": "model.embed_tokens.", "gpt2": "transformer.w"}
    state = {}
    for name, value in bottom.state_dict().items():
        if name.startswith(before[family]):
            state[name] = value
    for name, value in top.state_dict().items():
        if not name.startswith((before[family], STACKS[family])):
            state[name] = value
    for new, (donor, old) in enumerate(slices):
        start = f"{STACKS[family]}.{old}."
        for name, value in donor.state_dict().items():
            if name.startswith(start):
                state[f"{STACKS[family]}.{new}.{name.removeprefix(start)}"] = value
    model.load_state_dict(state, strict=True)
    return run(model, family)


@pytest.mark.parametrize("family", STACKS)
def test_all_layers_of_a_model_are_the_model(family: str, tmp_path: Path) -> None:
    record = stitch(tmp_path, [f"{folder(family)}:0-1", f"{folder(family)}:1-2"])
    assert torch.equal(outputs(tmp_path / "made", family), outputs(folder(family), family))
    assert record["backbone"]["unchanged"] and all(c["passed"] for c in record["checks"].values())


@pytest.mark.parametrize("family", STACKS)
@pytest.mark.parametrize("ends", ["embed=first head=first", "embed=last head=last", "untie=true"])
def test_overlaps_and_repeats_as_by_hand(family: str, ends: str, tmp_path: Path) -> None:
    """Two models, five layers; GPT-2's head is its embedding, and comes apart where asked."""
    other = sibling(family, tmp_path)
    one, two = (
        plain_model(family),
        type(plain_model(family))
        .from_pretrained(other, **({"add_pooling_layer": False} if family == "bert" else {}))
        .eval(),
    )
    slices = [f"{folder(family)}:0-2", f"{other}:0-2", f"{folder(family)}:1-2", f"{other}:1-2"]
    stitch(tmp_path, slices, *ends.split(), "shard_bytes=20000")
    layers = [(one, 0), (one, 1), (two, 0), (two, 1), (one, 1), (two, 1)]
    if ends.startswith("untie"):
        if family == "gpt2":
            one.config.tie_word_embeddings = False
        expected = by_hand(layers, family, one, two)
        one.config.tie_word_embeddings = family == "gpt2"
    else:
        source = one if "first" in ends else two
        expected = by_hand(layers, family, source, source)
    made = tmp_path / "made"
    assert torch.equal(outputs(made, family), expected)
    assert len(list(made.glob("model-*.safetensors"))) > 1
    loaded = load_backbone(resolve({**section(family), "path": str(made)}), dtype="float32")
    assert loaded.sites.layers == {"": 6}
    with torch.inference_mode():
        inputs = batch(tiny(family))
        found = loaded.hidden_states(**inputs) if family == "bert" else loaded.logits(**inputs)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_the_card_tells_what_it_was_made_from(tmp_path: Path) -> None:
    record = stitch(tmp_path, [f"{folder('llama')}:0-2"], name="one")
    again = stitch(tmp_path, [f"{tmp_path / 'one'}:0-1", f"{folder('llama')}:0-2"], name="two")
    library = Library(tmp_path / "library")
    card = library.find("two")
    assert card.kind == "backbone" and card.operation == "stitch" and card.requires == []
    assert card.expression == "stitch([one:0-1, llama:0-2])"
    assert card.interface["fingerprint"] == fingerprint(tmp_path / "two")
    assert [node.ref for node in library.lineage("two").walk()] == [
        card.ref,
        f"one@{record['brick']['version']}",
    ]
    assert again["brick"]["parents"] == card.parents
    assert not library.verify()


def test_the_same_command_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A finished run is printed; one that was killed after the folder was written is completed."""
    slices = [f"{folder('llama')}:0-2"]
    first = stitch(tmp_path, slices)
    assert stitch(tmp_path, slices) == first
    next((tmp_path / "outputs").rglob("record.json")).unlink()
    assert stitch(tmp_path, slices)["brick"] == first["brick"]


def test_layers_keep_their_kind_where_it_is_told_by_number(tmp_path: Path) -> None:
    """Per-layer lists are cut and joined; a kind that only the position decides is refused."""
    import transformers as tf

    config = tf.Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        sliding_window=4,
        use_sliding_window=True,
        max_window_layers=2,
        bos_token_id=1,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    model = tf.Qwen2ForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "mixed")
    for file in folder("llama").glob("*token*"):
        shutil.copy(file, tmp_path / "mixed" / file.name)
    stitch(tmp_path, [f"{tmp_path / 'mixed'}:2-4", f"{tmp_path / 'mixed'}:0-1"])
    written = json.loads((tmp_path / "made/config.json").read_text())
    kinds = config.layer_types
    assert kinds[0] != kinds[2]
    assert written["layer_types"] == [kinds[2], kinds[3], kinds[0]]
    made = tf.Qwen2ForCausalLM.from_pretrained(tmp_path / "made").eval()
    layers = model.model.layers
    model.model.layers = torch.nn.ModuleList([layers[2], layers[3], layers[0]])
    model.config.num_hidden_layers, model.config.layer_types = 3, written["layer_types"]
    assert torch.equal(run(made, "llama"), run(model, "llama"))
    with pytest.raises(UserError, match="would be layer 0 and work in another way"):
        stitch(tmp_path, [f"{folder('modernbert')}:1-2"], name="turned")
    assert not (tmp_path / "turned").exists()


def changed(**values: Any) -> Any:
    return lambda where: [f"{folder('llama')}:0-1", f"{sibling('llama', where, **values)}:1-2"]


def other_tokenizer(where: Path) -> list[str]:
    path = sibling("llama", where)
    text = (path / "tokenizer.json").read_text()
    (path / "tokenizer.json").write_text(text.replace('"w9"', '"x9"'))
    return [f"{folder('llama')}:0-1", f"{path}:1-2"]


def tied(where: Path) -> list[str]:
    return [f"{folder('gpt2')}:0-1", f"{sibling('gpt2', where)}:1-2"]


WRONG: dict[str, tuple[Any, str]] = {
    "no slice": (lambda w: [f"{folder('llama')}"], "no slice"),
    "beyond the end": (lambda w: [f"{folder('llama')}:0-3"], "has 2 layers"),
    "nothing taken": (lambda w: [f"{folder('llama')}:1-1"], "layers"),
    "no such folder": (lambda w: [f"{w / 'none'}:0-1"], "none"),
    "two stacks": (lambda w: [f"{folder('t5')}:0-1"], "one stack"),
    "another architecture": (
        lambda w: [f"{folder('llama')}:0-1", f"{folder('gpt2')}:1-2"],
        "within one architecture",
    ),
    "another width": (changed(hidden_size=48, num_attention_heads=4), "hidden_size"),
    "other heads": (changed(num_attention_heads=2), "num_attention_heads"),
    "other rope": (changed(rope_parameters={"rope_theta": 5e5, "rope_type": "default"}), "rope"),
    "other vocabulary": (changed(vocab_size=80), "vocabulary"),
    "other tokenizer": (other_tokenizer, "tokenizer"),
    "tied": (tied, "untie=true"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_inputs_end_in_one_sentence(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, named = WRONG[case]
    slices = make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    code = main(
        [
            "recipe=stitch/layers",
            "name=made",
            f"slices=[{','.join(slices)}]",
            f"out={tmp_path / 'made'}",
            f"outputs={tmp_path / 'outputs'}",
            f"library={tmp_path / 'library'}",
            "tracking=disabled",
        ]
    )
    error = capsys.readouterr().err
    assert code == 2 and named in error and "Traceback" not in error, error
    assert sorted(tmp_path.rglob("*")) == before


def test_an_occupied_folder_and_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "made").mkdir()
    (tmp_path / "made/mine.txt").write_text("precious")
    with pytest.raises(UserError, match="there already"):
        stitch(tmp_path, [f"{folder('llama')}:0-2"])
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=70 * 2**20 // 2))
    with pytest.raises(UserError, match="free"):
        stitch(tmp_path, [f"{folder('llama')}:0-2"], name="full")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["made"]


def test_mixed_dtypes_are_refused(tmp_path: Path) -> None:
    plain_model("llama").to(torch.bfloat16).save_pretrained(tmp_path / "half")
    for file in folder("llama").glob("*token*"):
        shutil.copy(file, tmp_path / "half" / file.name)
    with pytest.raises(UserError, match="one dtype"):
        stitch(tmp_path, [f"{folder('llama')}:0-1", f"{tmp_path / 'half'}:1-2"])


def test_the_stack_is_read_off_the_names() -> None:
    """Experts inside a layer are no stack; a stack with a gap is none either."""
    mixtral = [f"model.layers.{n}.moe.experts.{e}.w1" for n in range(3) for e in range(4)]
    assert stack_of([*mixtral, "model.norm.weight"], "m") == ("model.layers", 3)
    assert stack_of(["h.0.a", "h.1.a", "head.0.w"], "m") == ("h", 2)
    for names in (["h.0.a", "h.2.a"], ["norm.weight"], ["e.0.a", "e.1.a", "d.0.a", "d.1.a"]):
        with pytest.raises(UserError, match="one stack"):
            stack_of(names, "m")
