"""Gram matrices and Fisher diagonals against what hooks and autograd see of the same rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from cfm_train.backbone.load import Backbone
from cfm_train.bricks.brick import Brick
from cfm_train.bricks.stored import store
from cfm_train.configuration.expression import BrickRef
from cfm_train.data.encode import TaskData
from cfm_train.errors import UserError
from cfm_train.library.store import Library
from cfm_train.merging import sidecars
from cfm_train.statistics import fisher, gram
from cfm_train.statistics.observer import batches, observed_sites
from cfm_train.training.objectives import compute
from tests.backbones import bare, batch, randomise, tiny
from tests.tasks import task_data
from tests.training.runs import new_brick

ROWS = 12
FAMILIES = ("bert", "llama", "gpt2")


def setting(family: str, kind: str = "classification") -> tuple[Backbone, Brick, TaskData]:
    backbone = tiny(family)
    task = task_data(backbone, kind)
    brick = new_brick(
        backbone, {task.spec.name: task}, "lora", rank=2, sites=["attn.q", "ffn.down"]
    )
    randomise(brick, 3, 0.2)
    return backbone, brick.eval().requires_grad_(False), task


def rows_seen(task: TaskData, backbone: Backbone) -> list[Any]:
    return list(batches(task, ROWS, 0, backbone))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_gram_matrix_is_that_of_the_modules_inputs(family: str) -> None:
    backbone, brick, task = setting(family)
    sites = observed_sites([brick], backbone)
    seen: list[int] = []
    found = gram.gather(backbone, brick, task, sites, rows=ROWS, seed=0, progress=seen.append)
    assert sum(seen) == ROWS and set(found) == set(sites)
    kept: dict[str, torch.Tensor] = {}
    expected = {site: torch.zeros(()).double() for site in sites}
    tokens = 0
    for one in rows_seen(task, backbone):
        mask = one["attention_mask"].bool()
        tokens += int(mask.sum())
        hooks = [
            backbone.model.get_submodule(backbone.sites[site].module).register_forward_pre_hook(
                lambda module, args, site=site, kept=kept: kept.update({site: args[0].double()})
            )
            for site in sites
        ]
        with backbone.slots.plugged([brick]), torch.no_grad():
            compute(task.spec.type, backbone, brick.head_for(task.spec.name), one)
        for hook in hooks:
            hook.remove()
        for site, x in kept.items():
            expected[site] = expected[site] + torch.einsum("ni,nj->ij", x[mask], x[mask])
    for site in sites:
        torch.testing.assert_close(
            found[site].double(), expected[site] / tokens, rtol=1e-4, atol=1e-7
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_fisher_diagonal_is_the_squared_gradient_of_the_weight(family: str) -> None:
    """The oracle takes each row's gradient by the product of B A that stands for the weight."""
    backbone, brick, task = setting(family, "regression")
    sites = [site for site in observed_sites([brick], backbone) if "attn.q" in site]
    found = fisher.gather(
        backbone, brick, task, sites, rows=ROWS, seed=0, progress=lambda count: None
    )
    head = brick.head_for(task.spec.name)
    sums = {site: torch.zeros(()).double() for site in sites}
    for one in rows_seen(task, backbone):
        for number in range(len(one["index"])):
            alone = {
                k: v[number : number + 1] if isinstance(v, torch.Tensor) else v
                for k, v in one.items()
            }
            weights = {}
            # A second brick of full rank, all zeros, whose B is the change of the weight.
            change = new_brick(backbone, {}, "bitfit", parameters=["attn.q.weight"])
            with backbone.slots.plugged([brick, change]), torch.enable_grad():
                result = compute(task.spec.type, backbone, head, alone)
                result.loss.backward()
            for site in sites:
                weights[site] = dict(change.named_parameters())[
                    f"delta.{site.replace('.', '-')}-weight"
                ].grad
                sums[site] = sums[site] + weights[site].double().square()
    for site in sites:
        torch.testing.assert_close(found[site].double(), sums[site] / ROWS, rtol=1e-3, atol=1e-10)


def test_labels_of_classification_are_drawn_by_seed_and_nothing_stays_plugged() -> None:
    backbone, brick, task = setting("bert")
    inputs = batch(backbone)
    before = bare(backbone, inputs)
    first, again, other = (
        fisher.gather(
            backbone, brick, task, brick.site_names, rows=ROWS, seed=seed, progress=lambda n: None
        )
        for seed in (0, 0, 1)
    )
    for site in brick.site_names:
        assert torch.equal(first[site], again[site])
        assert not torch.equal(first[site], other[site])
        assert bool((first[site] >= 0).all())
    assert torch.equal(bare(backbone, inputs), before)


def test_the_sidecars_name_what_is_missing(tmp_path: Path) -> None:
    backbone, brick, _ = setting("bert")
    library = Library(tmp_path)
    card = store(brick, library, backbone, name="one", operation="train", recipe={}, data=[])
    tree, cards = BrickRef(card.name, card.version), {card.ref: card}
    with pytest.raises(UserError, match=r"one has no gram statistics: run recipe=analyze/gram"):
        sidecars.find("gram", [tree], cards, library)
    for rows, value in ((8, 1.0), (16, 2.0)):
        sidecar = library.sidecar(card, f"hash{rows}")
        sidecar.write("gram.safetensors", save({"layer.0.attn.q": torch.full((2, 2), value)}))
        sidecar.write("gram.json", f'{{"rows": {rows}}}'.encode())
    of = sidecars.read(sidecars.find("gram", [tree], cards, library), "gram")
    assert of("layer.0.attn.q")[0][0, 0] == 2.0, "that of the most rows"
    with pytest.raises(UserError, match=r"no gram statistics of site 'layer\.1\.attn\.q'"):
        of("layer.1.attn.q")
