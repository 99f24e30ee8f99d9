"""What holds of merges whatever the bricks are: promises, precision, threads, the way home."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cfm_train.backbone.load import Backbone, load_backbone
from cfm_train.backbone.spec import resolve
from cfm_train.bricks.lora import LoRA
from cfm_train.bricks.stored import open_brick, store
from cfm_train.config.merging import methods
from cfm_train.configuration.apply import assemble
from cfm_train.configuration.parser import parse
from cfm_train.errors import UserError
from cfm_train.launch.cli import main
from cfm_train.library.store import Library
from cfm_train.merging import engine
from cfm_train.merging.invariants import try_promises
from cfm_train.merging.mix import Mix
from cfm_train.merging.rule import PROMISES
from cfm_train.merging.spaces.low_rank import truncate, truncate_dense
from tests.backbones import batch, folder, section, tiny
from tests.brick_laws import plugged
from tests.merging.merges import (
    ONE,
    THREE,
    TWO,
    make,
    mix,
    random_updates,
    relative,
    updates,
)
from tests.tasks import task_data
from tests.training.runs import new_brick, train

#: Options of rules, and parameters on which their promises depend.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{rule: (rule, {}) for rule in methods("rule") if rule != "ties"},
    **{name: (name, {}) for name in ("ties/paper", "ties/mergekit", "ties/peft", "ties/knots")},
    "ties summed": ("ties", {"divisor": "one"}),
    "ties by frequency": ("ties", {"elect": "frequency"}),
    "sce of half": ("sce", {"select_topk": 0.5}),
    "wudi by Adam": ("wudi", {"steps": 3}),
}
#: What matrices keep and bricks with biases cannot: those are averaged, by weights that cancel.
VECTORS = {("iso_c", "cancel"), ("iso_cts", "cancel"), ("tsv", "cancel")}


@functools.cache
def variant(name: str) -> Mix:
    """The rule alone, nothing dropped."""
    rule, given = VARIANTS[name]
    chosen = mix(rule, **given)
    return dataclasses.replace(chosen, sparsifier=mix_none().sparsifier, scale=1.0)


@functools.cache
def mix_none() -> Mix:
    return mix("linear")


def apply(chosen: Mix, X: torch.Tensor, weights: object, facts: list[torch.Tensor]) -> torch.Tensor:
    numbers = chosen.weights(weights if chosen.equal else None, len(X), {"": 1}).at("layer.0.x")
    w = torch.tensor(numbers, dtype=X.dtype)
    return chosen.merge_updates(X, w, "x", [str(i) for i in range(len(X))], facts)


def statistics(chosen: Mix, count: int, out: int, width: int, seed: int) -> list[torch.Tensor]:
    if chosen.rule.needs == "fisher":
        return list(random_updates(count, out, width, seed=seed).square())
    seen = random_updates(count, 3 * width, width, seed=seed)
    return [x.T @ x for x in seen] if chosen.rule.needs else []


def kept(chosen: Mix, promise: str, seed: int, shape: tuple[int, int]) -> bool:
    """Whether a promise is kept on some updates."""
    X = random_updates(3 if (chosen.rule.most or 3) > 2 else 2, *shape, seed=seed)
    facts = statistics(chosen, len(X), *shape, seed)
    one = torch.stack([X[0], X[0]])
    same = [facts[0], facts[0]] if facts else []
    if promise == "identity":
        found, wanted = apply(chosen, X[:1], [1.0], facts[:1]), X[0]
    elif promise == "idempotent":
        found, wanted = apply(chosen, one, None, same), X[0]
    elif promise == "cancel":
        try:
            found, wanted = apply(chosen, one, [0.7, -0.7], same), 0 * X[0]
        except UserError:
            return False
    else:
        weights = [0.2, 0.5, 0.9][: len(X)]
        found = apply(chosen, X, weights, facts)
        wanted = apply(chosen, X.flip(0), weights[::-1], facts[::-1])
    return bool(((found - wanted).norm() <= 1e-9 * X[0].norm()).item())


@pytest.mark.parametrize("name", VARIANTS)
def test_rules_promise_what_they_keep_and_no_less(name: str) -> None:
    chosen = variant(name)
    rule = chosen.rule
    assert "off" in rule.promises and rule.promises <= PROMISES.keys()
    for promise in sorted(PROMISES.keys() - {"off"}):
        senseless = (promise == "identity" and rule.fewest > 1) or (
            promise == "cancel" and rule.weightless
        )
        if senseless:
            assert promise not in rule.promises
            continue
        shapes = [(5, 7), (9, 6), (8, 8)]
        held = [kept(chosen, promise, seed, shapes[seed % 3]) for seed in range(6)]
        if promise in rule.promises:
            assert all(held), promise
        elif (name, promise) in VECTORS:
            with pytest.raises(UserError, match="averages"):
                apply(chosen, random_updates(1, 7)[[0, 0]], [0.7, -0.7], [])
        else:
            assert not all(held), f"{name} keeps '{promise}' and does not say so"


@pytest.mark.parametrize("name", VARIANTS)
def test_promises_on_the_answers(name: str) -> None:
    backbone = tiny("bert")
    chosen = mix(VARIANTS[name][0], **VARIANTS[name][1])
    shapes = [ONE, TWO, THREE]
    if chosen.space == "parameters":
        shapes = [{**ONE, "alpha": alpha} for alpha in (8, 3, 5)]
    bricks = [make("bert", h, s) for s, h in enumerate(shapes)][: chosen.rule.most or 3]

    def facts(site: str) -> list[torch.Tensor]:
        place = backbone.sites[site]
        return statistics(chosen, 3, place.out_features, place.in_features, len(site))

    checks = try_promises(bricks, None, chosen, backbone, sources=["1", "2", "3"], statistics=facts)
    for what, check in checks.items():
        assert check["passed"], f"{what}: {check['value']:.1e}"
    assert PROMISES["permutation"] in checks and PROMISES["off"] in checks


@pytest.mark.parametrize("fold", ["sqrt", "b"])
@pytest.mark.parametrize("rule", ["linear", "multislerp", "karcher", "ties/mergekit", "wudi"])
def test_one_brick_is_itself_factor_by_factor(rule: str, fold: str) -> None:
    """The scale of an update is neither lost nor doubled, whether a rule multiplies or averages."""
    brick = make("bert", {**ONE, "alpha": 7, "bias": "lora_bias"}, 1)
    chosen = mix(rule, space="parameters", fold=fold, sparsify="none")
    weights = [1.0] if chosen.equal else None
    found = engine.merge([brick], weights, chosen, tiny("bert")).brick
    for site, update in updates(found).items():
        assert relative(update, updates(brick)[site]) < 1e-6
    inputs = batch(tiny("bert"))
    torch.testing.assert_close(
        plugged(tiny("bert"), [found], inputs), plugged(tiny("bert"), [brick], inputs),
        atol=1e-5, rtol=0,
    )  # fmt: skip


@settings(max_examples=15, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 9), st.sampled_from([-2.0, -0.3, 0.0, 0.7, 1.0])),
        min_size=1,
        max_size=4,
    ),
    st.tuples(st.integers(2, 20), st.integers(2, 20)),
    st.integers(1, 12),
    st.integers(0, 99),
)
def test_a_sum_is_cut_as_well_as_can_be(
    parts: list[tuple[int, float]], shape: tuple[int, int], rank: int, seed: int
) -> None:
    """Eckart and Young: by QR of the factors as by the SVD of the whole matrix."""
    out, width = shape
    factors = [
        (random_updates(1, out, r, seed=seed + i)[0] * w, random_updates(1, r, width, seed=i)[0])
        for i, (r, w) in enumerate(parts)
    ]
    left = torch.cat([b for b, _ in factors], dim=1)
    right = torch.cat([a for _, a in factors])
    whole = left @ right
    S = np.linalg.svd(whole.numpy(), compute_uv=False)
    best = np.sqrt((S[rank:] ** 2).sum())
    size = max(float(np.linalg.norm(S)), 1e-12)
    for cut, lost in (truncate(left, right, rank), truncate_dense(whole, rank)):
        assert cut.A.shape[0] <= max(rank, left.shape[1])
        off = float((cut.B @ cut.A - whole).norm())
        assert abs(off - best) <= 1e-9 * size
        assert abs(lost * size - best) <= 1e-9 * size


@pytest.mark.parametrize("sparsify", methods("sparsify"))
@pytest.mark.parametrize("rule", methods("rule"))
def test_float32_is_float64_to_rounding(rule: str, sparsify: str) -> None:
    chosen = dataclasses.replace(variant_of(rule), sparsifier=sparsifier(sparsify))
    X = random_updates(chosen.rule.most or 3, 9, 12, seed=4)
    facts = statistics(chosen, len(X), 9, 12, 1)
    weights = [0.5, 0.3, 0.8][: len(X)]
    whole, single = (apply(chosen, x, weights, facts) for x in (X, X.float()))
    assert single.dtype == torch.float32
    # A flat spectrum makes the rounding of small directions as large as they become.
    off = (single.double() - whole).norm() / max(whole.norm(), 0.01 * X[0].norm())
    assert off < (1e-4 if rule.startswith("iso") else 1e-5)


@functools.cache
def variant_of(rule: str) -> Mix:
    return mix(rule)


@functools.cache
def sparsifier(name: str) -> Any:
    return mix("linear", sparsify=name).sparsifier


@pytest.mark.parametrize("rule", ["ties/paper", "linear", "slerp"])
@pytest.mark.parametrize("space", ["delta", "core", "knots", "parameters"])
def test_what_is_saved_answers_as_what_was_merged(space: str, rule: str) -> None:
    backbone = tiny("llama")
    shapes = [ONE, ONE] if space == "parameters" else [ONE, TWO]
    bricks = [make("llama", h, s) for s, h in enumerate(shapes)]
    brick = engine.merge(bricks, [0.4, 0.8], mix(rule, space=space), backbone).brick
    interface = json.loads(json.dumps(brick.interface()))
    again = LoRA.restore(interface, brick.files(), backbone).eval()
    inputs = batch(backbone)
    assert torch.equal(plugged(backbone, [again], inputs), plugged(backbone, [brick], inputs))


#: Merges whose numbers go through products, decompositions, orders and draws.
ROUTES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("linear", {"rank": 8}),
    ("ties/paper", {"rank": 8}),
    ("ties/knots", {}),
    ("tsv", {"space": "core"}),
    ("linear", {"sparsify": "dare", "rank": 8}),
    ("karcher", {"scope": "brick", "rank": 8}),
)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    """A backbone wide enough that products are shared among threads."""
    import transformers as tf

    path = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    config = tf.BertConfig(
        vocab_size=64, hidden_size=320, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=640, max_position_embeddings=64,
    )  # fmt: skip
    tf.BertModel(config, add_pooling_layer=False).save_pretrained(path)
    for file in folder("bert").glob("*token*"):
        (path / file.name).write_bytes(file.read_bytes())
    return load_backbone(resolve({**section("bert"), "path": str(path)}), dtype="float32")


def test_threads_do_not_change_a_bit(wide: Backbone) -> None:
    hyper = {"rank": 16, "alpha": 8, "sites": ["attn.q", "ffn.down"]}
    bricks = []
    for seed in (1, 2, 3):
        brick = new_brick(wide, {}, "lora", **hyper)
        generator = torch.Generator().manual_seed(seed)
        for value in brick.parameters():
            value.data.add_(0.1 * torch.randn(value.shape, generator=generator))
        bricks.append(brick.eval())
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(
                [engine.merge(bricks, None, mix(r, **g), wide).brick.files() for r, g in ROUTES]
            )
    finally:
        torch.set_num_threads(before)
    for route, one, *others in zip(ROUTES, *found, strict=True):
        assert all(other == one for other in others), route


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Library:
    """Three bricks on the tiny BERT."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CFM_LIBRARY", raising=False)
    shelf = Library("outputs/library")
    for seed, (name, hyper) in enumerate(zip("abc", (ONE, TWO, THREE), strict=True)):
        recipe = {"backbone": section("bert")}
        brick = make("bert", hyper, seed)
        store(brick, shelf, tiny("bert"), name=name, operation="train", recipe=recipe)
    return shelf


def test_a_merge_run_again_is_the_same_version(
    library: Library, capsys: pytest.CaptureFixture[str]
) -> None:
    """In another process, with other hashes of strings and more threads."""
    command = ["recipe=merge/dare_ties", "bricks=[a,b,c]", "tracking=disabled", "merge.rank=4"]
    assert main([*command, "name=once"]) == 0, capsys.readouterr().err
    env = {**os.environ, "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "2"}
    again = subprocess.run(
        [sys.executable, "-m", "cfm_train", *command, "name=twice"],
        env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert again.returncode == 0, again.stderr[-2000:]
    once, twice = library.find("once"), library.find("twice")
    assert once.version == twice.version
    stored = open_brick(once, library, tiny("bert"))
    assert once.expression is not None
    again_in_memory = assemble(parse(once.expression), library, tiny("bert"))
    inputs = batch(tiny("bert"))
    said = plugged(tiny("bert"), [stored.eval()], inputs)
    assert torch.equal(plugged(tiny("bert"), [again_in_memory.eval()], inputs), said)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_trained_bricks_side_by_side_are_their_parallel_sum(family: str, tmp_path: Path) -> None:
    """Trained one by one in float32, then concatenated: nothing is lost, to 1e-6."""
    backbone = tiny(family)
    bricks = []
    for seed, hyper in enumerate((ONE, TWO)):
        task = task_data(backbone, "classification", seed=seed)
        tasks = {f"t{seed}": task}
        brick = new_brick(backbone, tasks, "lora", seed, **hyper)
        start = {name: value.clone() for name, value in brick.state_dict().items()}
        train(backbone, brick, tasks, tmp_path / str(seed), seed=seed, max_steps=8)
        assert all(p.dtype == torch.float32 for p in brick.parameters())
        assert any(not torch.equal(start[n], v) for n, v in brick.state_dict().items())
        bricks.append(brick.eval().requires_grad_(False))
    merged = engine.merge(bricks, [1.0, 1.0], mix("linear", space="cat"), backbone).brick
    inputs = batch(backbone)
    found, together = plugged(backbone, [merged], inputs), plugged(backbone, bricks, inputs)
    bare = plugged(backbone, [], inputs)
    assert (together - bare).abs().max() > 1e-3
    assert (found - together).abs().max() <= 1e-6 * together.abs().max()
    for weights in ([0.3, 0.7], [1.0, -1.0]):
        merged = engine.merge(bricks, weights, mix("linear", space="cat"), backbone).brick
        found = plugged(backbone, [merged], inputs)
        together = plugged(backbone, bricks, inputs, weights)
        assert (found - together).abs().max() <= 1e-6 * together.abs().max()
