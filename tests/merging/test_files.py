"""Adapter folders merged as files: the same as through the library, and what PEFT makes of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from cfm_train.bricks.brick import Brick
from cfm_train.bricks.lora import LoRA
from cfm_train.merging.files.__main__ import main
from cfm_train.merging.files.adapters import open_adapters
from cfm_train.merging.files.merge import merge_adapters
from cfm_train.paths import ROOT
from tests.backbones import answers, batch, plain_model, randomise, tiny
from tests.brick_laws import plugged
from tests.merging.merges import ONE, THREE, TWO, make, merged, relative, updates

TENSORS = "adapter_model.safetensors"


def save(brick: Brick, path: Path, **changes: Any) -> Path:
    """A brick as an adapter folder, with changes to its config."""
    path.mkdir(parents=True)
    for name, content in brick.body_files().items():
        (path / name).write_bytes(content)
    if changes:
        config = json.loads((path / "adapter_config.json").read_text())
        (path / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    return path


def by_files(paths: Sequence[Path], out: Path, *more: str) -> dict[str, bytes]:
    assert main([*map(str, paths), "--out", str(out), *more]) == 0
    return {file.name: file.read_bytes() for file in out.iterdir()}


#: rule, parameters, whether ranks may differ
CASES: dict[str, tuple[str, dict[str, Any], bool]] = {
    "linear": ("linear", {}, True),
    "linear at a rank": ("linear", {"rank": 3}, True),
    "cat": ("linear", {"space": "cat"}, True),
    "ties as mergekit": ("ties/mergekit", {"density": 0.3}, True),
    "ties as the paper, over everything": ("ties/paper", {"density": 0.4, "rank": 4}, True),
    "ties in core space": ("ties", {"space": "core", "density": 0.5}, True),
    "ties by KnOTS": ("ties/knots", {"density": 0.5}, True),
    "ties as PEFT": ("ties/peft", {"density": 0.5}, False),
    "parameters": ("linear", {"space": "parameters", "fold": "b"}, False),
    "tsv": ("tsv", {"rank": 5}, True),
}


@pytest.mark.parametrize("case", CASES)
def test_the_same_as_through_the_library(case: str, tmp_path: Path) -> None:
    rule, given, mixed = CASES[case]
    hypers = (ONE, TWO, THREE) if mixed else (ONE, ONE, ONE)
    bricks = [make("llama", hyper, seed) for seed, hyper in enumerate(hypers)]
    paths = [save(brick, tmp_path / f"a{n}") for n, brick in enumerate(bricks)]
    weights = None if rule == "tsv" else [0.5, 0.3, 0.4]
    more = [f"--set={key}={value}" for key, value in given.items()]
    more += ["--rule", rule] + (["--weights", "0.5,0.3,0.4"] if weights else [])
    files = by_files(paths, tmp_path / "out", *more)
    expected = merged(rule, bricks, weights, tiny("llama"), **given).brick
    found = LoRA.restore({}, files, tiny("llama")).eval()
    ours, theirs = updates(found), updates(expected)
    assert ours.keys() == theirs.keys()
    for site, update in theirs.items():
        assert relative(ours[site], update) < 1e-5, site
    inputs = batch(tiny("llama"))
    torch.testing.assert_close(
        plugged(tiny("llama"), [found], inputs),
        plugged(tiny("llama"), [expected], inputs),
        atol=1e-5,
        rtol=1e-5,
    )


def by_peft(path: Path, seed: int, **config: Any) -> dict[str, torch.Tensor]:
    """An adapter trained (well, drawn) and saved by PEFT; its updates by PEFT, by module."""
    model = get_peft_model(plain_model("llama"), LoraConfig(task_type="CAUSAL_LM", **config))
    randomise(model, seed)
    model.save_pretrained(path)
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").double()
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and len(module.lora_A)
    }


def test_patterns_and_rslora_of_peft_and_peft_loads_the_result(tmp_path: Path) -> None:
    """The float64 sum of what PEFT says each adapter adds, in what PEFT says ours adds."""
    deltas = [
        by_peft(
            tmp_path / "a",
            1,
            r=4,
            lora_alpha=12,
            target_modules=["q_proj", "down_proj"],
            rank_pattern={"down_proj": 2},
            alpha_pattern={"layers.1.self_attn.q_proj": 3},
        ),
        by_peft(tmp_path / "b", 2, r=3, lora_alpha=5, use_rslora=True, target_modules=["q_proj"]),
        by_peft(tmp_path / "c", 3, r=1, lora_alpha=1, target_modules="all-linear"),
    ]
    weights = [0.7, -1.1, 0.4]
    paths = [tmp_path / name for name in "abc"]
    by_files(paths, tmp_path / "out", "--weights", "0.7,-1.1,0.4")
    model = PeftModel.from_pretrained(plain_model("llama"), tmp_path / "out").eval()
    modules = {name for one in deltas for name in one}
    for name in modules:
        expected = sum(w * one[name] for w, one in zip(weights, deltas, strict=True) if name in one)
        found = model.base_model.model.get_submodule(name).get_delta_weight("default")
        assert isinstance(expected, torch.Tensor) and relative(found, expected) < 1e-6, name
    inputs = batch(tiny("llama"))
    with torch.inference_mode():
        files = {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()}
        ours = LoRA.restore({}, files, tiny("llama")).eval()
        torch.testing.assert_close(
            answers(model, inputs), plugged(tiny("llama"), [ours], inputs), atol=1e-5, rtol=1e-5
        )


def test_fused_modules_are_merged_as_they_lie_in_the_files(tmp_path: Path) -> None:
    """GPT-2's c_attn holds q and v of one brick and q of another: the sum of the modules."""
    bricks = [
        make("gpt2", {**ONE}, 1),
        make("gpt2", {"rank": 2, "alpha": 4, "sites": ["attn.q"]}, 2),
    ]
    paths = [save(brick, tmp_path / f"g{n}") for n, brick in enumerate(bricks)]
    files = by_files(paths, tmp_path / "out", "--weights", "[0.4,0.6]")
    found = LoRA.restore({}, files, tiny("gpt2")).eval()
    inputs = batch(tiny("gpt2"))
    torch.testing.assert_close(
        plugged(tiny("gpt2"), [found], inputs),
        plugged(tiny("gpt2"), bricks, inputs, [0.4, 0.6]),
        atol=1e-5,
        rtol=1e-5,
    )


def test_whole_modules_are_carried_where_they_are_one(tmp_path: Path) -> None:
    paths = [save(make("llama", ONE, n), tmp_path / f"a{n}") for n in range(2)]
    for path in paths:
        add_head(path, 1.0)
    files = by_files(paths, tmp_path / "out")
    assert json.loads(files["adapter_config.json"])["modules_to_save"] == ["score"]
    head = load_file(tmp_path / "out" / TENSORS)["base_model.model.score.weight"]
    assert torch.equal(head, torch.ones(2, 32))


def add_head(path: Path, value: float) -> None:
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**config, "modules_to_save": ["score"]}))
    tensors = load_file(path / TENSORS)
    tensors["base_model.model.score.weight"] = torch.full((2, 32), value)
    save_file(tensors, path / TENSORS)


def test_neither_transformers_nor_the_network(tmp_path: Path) -> None:
    """And no torch where the arguments are wrong; equal bytes whatever PYTHONHASHSEED is."""
    paths = [str(save(make("llama", hyper, 1), tmp_path / str(n))) for n, hyper in
             enumerate((ONE, TWO))]  # fmt: skip
    code = (
        "import sys; from cfm_train.merging.files.__main__ import main; "
        "code = main(sys.argv[1:]); "
        "print(code, [m for m in ('torch', 'transformers', 'peft', 'huggingface_hub') "
        "if m in sys.modules])"
    )

    def started(out: str, *more: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", code, *paths, "--out", str(tmp_path / out), *more],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": str(len(out))},
        )
        return done.stdout.splitlines()[-1]

    dare = ["--rule", "ties", "--set", "sparsify=dare", "--set", "seed=4"]
    assert started("one", *dare) == "0 ['torch']"
    assert started("other", *dare) == "0 ['torch']"
    assert started("none", "--rule", "tees") == "2 []"
    for name in ("adapter_config.json", TENSORS):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


def _two(where: Path, one: Brick, **changes: Any) -> list[Path]:
    return [save(make("llama", ONE, 1), where / "a"), save(one, where / "b", **changes)]


def _plain(where: Path) -> list[Path]:
    return _two(where, make("llama", TWO, 2))


def _heads(where: Path) -> list[Path]:
    paths = _plain(where)
    for number, path in enumerate(paths):
        add_head(path, float(number))
    return paths


def _prefixed(where: Path) -> list[Path]:
    paths = _plain(where)
    tensors = load_file(paths[1] / TENSORS)
    renamed = {name.replace("model.model.", "model.", 1): v for name, v in tensors.items()}
    save_file(renamed, paths[1] / TENSORS)
    return paths


def _bases(where: Path) -> list[Path]:
    paths = _plain(where)
    for path in paths:
        config = json.loads((path / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = f"org/{path.name}"
        (path / "adapter_config.json").write_text(json.dumps(config))
    return paths


REFUSED: dict[str, tuple[Any, list[str], str]] = {
    "DoRA": (lambda w: _two(w, make("llama", {**TWO, "dora": True}, 2)), [], "DoRA"),
    "own biases": (lambda w: _two(w, make("bert", {**ONE, "bias": "lora_only"}, 2)), [], "biases"),
    "PiSSA": (
        lambda w: _two(w, make("llama", TWO, 2), init_lora_weights="pissa"),
        [],
        "init_lora_weights='pissa'",
    ),
    "another kind": (lambda w: _two(w, make("llama", {}, 2, "ia3")), [], "IA3"),
    "another width": (
        lambda w: [save(make("llama", ONE, 1), w / "a"), _wider(w)],
        [],
        "different backbones",
    ),
    "whole modules that differ": (_heads, [], "modules_to_save"),
    "another prefix": (_prefixed, [], "may be what"),
    "backbones that differ": (_bases, [], "--base"),
    "no adapter": (lambda w: [*_plain(w), w], [], "adapter_config.json"),
    "no such folder": (lambda w: [*_plain(w), w / "none"], [], "none"),
    "rule": (_plain, ["--rule", "tees"], "tees"),
    "statistics": (_plain, ["--rule", "fisher"], "fisher"),
    "weights": (_plain, ["--weights", "1,2,3"], "--weights"),
    "no numbers": (_plain, ["--weights", "a,b"], "--weights"),
    "parameter": (_plain, ["--set", "densty=0.5"], "densty"),
    "density of nothing": (_plain, ["--density", "0.5"], "density"),
    "rank": (_plain, ["--rank", "0"], "rank"),
    "space": (_plain, ["--space", "cat", "--rank", "2"], "merge.space=cat"),
    "slerp of three": (
        lambda w: [*_plain(w), save(make("llama", ONE, 3), w / "c")],
        ["--rule", "slerp"],
        "exactly 2",
    ),
    "parameters of other ranks": (_plain, ["--space", "parameters"], "merge.space=delta"),
    "out": (lambda w: _plain(_filled(w)), [], "is there already"),
}


def _wider(where: Path) -> Path:
    path = save(make("llama", ONE, 2), where / "b")
    tensors = load_file(path / TENSORS)
    wide = {n: torch.cat([v, v], dim=1) if "lora_A" in n else v for n, v in tensors.items()}
    save_file(wide, path / TENSORS)
    return path


def _filled(where: Path) -> Path:
    (where / "out").mkdir()
    (where / "out" / "mine.txt").write_text("kept")
    return where


@pytest.mark.parametrize("case", REFUSED)
def test_one_sentence_and_nothing_on_disk(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_them, more, named = REFUSED[case]
    paths = make_them(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    assert main([*map(str, paths), "--out", str(tmp_path / "out"), *more]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and error.startswith("error: ") and named in error
    assert sorted(tmp_path.rglob("*")) == before


def test_backbones_that_are_one_by_another_name(tmp_path: Path) -> None:
    files = by_files(_bases(tmp_path), tmp_path / "out", "--base", "org/one")
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "org/one"


def test_weights_over_depth_and_by_module(tmp_path: Path) -> None:
    hyper = {"rank": 2, "alpha": 2, "sites": ["attn.q", "attn.v"]}
    bricks = [make("llama", hyper, n) for n in range(2)]
    paths = [save(brick, tmp_path / f"a{n}") for n, brick in enumerate(bricks)]
    filters = "filters=[[v_proj,0.1,0.2]]"
    files = by_files(paths, tmp_path / "out", "--weights", "[0,1],[1,0]", "--set", filters)
    found = updates(LoRA.restore({}, files, tiny("llama")))
    one, two = map(updates, bricks)
    for site, update in found.items():
        a, b = (0.1, 0.2) if site.endswith(".v") else (0, 1) if "layer.0" in site else (1, 0)
        assert relative(update, a * one[site] + b * two[site]) < 1e-6


def test_from_python(tmp_path: Path) -> None:
    adapters = open_adapters(_plain(tmp_path))
    cut = merge_adapters(adapters, [0.5, 0.5], "linear", {"rank": 2})
    assert cut.rank == 2 and cut.lost is not None and 0 < cut.lost < 1
    cut.write(tmp_path / "new")
    assert (tmp_path / "new" / TENSORS).is_file()
