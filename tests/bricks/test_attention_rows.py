"""Attention rows: the laws, keys and values by hand, and one fact for each row."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cfm_train.backbone.load import Backbone
from cfm_train.backbone.plugs import KV
from cfm_train.bricks.brick import parameter_name
from cfm_train.bricks.rows import Rows
from tests import brick_laws as laws
from tests.backbones import FAMILIES, bare, batch, randomise, tiny
from tests.fact_cases import FACTS, solo


def rows(backbone: Backbone, **changed: Any) -> Rows:
    return Rows(**{"rows": 2, "sites": ["attn"], "layers": None} | changed).build(backbone)


@pytest.mark.parametrize("family", FAMILIES)
class TestLaws:
    def test_unplugs_exactly(self, family: str) -> None:
        laws.unplugs_exactly(rows, family)

    def test_rows_are_their_own(self, family: str) -> None:
        laws.rows_are_their_own(rows, family, untouched=1e-5)

    def test_only_the_brick_learns(self, family: str) -> None:
        laws.only_the_brick_learns(rows, family)

    def test_round_trips(self, family: str) -> None:
        laws.round_trips(rows, family)


def test_keys_of_some_rows_only_have_no_positions() -> None:
    with pytest.raises(ValueError, match="shift=False"):
        KV("layer.0.attn", torch.zeros(1, 2, 4), torch.zeros(1, 2, 4), members=torch.ones)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_one_fact_for_each_row(family: str) -> None:
    """Also against keys and values plugged in by hand, without a stack of facts."""
    backbone = tiny(family)
    inputs = batch(backbone, rows=4)
    brick = Rows(rows=2, sites=["attn"], layers=None).for_facts(FACTS).build(backbone)
    randomise(brick, scale=0.3)
    solo(brick, backbone, inputs)

    class ByHand:
        def plugs(self) -> list[KV]:
            keys = {site: parameter_name(site) for site in brick.site_names}
            return [
                KV(site, brick.keys[key][2], brick.values[key][2], shift=False)
                for site, key in keys.items()
            ]

    brick.fire(torch.tensor([2, 2, 2, 2]))
    expected = laws.plugged(backbone, [ByHand()], inputs)  # type: ignore[list-item]
    torch.testing.assert_close(laws.plugged(backbone, [brick], inputs), expected, atol=1e-5, rtol=0)
    brick.fire(torch.tensor([-1, -1, -1, -1]))
    assert torch.equal(laws.plugged(backbone, [brick], inputs), bare(backbone, inputs))
