"""Names of sites: patterns, layer numbers, and what is said about names that are not there."""

from __future__ import annotations

import pytest

from cfm_train.backbone.sites import Site, SiteMap
from cfm_train.errors import UserError


def sites_of(stacks: dict[str, int]) -> SiteMap:
    sites = [Site(f"{s}embed", f"{s}embed", "embed", 64, 8) for s in stacks]
    for stack, count in stacks.items():
        for i in range(count):
            layer = f"{stack}layer.{i}"
            sites.append(Site(layer, layer, "layer", 8, 8))
            sites.append(Site(f"{layer}.attn", f"{layer}.attn", "attention", 8, 8))
            for at, role in enumerate("qkv"):
                rows = ((8 * at, 8 * at + 8),)
                sites.append(Site(f"{layer}.attn.{role}", f"{layer}.fused", "linear", 8, 8, rows))
            sites.append(Site(f"{layer}.attn.qkv", f"{layer}.fused", "linear", 8, 24))
            sites.append(Site(f"{layer}.attn.o", f"{layer}.o", "linear", 8, 8))
            sites.append(Site(f"{layer}.norm.0", f"{layer}.ln", "norm", 8, 8))
    sites.append(Site("norm", "ln", "norm", 8, 8))
    absent = {f"{s}layer.1.ffn.down": "The experts have no sites of their own." for s in stacks}
    return SiteMap(sites, 8, stacks, absent)


ONE = sites_of({"": 3})
TWO = sites_of({"encoder.": 2, "decoder.": 3})


def names(sites: SiteMap, *patterns: str, layers: list[int] | None = None) -> list[str]:
    return [site.name for site in sites.select(patterns, layers)]


@pytest.mark.parametrize(
    ("patterns", "layers", "expected"),
    [
        (["attn.q"], None, ["layer.0.attn.q", "layer.1.attn.q", "layer.2.attn.q"]),
        (["attn.q"], [-1], ["layer.2.attn.q"]),
        (["attn.q"], [0, -1], ["layer.0.attn.q", "layer.2.attn.q"]),
        (["layer.1.attn.q"], None, ["layer.1.attn.q"]),
        (["v", "q"], [1], ["layer.1.attn.q", "layer.1.attn.v"]),
        (["layer"], None, ["layer.0", "layer.1", "layer.2"]),
        (["attn"], [2], ["layer.2.attn"]),
        (["embed"], [2], ["embed"]),
        # A wildcard never takes the whole of a fused module beside its parts.
        (["attn.*"], [0], [f"layer.0.attn.{r}" for r in "qkvo"]),
        (["attn.[qk]*"], [0], ["layer.0.attn.q", "layer.0.attn.k"]),
        (["attn.qkv"], [0], ["layer.0.attn.qkv"]),
        (["norm"], None, ["layer.0.norm.0", "layer.1.norm.0", "layer.2.norm.0", "norm"]),
        (["layer.norm"], [0], ["layer.0.norm.0"]),
        (["attn.q", "layer.*.attn.q"], [0], ["layer.0.attn.q"]),
    ],
)
def test_select(patterns: list[str], layers: list[int] | None, expected: list[str]) -> None:
    assert names(ONE, *patterns, layers=layers) == expected


def test_layers_count_from_the_top_of_each_stack() -> None:
    expected = ["encoder.layer.1.attn.q", "decoder.layer.2.attn.q"]
    assert names(TWO, "attn.q", layers=[-1]) == expected
    assert names(TWO, "attn.q", layers=[2]) == ["decoder.layer.2.attn.q"]
    assert names(TWO, "encoder.layer.attn.q") == [f"encoder.layer.{i}.attn.q" for i in range(2)]
    assert names(TWO, "decoder.layer.*.attn.q", layers=[0]) == ["decoder.layer.0.attn.q"]


@pytest.mark.parametrize(
    ("patterns", "layers", "message"),
    [
        (["attn.qq"], None, r"no site 'attn\.qq'\. Did you mean 'attn\.q"),
        (["zzz"], None, r"no site 'zzz'\. Valid names: attn\.k, .*embed"),
        (["tn.q"], None, "no site"),
        ([""], None, "no site"),
        (["attn.q"], [3], "no layer 3: it has 3 layers"),
        (["attn.q"], [-4], "no layer -4"),
        (["ffn.down"], None, "experts have no sites"),
        (["ffn.*"], [1], "experts have no sites"),
        (["ffn.*"], [0], "no site"),
    ],
)
def test_what_is_not_there(patterns: list[str], layers: list[int] | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ONE.select(patterns, layers)


def test_map_of_names() -> None:
    assert ONE["layer.1.attn.k"].rows == ((8, 16),)
    assert len(ONE) == len(list(ONE)) == len(ONE.items())
    assert "layer.1.attn.k" in ONE
    assert "attn.k" not in ONE
    assert ONE.get("attn.k") is None
    with pytest.raises(UserError, match=r"no site 'attn\.k'\. Did you mean"):
        ONE["attn.k"]
    with pytest.raises(UserError, match="experts"):
        ONE["layer.1.ffn.down"]
    parts = [site.name.rsplit(".", 1)[1] for site in ONE.values() if site.module == "layer.2.fused"]
    assert parts == ["q", "k", "v", "qkv"]


def test_place_of_a_site() -> None:
    site = TWO["decoder.layer.2.attn.q"]
    assert (site.stack, site.layer) == ("decoder.", 2)
    assert (TWO["encoder.embed"].stack, TWO["encoder.embed"].layer) == ("encoder.", None)
    assert (ONE["layer.0"].stack, ONE["layer.0"].layer) == ("", 0)
    assert (ONE["norm"].stack, ONE["norm"].layer) == ("", None)
