"""What cannot be stitched: one sentence, from the cards alone and again from the bricks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cfm_train.bricks.brick import Brick
from cfm_train.bricks.heads import Head
from cfm_train.bricks.kinds import make_brick
from cfm_train.bricks.stored import store
from cfm_train.config.compose import option
from cfm_train.configuration.apply import plain
from cfm_train.configuration.parser import parse
from cfm_train.configuration.pin import pin
from cfm_train.errors import UserError
from cfm_train.library.store import Library
from cfm_train.stitching.cards import check_fold, check_tree, check_trees
from cfm_train.stitching.fold import fold
from cfm_train.stitching.mode import Mode, mode_of, modes
from cfm_train.stitching.stitch import stitch_bricks
from tests.backbones import section, tiny

Spec = tuple[str, dict[str, Any]]

Q: dict[str, Any] = {"sites": ["attn.q"]}
DOWN: dict[str, Any] = {"sites": ["ffn.down"]}
SHORT: dict[str, Any] = {"tokens": 3}

CASES: dict[str, tuple[str, list[Spec], str]] = {
    "wide chain": ("chain", [("lora", DOWN), ("lora", DOWN)], "maps 48 to 32 features: mode=chain"),
    "wide pipe": ("pipe", [("lora", DOWN), ("lora", DOWN)], "maps 48 to 32 features: mode=pipe"),
    "dora": ("chain", [("lora", Q), ("dora", Q)], r"\(DoRA\) adds .* mode=chain .* use mode=sum"),
    "two doras": ("pipe", [("dora", Q), ("dora", Q)], r"\(DoRA\) adds .* use mode=sum"),
    "lora_only": (
        "pipe",
        [("lora", Q | {"bias": "lora_only"}), ("lora", Q)],
        "bias=lora_only.* use mode=sum",
    ),
    "parallel adapters": (
        "chain",
        [("parallel", {}), ("parallel", {})],
        "parallel adapter.* cannot be fed .* use mode=sum",
    ),
    "deltas": ("chain", [("bitfit", {}), ("bitfit", {})], "delta.* use mode=sum"),
    "two ends of a site": ("sum", [("lora", DOWN), ("pfeiffer", {})], "meet at 'layer.0.ffn.down'"),
    "input and output": ("chain", [("ia3", {}), ("pfeiffer", {})], "meet at 'layer.0.ffn.down'"),
    "two prompts": ("sum", [("soft_prompt", SHORT), ("soft_prompt", SHORT)], "use mode=prompt"),
    "prompt, prefix": ("chain", [("soft_prompt", SHORT), ("prefix", SHORT)], "use mode=prompt"),
    "no prompt": ("prompt", [("soft_prompt", SHORT), ("lora", Q)], "'b' acts on .* use mode=sum"),
    "no tokens": ("prompt", [("prefix", SHORT), ("head", {})], "'b' has none"),
    "prefixes apart": (
        "prompt",
        [("prefix", SHORT | {"layers": [0]}), ("prefix", SHORT)],
        r"'a' does not act on 'layer.1.attn', where 'b' does \(1 such sites\)",
    ),
    "piped prompt": ("pipe", [("soft_prompt", SHORT), ("lora", Q)], "fed through a pipe"),
    "missing in a pipe": (
        "pipe",
        [("lora", {"sites": ["attn.q", "attn.o"]}), ("lora", Q)],
        r"'b' does not act on 'layer.0.attn.o', where 'a' does \(2 such sites\)",
    ),
    "head in a pipe": ("pipe", [("lora", Q), ("head", {})], "'b' does not act on"),
    "peft": ("sum", [("vera", Q), ("lora", Q)], r"'a' \(vera\) computes the output"),
}


def build(spec: Spec, family: str = "bert") -> Brick:
    kind, changed = spec
    return make_brick({**option("brick", kind), **changed}).build(tiny(family))


def shelf(root: Path, bricks: dict[str, Brick], family: str = "bert") -> Library:
    """A library with bricks in it."""
    library = Library(root / "outputs" / "library")
    for name, brick in bricks.items():
        recipe = {"backbone": section(family)}
        store(brick, library, tiny(family), name=name, operation="train", recipe=recipe)
    return library


@pytest.mark.parametrize("case", CASES)
def test_refused_from_cards_and_from_bricks(case: str, tmp_path: Path) -> None:
    mode, specs, sentence = CASES[case]
    bricks = dict(zip("ab", map(build, specs), strict=True))
    library = shelf(tmp_path, bricks)
    with pytest.raises(UserError, match=sentence):
        trees = [pin(parse(name), library) for name in bricks]
        check_trees(mode_of(mode), trees, list(bricks), library)
    with pytest.raises(UserError, match=sentence):
        stitch_bricks(mode, list(bricks.values()), tiny("bert"), list(bricks))


def test_parts_of_a_fused_module() -> None:
    """The whole of c_attn and its q share features: side by side they add up, else not."""
    backbone = tiny("gpt2")
    one, two = build(("lora", {"sites": ["attn.qkv"]}), "gpt2"), build(("lora", Q), "gpt2")
    with pytest.raises(UserError, match="share features of one module"):
        stitch_bricks("chain", [one, two], backbone)
    stitch_bricks("sum", [one, two], backbone)
    other = build(("lora", {"sites": ["attn.v"]}), "gpt2")
    assert len(stitch_bricks("chain", [two, other], backbone).site_names) == 4


def test_slices_are_measured_on_the_backbone(tmp_path: Path) -> None:
    """Llama's v is narrower than its input."""
    specs = [("lora", {"sites": ["attn.v"]})] * 2
    with pytest.raises(UserError, match="maps 32 to 16 features"):
        stitch_bricks("chain", [build(spec, "llama") for spec in specs], tiny("llama"))


def test_what_is_inside_is_checked_too(tmp_path: Path) -> None:
    bricks = {"a": build(("lora", DOWN)), "b": build(("lora", DOWN)), "c": build(("lora", Q))}
    library = shelf(tmp_path, bricks)
    tree = pin(parse("stitch([a, b])"), library)
    assert str(tree).endswith("mode=chain)")
    with pytest.raises(UserError, match="maps 48 to 32"):
        check_trees(mode_of("sum"), [tree, pin(parse("c"), library)], ["x", "c"], library)
    with pytest.raises(UserError, match=r"no stitching mode 'chian'.*chain"):
        nested = pin(parse("stitch([a, c], mode=chian)"), library)
        check_trees(mode_of("sum"), [nested], ["x"], library)


def test_only_low_rank_updates_fold(tmp_path: Path) -> None:
    backbone = tiny("bert")
    one, two = build(("pfeiffer", {})), build(("lora", Q))
    with pytest.raises(UserError, match=r"pfeiffer adapter brick .* cannot be folded into a LoRA"):
        fold(stitch_bricks("sum", [one, two], backbone), backbone)
    library = shelf(tmp_path, {"a": one, "b": two})
    trees = [pin(parse(name), library) for name in "ab"]
    with pytest.raises(UserError, match=r"fold=true .* 'a' \(pfeiffer adapter\)"):
        check_fold(check_trees(mode_of("sum"), trees, ["a", "b"], library))


def test_a_brick_after_itself(tmp_path: Path) -> None:
    """Its width counts too: two bricks of one name are still two."""
    brick = build(("lora", DOWN))
    library = shelf(tmp_path, {"a": brick})
    with pytest.raises(UserError, match=r"'a@.*' and 'a@.*' meet .* maps 48 to 32"):
        check_tree(pin(parse("stitch([a, a])"), library), library)
    with pytest.raises(UserError, match=r"'a' and 'a' meet .* maps 48 to 32"):
        stitch_bricks("chain", [brick, brick], tiny("bert"), ["a", "a"])


def test_a_stitch_that_is_no_low_rank_update_is_not_merged(tmp_path: Path) -> None:
    bricks = {"a": build(("pfeiffer", {})), "b": build(("pfeiffer", {}))}
    library = shelf(tmp_path, bricks)
    tree = pin(parse("merge(linear, [stitch([a, b]), stitch([b, a])])"), library)
    with pytest.raises(UserError, match=r"\(pfeiffer adapter\) .* cannot be merged"):
        check_tree(tree, library)
    stitched = stitch_bricks("chain", list(bricks.values()), tiny("bert"))
    with pytest.raises(UserError, match=r"\(pfeiffer adapter\) .* cannot be merged"):
        plain(stitched, tiny("bert"))


def test_different_heads_for_one_task(tmp_path: Path) -> None:
    one, two = build(("lora", Q)), build(("lora", Q))
    for brick in (one, two):
        brick.add_head("t", Head("classification", ["x", "y"], 32, "mean"))
    with pytest.raises(UserError, match="different heads for 't'"):
        stitch_bricks("sum", [one, two], tiny("bert"))
    assert set(stitch_bricks("sum", [one, one], tiny("bert")).heads) == {"t"}
    same = build(("lora", Q))
    same.add_head("t", one.heads["t"])  # type: ignore[arg-type]
    library = shelf(tmp_path, {"a": one, "b": two, "c": same})
    check_tree(pin(parse("stitch([a, c])"), library), library)
    with pytest.raises(UserError, match=r"a@.* and b@.* bring different heads for 't'"):
        check_tree(pin(parse("stitch([a, merge(linear, [c, b])])"), library), library)


def test_modes_are_found_by_their_files() -> None:
    assert modes() == ("chain", "pipe", "prompt", "sum")
    with pytest.raises(UserError, match=r"no stitching mode 'chian'\. Did you mean 'chain'"):
        mode_of("chian")


@pytest.mark.parametrize(("port", "lacks"), [("linear", "updates"), ("output", "states")])
def test_a_mode_that_cannot_join_what_it_lets_meet_is_no_class(port: str, lacks: str) -> None:
    together = frozenset({port})
    with pytest.raises(TypeError, match=lacks):
        type("Half", (Mode,), {"meets": (together,)})
    type("Beside", (Mode,), {"meets": (together,), "side_by_side": together})


def test_the_command_refuses_before_torch(tmp_path: Path) -> None:
    """Exit code 2, one sentence, nothing written, torch never imported."""
    shelf(tmp_path, {"a": build(("lora", DOWN)), "b": build(("lora", DOWN))})
    before = sorted(tmp_path.rglob("*"))
    code = (
        "import sys; from cfm_train.launch.cli import main\n"
        "code = main(sys.argv[1:]); assert 'torch' not in sys.modules; sys.exit(code)"
    )
    for arguments, sentence in (
        (["recipe=stitch/chain", "name=x", "bricks=[a,b]"], "maps 48 to 32 features"),
        (["recipe=stitch/sum", "name=x", "bricks=[a]"], "at least two bricks"),
        (["recipe=stitch/sum", "name=x", "bricks=[a,b]", "mode=smu"], "Did you mean 'sum'"),
        (["recipe=stitch/sum", "name=x", "bricks=[a,b]", "tasks=[nothing]"], "no task 'nothing'"),
        (
            ["recipe=stitch/sum", "name=x", "bricks=[a,'stitch([a, b], deep=3)']"],
            "the parameter 'deep'",
        ),
        (["recipe=compare/bricks", "bricks=['stitch([a, b])']"], "maps 48 to 32 features"),
        (["recipe=evaluate/tasks", "bricks=['merge(linear, [a, stitch([b, a])])']"], "maps 48"),
        (
            [
                "recipe=predict",
                "bricks=['stitch([a, b], mode=pipe)']",
                "data.input=x.jsonl",
                "out=y.jsonl",
            ],
            "maps 48 to 32 features",
        ),
    ):
        ran = subprocess.run(
            [sys.executable, "-c", code, *arguments, "tracking=disabled"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env={"PYTHONPATH": str(Path(__file__).parents[2]), "PATH": "/usr/bin:/bin"},
            check=False,
        )
        assert ran.returncode == 2 and sentence in ran.stderr, ran.stderr
    assert sorted(tmp_path.rglob("*")) == before
