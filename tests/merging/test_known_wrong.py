"""Merges that other libraries are known to get wrong, by value; ours is right, or says why not.

Adapters are made by PEFT. The truth is the plain model with ``W + Σ wᵢ ΔWᵢ``, in float64 from the
papers' formulas; an error is a share of what the merge changes at all. Where the installed release
is right by now, the test says so.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from cfm_train.bricks.lora import LoRA
from cfm_train.bricks.stored import store
from cfm_train.configuration.apply import assemble
from cfm_train.configuration.parser import parse
from cfm_train.errors import UserError
from cfm_train.library.store import Library
from cfm_train.merging.spaces.space import Result
from tests.backbones import answers, batch, plain_model, randomise, section, tiny
from tests.brick_laws import plugged
from tests.merging.merges import combined, make, merged, mergekit, random_updates, relative
from tests.peft_peers import FILES

WEIGHTS = (0.5, 0.9)
NAMES = ("a", "b")
FULL = 64  # a rank at which nothing of a tiny site is cut


class Peers:
    """Two adapters of PEFT on the tiny BERT, and our bricks of the same files."""

    def __init__(self, folder: Path, one: dict[str, Any], two: dict[str, Any]) -> None:
        self.folder = folder
        configs = [
            peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["query"], **given})
            for given in (one, two)
        ]
        self.model = peft.get_peft_model(plain_model("bert"), configs[0], adapter_name="a")
        self.model.add_adapter("b", configs[1])
        for name, value in self.model.named_parameters():
            value.requires_grad_("lora_" in name)
        randomise(self.model, 5, 0.2)
        self.model.eval()
        self.inputs = batch(tiny("bert"))
        self.bricks = [self._brick(name) for name in NAMES]

    def _brick(self, name: str) -> LoRA:
        self.model.save_pretrained(self.folder, selected_adapters=[name])
        files = {file: (self.folder / name / file).read_bytes() for file in FILES}
        return LoRA.restore({}, files, tiny("bert")).eval()

    @torch.no_grad()
    def theirs(self, combination: str, **options: Any) -> Tensor:
        """The answers of PEFT's merge, which is then the adapter ``m``."""
        self.model.base_model.add_weighted_adapter(
            list(NAMES), list(WEIGHTS), "m", combination_type=combination, **options
        )
        self.model.set_adapter("m")
        return answers(self.model.eval(), self.inputs)

    @torch.no_grad()
    def truth(self) -> Tensor:
        """The answers of the plain model with the weighted sum of the updates in its weights."""
        plain = plain_model("bert")
        for path, layer in self.model.base_model.model.named_modules():
            if not isinstance(layer, peft.tuners.lora.LoraLayer):
                continue
            target = plain.get_submodule(path)
            total, bias = target.weight.double(), target.bias.double()
            for name, weight in zip(NAMES, WEIGHTS, strict=True):
                if name in layer.lora_A:
                    update, shift = self._update(name, layer)
                    total, bias = total + weight * update, bias + weight * shift
            target.weight.copy_(total)
            target.bias.copy_(bias)
        return answers(plain, self.inputs)

    def _update(self, name: str, layer: Any) -> tuple[Tensor, Tensor]:
        config = self.model.peft_config[name]
        A, B = layer.lora_A[name].weight.double(), layer.lora_B[name].weight.double()
        rank = A.shape[0]
        scale = config.lora_alpha / (rank**0.5 if config.use_rslora else rank)
        update = scale * B @ A
        if config.use_dora:
            whole = layer.base_layer.weight.double() + update
            magnitude = layer.lora_magnitude_vector[name].weight.double()
            update = magnitude[:, None] * whole / whole.norm(dim=1, keepdim=True)
            update = update - layer.base_layer.weight.double()
        shift = torch.zeros(len(B)).double()
        if config.lora_bias:
            shift = scale * layer.lora_B[name].bias.double()
        return update, shift

    def ours(self, **given: Any) -> Result:
        return merged("linear", self.bricks, WEIGHTS, tiny("bert"), **given)

    def error(self, found: Tensor | Result) -> float:
        """How far answers are from the truth, as a share of what the truth changes."""
        if isinstance(found, Result):
            found = plugged(tiny("bert"), [found.brick], self.inputs)
        truth = self.truth()
        with torch.no_grad():
            bare = answers(plain_model("bert"), self.inputs)
        return ((found - truth).norm() / (truth - bare).norm()).item()


def right(peers: Peers, **given: Any) -> bool:
    return peers.error(peers.ours(**given)) < 1e-5


def test_cross_terms_of_the_factors(tmp_path: Path) -> None:
    """peft#3004 (its fix, peft#3013, was not merged): ``linear`` multiplies sums of factors."""
    peers = Peers(tmp_path, {}, {})
    assert peers.error(peers.theirs("linear")) > 0.3
    assert right(peers)
    # What they compute has a name here, and it is not the default.
    assert peers.error(peers.ours(space="parameters")) > 0.3


def test_the_scale_applied_twice(tmp_path: Path) -> None:
    """PEFT up to 0.20.1: ``svd`` scaled each update twice. The installed release is right."""
    peers = Peers(tmp_path, {}, {"r": 2})
    assert peers.error(peers.theirs("svd", svd_rank=6)) < 1e-4
    assert right(peers) and right(peers, rank=6)
    brick = peers.ours(rank=6).brick
    assert isinstance(brick, LoRA) and set(brick.scales.values()) == {1.0}


@pytest.mark.parametrize(("combination", "options"), [("cat", {}), ("svd", {"svd_rank": 8})])
def test_rslora_is_scaled_by_a_root_again(
    combination: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """peft#3761: the merged config keeps ``use_rslora``, so the sum is too large by √rank."""
    peers = Peers(tmp_path, {"use_rslora": True}, {"use_rslora": True})
    assert peers.error(peers.theirs(combination, **options)) > 0.3
    layer = peers.model.base_model.model.encoder.layer[0].attention.self.query
    sum_of_updates = sum(
        w * peers._update(n, layer)[0] for n, w in zip(NAMES, WEIGHTS, strict=True)
    )
    assert isinstance(sum_of_updates, Tensor)
    assert relative(layer.get_delta_weight("m"), 8**0.5 * sum_of_updates) < 1e-5
    assert right(peers) and right(peers, space="cat") and right(peers, space="core")


def test_rslora_with_lora(tmp_path: Path) -> None:
    """peft#3761 once more: the first adapter's scaling is taken for all."""
    peers = Peers(tmp_path, {"use_rslora": True, "lora_alpha": 3}, {"r": 6})
    assert peers.error(peers.theirs("cat")) > 0.3
    assert right(peers) and right(peers, space="knots")


def test_dora_without_its_magnitude(tmp_path: Path) -> None:
    """peft#3761: the merge of DoRA adapters ignores what they learnt of the rows' lengths."""
    peers = Peers(tmp_path, {"use_dora": True}, {"use_dora": True})
    assert peers.error(peers.theirs("cat")) > 0.1
    assert right(peers, space="delta", rank=FULL)
    with pytest.raises(UserError, match="of a DoRA brick has full rank"):
        peers.ours(space="cat")
    with pytest.raises(UserError, match=r"give merge\.rank=16"):
        peers.ours(space="delta")


def test_dora_with_lora(tmp_path: Path) -> None:
    """peft#3761: of a DoRA and a LoRA adapter PEFT makes a DoRA one."""
    peers = Peers(tmp_path, {"use_dora": True}, {"r": 2})
    assert peers.error(peers.theirs("cat")) > 0.1
    assert right(peers, space="delta", rank=FULL)
    with pytest.raises(UserError, match=r"differ in brick\.dora"):
        peers.ours()


def test_the_bias_is_left_out(tmp_path: Path) -> None:
    """peft#3761: the biases of B are not merged."""
    peers = Peers(tmp_path, {"lora_bias": True}, {"lora_bias": True})
    assert peers.error(peers.theirs("cat")) > 0.05
    assert all(right(peers, space=space) for space in ("delta", "cat", "core", "knots"))


@torch.no_grad()
def test_kasa_without_its_diagonal(tmp_path: Path) -> None:
    """peft#3761: what KaSA learnt between the factors is lost; ours takes no such adapter in."""
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["query"], kasa_config={})  # type: ignore[arg-type]
    config.kasa_config = peft.tuners.lora.config.KasaConfig()
    model = peft.get_peft_model(plain_model("bert"), config, adapter_name="a")
    model.add_adapter("b", config)
    for name, value in model.named_parameters():
        value.requires_grad_("lora_" in name)
    randomise(model, 5, 0.2)
    model.base_model.add_weighted_adapter(list(NAMES), list(WEIGHTS), "m", combination_type="cat")
    layer = model.base_model.model.encoder.layer[0].attention.self.query
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(0))

    def effect(name: str) -> Tensor:
        model.set_adapter(name)
        return layer.eval()(x) - layer.base_layer(x)  # type: ignore[no-any-return]

    total = sum(w * effect(n) for n, w in zip(NAMES, WEIGHTS, strict=True))
    assert isinstance(total, Tensor)
    assert relative(effect("m"), total) > 0.1
    model.save_pretrained(tmp_path, selected_adapters=["a"])
    files = {file: (tmp_path / "a" / file).read_bytes() for file in FILES}
    with pytest.raises(UserError, match="kasa_config"):
        LoRA.restore({}, files, tiny("bert"))


@torch.no_grad()
def test_rank_patterns_break_a_merge_half_way(tmp_path: Path) -> None:
    """peft#3737: ranks that differ by layer. Their second try is silent, and gives nothing."""
    pattern = {"r": 4, "rank_pattern": {"layer.0.attention.self.query": 2}}
    peers = Peers(tmp_path, pattern, {})
    with pytest.raises(RuntimeError):
        peers.theirs("linear")
    assert peers.error(peers.theirs("linear")) > 0.5  # "m" is taken: no error, and no merge
    assert right(peers) and right(peers, space="cat") and right(peers, space="core")
    brick = peers.ours().brick
    assert isinstance(brick, LoRA)
    assert sorted(a.shape[0] for a in brick.lora_A.values()) == [6, 8]


def test_layers_of_the_second_adapter_are_lost(tmp_path: Path) -> None:
    """The merged config is the first adapter's, and with it the layers that it is for."""
    one, two = ({"layers_to_transform": [number]} for number in (0, 1))
    peers = Peers(tmp_path, one, two)
    assert peers.error(peers.theirs("cat")) > 0.3
    assert right(peers) and right(peers, space="cat")


@torch.no_grad()
def test_what_was_merged_is_what_is_loaded(tmp_path: Path) -> None:
    """peft#3737 (peft#3744 was closed): a merge must say the same after saving and loading."""
    pattern = {"rank_pattern": {"layer.0.attention.self.query": 2}, "use_rslora": True}
    peers = Peers(tmp_path, pattern, {"lora_bias": True, "r": 3})
    for given in ({}, {"space": "cat"}, {"rank": 5, "space": "core"}):
        brick = peers.ours(**given).brick
        said = plugged(tiny("bert"), [brick], peers.inputs)
        again = LoRA.restore(brick.interface(), brick.body_files(), tiny("bert")).eval()
        assert torch.equal(plugged(tiny("bert"), [again], peers.inputs), said)
        home = tmp_path / f"merged-{len(given)}"
        home.mkdir()
        for name, content in brick.body_files().items():
            (home / name).write_bytes(content)
        loaded = peft.PeftModel.from_pretrained(plain_model("bert"), home).eval()
        assert (answers(loaded, peers.inputs) - said).abs().max() < 1e-5
    assert right(peers)


def test_signs_elected_after_the_weights() -> None:
    """mergekit#474: the paper's TIES lets updates vote, mergekit's weighted ones."""
    updates, weights = random_updates(3, 12, 10), [0.2, 0.3, 2.0]
    paper = torch.zeros(12, 10).double()
    for row in range(12):
        for column in range(10):
            numbers = updates[:, row, column].tolist()
            plus = sum(numbers) >= 0
            chosen = [w * x for w, x in zip(weights, numbers, strict=True) if x and (x > 0) == plus]
            paper[row, column] = sum(chosen) / max(len(chosen), 1)
    theirs = mergekit("ties", updates, weights, density=1.0)
    assert relative(theirs, paper) > 0.3
    assert relative(combined("ties/paper", updates, weights, density=1.0), paper) < 1e-12
    assert relative(combined("ties/mergekit", updates, weights, density=1.0), theirs) < 1e-6


def test_bricks_of_another_backbone(tmp_path: Path) -> None:
    """Neither peer knows what an adapter was trained on: equal shapes are merged in silence."""
    shelf = Library(tmp_path / "library")
    for name, family in (("a", "bert"), ("b", "modernbert")):
        brick = make(family, {"rank": 2, "sites": ["attn.o"]}, 1)
        recipe = {"backbone": section(family)}
        store(brick, shelf, tiny(family), name=name, operation="train", recipe=recipe)
    with pytest.raises(UserError, match="backbone"):
        assemble(parse("merge(linear, [a, b], weights=[0.5, 0.5])"), shelf, tiny("bert"))


@pytest.mark.parametrize("combination", ["linear", "ties", "magnitude_prune"])
@torch.no_grad()
def test_what_peft_computes_can_be_had(combination: str, tmp_path: Path) -> None:
    """``space=parameters`` and ``ties/peft`` are PEFT's, where one wants those."""
    peers = Peers(tmp_path, {"lora_alpha": 6}, {"lora_alpha": 9})
    options = {} if combination == "linear" else {"density": 0.4}
    theirs = peers.theirs(combination, **options)
    given: dict[str, Any] = {"space": "parameters", "scope": "tensor", **options}
    if combination == "magnitude_prune":
        given["sparsify"] = "magnitude"
    rule = "ties/peft" if combination == "ties" else "linear"
    result = merged(rule, peers.bricks, WEIGHTS, tiny("bert"), **given)
    found = plugged(tiny("bert"), [result.brick], peers.inputs)
    bare = answers(plain_model("bert"), peers.inputs)
    assert ((found - theirs).norm() / (theirs - bare).norm()).item() < 1e-5


@torch.no_grad()
def test_what_mergekit_and_peft_svd_ties_agree_on(tmp_path: Path) -> None:
    """With weights of 1 the rules on ΔW are one: PEFT's ``ties_svd`` at full rank is ours."""
    peers = Peers(tmp_path, {}, {"r": 2})
    theirs = peers.theirs("ties_svd", density=0.4, svd_rank=32)
    result = merged(
        "ties/paper", peers.bricks, WEIGHTS, tiny("bert"), scope="tensor", density=0.4, rank=32
    )
    found = plugged(tiny("bert"), [result.brick], peers.inputs)
    bare = answers(plain_model("bert"), peers.inputs)
    assert ((found - theirs).norm() / (theirs - bare).norm()).item() < 1e-4
