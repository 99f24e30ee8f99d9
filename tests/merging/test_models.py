"""Whole models: values against the plain merge and mergekit, and that nothing else has a say."""

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
from safetensors.torch import save_file

from cfm_train.backbone.spec import resolve
from cfm_train.backbone.tensors import content_of, placed_tensors
from cfm_train.launch.cli import main
from cfm_train.launch.job import prepare
from cfm_train.library.store import Library
from cfm_train.paths import ROOT
from tests.backbones import batch, folder, tiny
from tests.merging.merges import mix, relative
from tests.merging.whole_models import (
    HEAD,
    Tensors,
    arguments,
    configure,
    drawn,
    merge,
    tensors_of,
    write,
)

WEIGHTS = [0.5, 0.3, 0.2]


def plain(
    rule: str, inputs: Sequence[Tensors], base: Tensors | None, sources: Sequence[str], **given: Any
) -> Tensors:
    """The same merge with `Mix` on whole tensors, group by group, in float32."""
    chosen = mix(rule, **given)
    names = list(inputs[0])
    weights = given.get("weights") or ([1 / len(inputs)] if chosen.equal == "mean" else [1.0])
    weights = weights if len(weights) > 1 else weights * len(inputs)
    result = {}
    for group in chosen.groups([(name, name) for name in names]):
        members = [names[number] for number in group]
        rows = []
        for tensors in inputs:
            parts = [tensors[n].float() - (0 if base is None else base[n].float()) for n in members]
            rows.append(torch.cat([one.reshape(-1) for one in parts]))
        updates = torch.stack(rows)
        if len(members) == 1:
            updates = updates.view(-1, *inputs[0][members[0]].shape)
        merged = chosen.merge_updates(
            updates, torch.tensor(weights), "\n".join(members), sources
        ).reshape(-1)
        for name, part in zip(
            members, merged.split([inputs[0][n].numel() for n in members]), strict=True
        ):
            part = part.view(inputs[0][name].shape) * chosen.scale
            part = part if base is None else part + base[name].float()
            result[name] = part.to(inputs[0][name].dtype)
    return result


def same(found: Tensors, expected: Tensors) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[n], expected[n]) and found[n].dtype == expected[n].dtype for n in found
    )


#: rule, whether there is a base, overrides
STREAMED: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "linear": ("linear", False, {}),
    "linear on a base": ("linear", True, {"scale": 0.7}),
    "task arithmetic": ("task_arithmetic", True, {"scale": 0.4}),
    "ties as mergekit": ("ties/mergekit", True, {"density": 0.2}),
    "ties as the paper, over the whole model": ("ties/paper", True, {"density": 0.3}),
    "ties by layer": ("ties", True, {"scope": "layer", "density": 0.1}),
    "ties, everything kept": ("ties", True, {"density": 1.0}),
    "ties, nothing kept": ("ties", True, {"density": 0.0}),
    "magmax": ("magmax", True, {}),
    "consensus": ("task_arithmetic", True, {"sparsify": "tall", "agree": 2}),
}
#: What must see a whole tensor.
WHOLE: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "slerp": ("slerp", False, {}),
    "karcher": ("karcher", False, {}),
    "slerp of updates by layer": ("slerp", True, {"scope": "layer"}),
    "dare": ("linear", True, {"sparsify": "dare", "seed": 3}),
    "breadcrumbs": ("task_arithmetic", True, {"sparsify": "breadcrumbs"}),
    "trim that keeps the norm": ("ties", True, {"rescale": "l1", "scope": "tensor"}),
    "sce": ("sce", True, {"select_topk": 0.5}),
    "model stock": ("model_stock", True, {}),
    "tsv": ("tsv", True, {}),
    "iso-c": ("iso_c", True, {}),
}


@pytest.mark.parametrize("case", [*STREAMED, *WHOLE])
@pytest.mark.usefixtures("small_chunks")
def test_the_same_as_the_plain_merge_to_the_bit(
    case: str, models: list[Path], tmp_path: Path
) -> None:
    rule, based, given = (STREAMED | WHOLE)[case]
    base, *inputs = models
    inputs = inputs[: 2 if "slerp" in case else 3]
    overrides = [f"merge.{k}={v}" for k, v in given.items() if k != "sparsify"]
    overrides += [f"sparsify={given['sparsify']}"] if "sparsify" in given else []
    found = merge(
        tmp_path / "x", inputs, base if based else None, f"rule={rule}", "threads=3", *overrides
    )
    expected = plain(
        rule,
        [tensors_of(path) for path in inputs],
        tensors_of(base) if based else None,
        [content_of(placed_tensors(resolve({"path": str(path)}))) for path in inputs],
        **given,
    )
    assert same(found, expected)


@pytest.mark.parametrize(
    ("method", "rule", "base", "parameters"),
    [
        ("linear", "linear", False, {"normalize": False}),
        ("task_arithmetic", "task_arithmetic", True, {"lambda": 1.0}),
        ("ties", "ties/mergekit", True, {"density": 0.2, "normalize": True}),
    ],
)
@pytest.mark.usefixtures("small_chunks")
def test_mergekit_in_memory(
    method: str, rule: str, base: bool, parameters: dict[str, Any], tmp_path: Path
) -> None:
    """In float32, where no two magnitudes tie: 1e-5 relative, before any cast."""
    from mergekit.merge_methods.api import merge_tensors

    stored = [drawn(number, torch.float32) for number in range(4)]
    paths = [write(tmp_path / f"f{n}", tensors) for n, tensors in enumerate(stored)]
    more = ["merge.scale=1"]
    more += [f"merge.density={parameters['density']}"] if "density" in parameters else []
    found = merge(
        tmp_path / "x",
        paths[1:],
        paths[0] if base else None,
        f"rule={rule}",
        "weights=[0.5,0.3,0.2]",
        *more,
    )
    used = stored if base else stored[1:]
    ids = ["base", "a", "b", "c"][-len(used) :]
    for name, value in found.items():
        theirs = merge_tensors(
            [tensors[name] for tensors in used],
            method,
            parameters={**parameters, "weight": dict(zip("abc", WEIGHTS, strict=True))},
            ids=ids,
            **({"base_index": 0} if base else {}),
        )
        assert relative(value, theirs) < 1e-6
        assert (value - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_nothing_else_has_a_say(models: list[Path], tmp_path: Path) -> None:
    """Not how the inputs lie in shards, not threads, not PYTHONHASHSEED: equal bytes."""
    base, *inputs = models
    more = ["rule=ties/mergekit", "sparsify=dare", "merge.seed=1"]
    merge(tmp_path / "one", inputs, base, *more, "threads=1")
    sharded = [
        write(tmp_path / f"s{n}", tensors_of(path), shards=3) for n, path in enumerate(models)
    ]
    trim = ["rule=ties/mergekit", "merge.density=0.3"]
    merge(tmp_path / "whole", inputs, base, *trim, "threads=1")
    merge(tmp_path / "sharded", sharded[1:], sharded[0], *trim, "threads=4")
    merge(tmp_path / "drawn", sharded[1:], sharded[0], *more, "threads=3")

    def content(name: str) -> bytes:
        return (tmp_path / name / "out" / "model.safetensors").read_bytes()

    assert content("whole") == content("sharded")
    assert content("one") == content("drawn")
    for seed in ("1", "2"):
        where = tmp_path / f"seed{seed}"
        where.mkdir()
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "cfm_train",
                *arguments(where, inputs, base, *more, "threads=2"),
            ],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert content("one") == content(f"seed{seed}")


def test_shards_of_the_result_hold_the_same(models: list[Path], tmp_path: Path) -> None:
    base, *inputs = models
    whole = merge(tmp_path / "a", inputs, base)
    parts = merge(tmp_path / "b", inputs, base, "shard_bytes=20000")
    assert len(list((tmp_path / "b" / "out").glob("model-*.safetensors"))) == 3
    assert same(whole, parts)


@pytest.mark.parametrize("rule", ["linear", "ties", "tsv"])
def test_lambda_zero_is_the_base(rule: str, models: list[Path], tmp_path: Path) -> None:
    base, *inputs = models
    found = merge(tmp_path / "x", inputs, base, f"rule={rule}", "merge.scale=0")
    assert same(found, tensors_of(base))


def test_weights_over_depth_and_by_name(models: list[Path], tmp_path: Path) -> None:
    a, b = models[1:3]
    found = merge(
        tmp_path / "x",
        [a, b],
        None,
        "weights=[[0,1],[1,0]]",
        "merge.filters=[[down_proj.weight,0.25,0.75]]",
    )
    one, two = tensors_of(a), tensors_of(b)
    for name, value in found.items():
        if "down_proj" in name:
            share = 0.25
        elif "embed" in name or "layers.0." in name:
            share = 0.0
        else:
            share = 1.0
        expected = share * one[name].double() + (1 - share) * two[name].double()
        assert torch.equal(value, expected.float().bfloat16()), name


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_transformers_loads_it_and_it_answers(family: str, tmp_path: Path) -> None:
    """The answers of the model whose parameters were averaged in memory; gpt2 ties its head."""
    from tests.stitching.test_layer_slices import outputs, run, sibling

    one, two = folder(family), sibling(family, tmp_path)
    merge(tmp_path / "x", [one, two], None, "weights=[0.25,0.75]")
    from tests.backbones import plain_model

    model, other = plain_model(family), tensors_of(two)
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(0.25 * value.double() + 0.75 * other[name].double())
    found = outputs(tmp_path / "x" / "out", family)
    torch.testing.assert_close(found, run(model.eval(), family), atol=1e-5, rtol=1e-5)
    assert batch(tiny(family))


def test_dtype_and_numbers_that_are_carried(tmp_path: Path) -> None:
    positions = {"positions": torch.arange(5)}
    one = write(tmp_path / "a", {**drawn(1), **positions})
    two = write(tmp_path / "b", {**drawn(2, torch.float32), **positions})
    found = merge(tmp_path / "x", [one, two], None, "merge.dtype=float32")
    first, second = tensors_of(one), tensors_of(two)
    assert torch.equal(found.pop("positions"), positions["positions"])
    for name, value in found.items():
        assert torch.equal(value, first[name].float() * 0.5 + 0.5 * second[name])
    config = json.loads((tmp_path / "x" / "out" / "config.json").read_text())
    assert config.get("torch_dtype", config.get("dtype")) == "float32"


def test_the_library_knows_where_it_comes_from(models: list[Path], tmp_path: Path) -> None:
    base, *inputs = models
    merge(tmp_path, inputs, base, "name=first")
    again = tmp_path / "again"
    again.mkdir()
    record = prepare(
        [
            *arguments(tmp_path, [tmp_path / "out", inputs[0]], None),
            f"out={again / 'out'}",
            "name=second",
        ]
    ).start()
    library = Library(str(tmp_path / "library"))
    card = library.find("second")
    assert card.kind == "backbone" and card.operation == "merge"
    assert [parent["name"] for parent in card.parents] == ["first"]
    assert record["brick"]["parents"] == card.parents
    assert not library.verify("second")
    note = json.loads((again / "out" / "merge.json").read_text())
    assert [one["backbone"] for one in note["models"]] == ["out", "m1"]


def test_embeddings_that_are_written_out_twice(tmp_path: Path) -> None:
    """They are tied, so they are merged once, whatever the weights over depth."""
    paths = []
    for number in (1, 2):
        tensors = drawn(number)
        tensors[HEAD] = tensors["model.embed_tokens.weight"].clone()
        paths.append(write(tmp_path / f"t{number}", tensors))
        configure(paths[-1], tie_word_embeddings=True)
    found = merge(tmp_path / "x", paths, None, "weights=[[0,1],[1,0]]")
    assert torch.equal(found[HEAD], found["model.embed_tokens.weight"])
    tensors = tensors_of(paths[0])
    tensors[HEAD] += 1
    save_file(tensors, paths[0] / "model.safetensors", metadata={"format": "pt"})
    assert main(arguments(tmp_path / "y", paths, None)) == 2
