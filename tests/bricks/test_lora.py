"""LoRA, rsLoRA and DoRA: the laws of every kind, and PEFT as the oracle in both directions."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import brick_laws as laws
import peft
import pytest
import torch
from backbones import FAMILIES, answers, bare, batch, plain_model, randomise, tiny
from safetensors.torch import load, save
from torch import Tensor

from cfm_train.backbone.load import Backbone
from cfm_train.bricks.lora import LoRA
from cfm_train.errors import UserError

#: q, v, a projection of the feed-forward and the output: what PEFT calls them in each family.
MODULES = {
    "bert": ["query", "value", "intermediate.dense"],
    "llama": ["q_proj", "v_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "attn.c_proj", "c_fc"],
    "t5": ["q", "v", "wi", "wo"],
}
VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "lora_bias": {"bias": "lora_bias"},
    "lora_only": {"bias": "lora_only"},
    "dora_lora_only": {"dora": True, "bias": "lora_only"},
}


def lora(backbone: Backbone, **changed: Any) -> LoRA:
    """A new brick; attention's q and v and a feed-forward site unless told otherwise."""
    hyper: dict[str, Any] = {
        "rank": 4,
        "alpha": 7,
        "dropout": 0.0,
        "sites": ["attn.q", "attn.v", "ffn.down"],
        "layers": None,
        "rslora": False,
        "dora": False,
        "bias": "none",
    }
    return LoRA(**hyper | changed).build(backbone)


def maker(variant: str, **changed: Any) -> laws.Make:
    return lambda backbone: lora(backbone, **VARIANTS[variant] | changed)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
class TestLaws:
    def test_starts_as_identity(self, family: str, variant: str) -> None:
        laws.starts_as_identity(maker(variant), family)

    def test_unplugs_exactly(self, family: str, variant: str) -> None:
        laws.unplugs_exactly(maker(variant), family)

    def test_rows_are_their_own(self, family: str, variant: str) -> None:
        laws.rows_are_their_own(maker(variant), family)

    def test_only_the_brick_learns(self, family: str, variant: str) -> None:
        laws.only_the_brick_learns(maker(variant), family)

    def test_round_trips(self, family: str, variant: str) -> None:
        laws.round_trips(maker(variant), family)

    def test_recomputes_the_same(self, family: str, variant: str) -> None:
        laws.recomputes_the_same(maker(variant), family)


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_generates_with_a_cache(family: str, variant: str) -> None:
    laws.generates_with_a_cache(maker(variant), family)


def peft_config(family: str, variant: str, **changed: Any) -> Any:
    hyper = VARIANTS[variant]
    bias = hyper.get("bias", "none")
    return peft.LoraConfig(
        **{
            "r": 4,
            "lora_alpha": 7,
            "target_modules": MODULES[family],
            "use_rslora": hyper.get("rslora", False),
            "use_dora": hyper.get("dora", False),
            "lora_bias": bias == "lora_bias",
            "bias": bias if bias == "lora_only" else "none",
            "fan_in_fan_out": family == "gpt2",
        }
        | changed
    )


def trained_by_peft(family: str, config: Any) -> Any:
    """A PEFT model whose trainable parameters are random."""
    model = peft.get_peft_model(plain_model(family), config)
    trained = torch.nn.ParameterList(p for p in model.parameters() if p.requires_grad)
    randomise(trained)
    return model.eval()


def files_of(model: Any, folder: Path) -> dict[str, bytes]:
    # An adapter of the LM head would bring a copy of the head's own weight.
    model.save_pretrained(folder, save_embedding_layers=False)
    names = ("adapter_config.json", "adapter_model.safetensors")
    return {name: (folder / name).read_bytes() for name in names}


def restored(files: dict[str, bytes], backbone: Backbone) -> LoRA:
    return LoRA.restore({}, files, backbone).eval()


def in_peft(brick: LoRA, family: str, folder: Path) -> Any:
    """The brick exported and loaded by PEFT."""
    folder.mkdir()
    for name, content in brick.body_files().items():
        (folder / name).write_bytes(content)
    return peft.PeftModel.from_pretrained(plain_model(family), folder).eval()


@torch.no_grad()
def values(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    return answers(model, inputs)


#: A rank and an alpha of its own for some modules, by a suffix and by a path.
PATTERNS = {
    "bert": {"value": 2, r"encoder\.layer\.1\..*query": 3},
    "llama": {"v_proj": 2, r"model\.layers\.1\..*q_proj": 3},
    "gpt2": {"c_fc": 2, r"transformer\.h\.1\..*c_attn": 3},
    "t5": {"SelfAttention.v": 2, r"decoder\..*\.q": 3},
}


@pytest.mark.parametrize("mixed", [False, True], ids=["one-rank", "patterns"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_peft_in_both_directions(
    family: str, variant: str, mixed: bool, tmp_path: Path
) -> None:
    """PEFT's adapter runs here with PEFT's logits and gradients, and goes back as it came."""
    ranks = PATTERNS[family]
    patterns = {"rank_pattern": ranks, "alpha_pattern": {k: 3.3 * r for k, r in ranks.items()}}
    config = peft_config(family, variant, **(patterns if mixed else {}))
    theirs = trained_by_peft(family, config)
    files = files_of(theirs, tmp_path / "theirs")
    backbone = tiny(family)
    inputs = batch(backbone)
    brick = restored(files, backbone)
    assert len({A.shape[0] for A in brick.lora_A.values()}) == (3 if mixed else 1)

    expected = values(theirs, inputs)
    assert (expected - bare(backbone, inputs)).abs().max() > 1e-2
    torch.testing.assert_close(laws.plugged(backbone, [brick], inputs), expected, atol=1e-5, rtol=0)

    exported = in_peft(brick, family, tmp_path / "ours")
    assert torch.equal(values(exported, inputs), expected)

    compare_gradients(brick, theirs, backbone, inputs)


def compare_gradients(
    brick: LoRA, theirs: Any, backbone: Backbone, inputs: dict[str, Tensor]
) -> None:
    """Every parameter's gradient of one loss equals PEFT's."""
    brick.requires_grad_(True).zero_grad()
    theirs.zero_grad()
    for parameter in theirs.parameters():
        parameter.grad = None
    with backbone.slots.plugged([brick]):
        answers(backbone, inputs).square().mean().backward()
    answers(theirs, inputs).square().mean().backward()
    found = {
        name: p.grad.abs().sum().item()
        for name, p in theirs.named_parameters()
        if p.requires_grad and p.grad is not None
    }
    by_name = dict(theirs.named_parameters())
    parts = {
        "lora_A": (brick.lora_A, ".lora_A.default.weight"),
        "lora_B": (brick.lora_B, ".lora_B.default.weight"),
        "magnitude": (brick.magnitude, ".lora_magnitude_vector.default.weight"),
        "bias": (
            brick.bias,
            ".base_layer.bias" if brick.hyper["bias"] == "lora_only" else ".lora_B.default.bias",
        ),
    }
    compared = 0
    for own, suffix in parts.values():
        for site in brick.site_names:
            key = site.replace(".", "-")
            if key in own:
                peer = by_name[f"base_model.model.{brick.built_for[site].module}{suffix}"]
                torch.testing.assert_close(own[key].grad, peer.grad, atol=1e-6, rtol=1e-4)
                compared += 1
    assert compared == len(found) == sum(1 for _ in brick.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_made_here_runs_in_peft(family: str, variant: str, tmp_path: Path) -> None:
    """On GPT-2 q and v are slices of c_attn: one block adapter for PEFT, taken apart again here."""
    backbone = tiny(family)
    inputs = batch(backbone)
    brick = laws.random_brick(maker(variant, layers=[-1]), backbone)
    assert all(backbone.sites[name].layer == 1 for name in brick.site_names)
    ours = laws.plugged(backbone, [brick], inputs)
    theirs = in_peft(brick, family, tmp_path / "ours")  # type: ignore[arg-type]
    torch.testing.assert_close(values(theirs, inputs), ours, atol=1e-5, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_slices_of_different_ranks_and_scales_are_one_adapter(variant: str, tmp_path: Path) -> None:
    backbone = tiny("gpt2")
    inputs = batch(backbone)
    brick = lora(backbone, **VARIANTS[variant], sites=["attn.q", "ffn.up"])
    wider = lora(backbone, **VARIANTS[variant], sites=["attn.k"], rank=6, alpha=5)
    for name in wider.site_names:
        key, site = name.replace(".", "-"), backbone.sites[name]
        parts = [d.get(key, None) for d in (wider.magnitude, wider.bias)]
        brick.add_site(site, wider.lora_A[key], wider.lora_B[key], 5, *parts)
        brick.know(backbone, site)
    randomise(brick.eval())
    ours = laws.plugged(backbone, [brick], inputs)
    theirs = in_peft(brick, "gpt2", tmp_path / "ours")
    torch.testing.assert_close(values(theirs, inputs), ours, atol=1e-5, rtol=0)
    again = LoRA.restore(json.loads(json.dumps(brick.interface())), brick.files(), backbone)
    torch.testing.assert_close(
        laws.plugged(backbone, [again.eval()], inputs), ours, atol=1e-5, rtol=0
    )
    # From here on nothing is folded any more: in and out without losing a bit.
    assert again.files() == brick.files()
    assert {A.shape[0] for A in again.lora_A.values()} == {4, 6}


@pytest.mark.parametrize("rank", [3, 5, 7])
@pytest.mark.parametrize("rslora", [False, True])
def test_scales_survive_to_the_last_bit(rank: int, rslora: bool) -> None:
    """Alphas that no short decimal names, on whole modules and on slices."""
    for family, alpha in (("llama", math.pi), ("gpt2", 1 / 3), ("gpt2", 1e-12)):
        backbone = tiny(family)
        brick = lora(backbone, rank=rank, alpha=alpha, rslora=rslora)
        again = LoRA.restore(json.loads(json.dumps(brick.interface())), brick.files(), backbone)
        assert again.scales == brick.scales
        assert set(brick.scales.values()) == {alpha / (math.sqrt(rank) if rslora else rank)}


@pytest.mark.parametrize("family", FAMILIES)
def test_bank_equals_each_brick_alone(family: str) -> None:
    """Many bricks in one batch: any ranks, sites and variants; numbers and rows as weights."""
    backbone = tiny(family)
    inputs = batch(backbone, rows=4)
    bricks = [
        lora(backbone, rank=2),
        lora(backbone, rank=8, sites=["attn.q", "attn.k"], rslora=True),
        lora(backbone, rank=1, sites=["attn.v", "ffn.up"], layers=[0]),
        lora(backbone, rank=3, dora=True),
        lora(backbone, rank=3, bias="lora_bias"),
    ]
    for seed, brick in enumerate(bricks):
        randomise(brick.eval(), seed)
    alone = [laws.plugged(backbone, [brick], inputs) for brick in bricks]
    rows = torch.eye(4)
    weights = [*rows, torch.zeros(4)]
    mixed = laws.plugged(backbone, bricks, inputs, weights)
    for row in range(4):
        torch.testing.assert_close(mixed[row], alone[row][row], atol=1e-5, rtol=0)
    # A number for all rows, and the same number for every row, are the same thing.
    half = laws.plugged(backbone, bricks[:2], inputs, [0.5, None])
    same = laws.plugged(backbone, bricks[:2], inputs, [torch.full((4,), 0.5), torch.ones(4)])
    torch.testing.assert_close(half, same, atol=1e-5, rtol=0)


def test_weights_scale_the_update_by_row_and_token() -> None:
    """The definition: y + w ⊙ s B A x at one site, in float64 by hand."""
    backbone = tiny("llama")
    inputs = batch(backbone, rows=3)
    bricks = [lora(backbone, rank=r, sites=["layer.1.ffn.down"]) for r in (2, 5)]
    for seed, brick in enumerate(bricks):
        randomise(brick.eval(), seed)
    generator = torch.Generator().manual_seed(3)
    weights = [
        torch.rand(inputs["input_ids"].shape, generator=generator),
        torch.tensor([0.5, 0, 2]),
    ]
    module = backbone.model.model.layers[1].mlp.down_proj
    seen: list[tuple[Tensor, Tensor]] = []
    handle = module.register_forward_hook(lambda m, args, y: seen.append((args[0], y)))
    try:
        laws.plugged(backbone, bricks, inputs, weights)
    finally:
        handle.remove()
    x, y = seen[0]
    x = x.double()
    expected = x @ module.weight.double().T
    for brick, weight in zip(bricks, weights, strict=True):
        (A,), (B,) = brick.lora_A.values(), brick.lora_B.values()
        update = 7 / A.shape[0] * (x @ A.double().T @ B.double().T)
        expected = expected + update * weight.reshape(*weight.shape, *(1,) * (3 - weight.ndim))
    torch.testing.assert_close(y.double(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_dropout_is_pefts(variant: str, tmp_path: Path) -> None:
    """The same generator state drops the same features, in training mode alone."""
    theirs = trained_by_peft("llama", peft_config("llama", variant, lora_dropout=0.5))
    backbone = tiny("llama")
    inputs = batch(backbone)
    brick = restored(files_of(theirs, tmp_path), backbone)
    assert brick.hyper["dropout"] == 0.5
    for module in theirs.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.train()
    torch.manual_seed(5)
    expected = values(theirs, inputs)
    torch.manual_seed(5)
    found = laws.plugged(backbone, [brick.train()], inputs)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    quiet = laws.plugged(backbone, [brick.eval()], inputs)
    assert (found - quiet).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_language_model_head(family: str, tmp_path: Path) -> None:
    """GPT-2's head shares its weight with the embedding, which stays as it is."""
    theirs = trained_by_peft(family, peft_config(family, "lora", target_modules=["lm_head"]))
    backbone = tiny(family)
    inputs = batch(backbone)
    brick = restored(files_of(theirs, tmp_path), backbone)
    assert brick.site_names == ("head",)
    torch.testing.assert_close(
        laws.plugged(backbone, [brick], inputs), values(theirs, inputs), atol=1e-5, rtol=0
    )


def test_adapter_of_a_wrapped_class_finds_its_modules(tmp_path: Path) -> None:
    """PEFT trained a classifier: ``bert.`` stands before every path, and its head lies aside."""
    import transformers as tf
    from backbones import folder

    classifier = tf.BertForSequenceClassification.from_pretrained(folder("bert"))
    config = peft_config("bert", "lora", task_type="SEQ_CLS")
    theirs = peft.get_peft_model(classifier, config).eval()
    randomise(torch.nn.ParameterList(p for n, p in theirs.named_parameters() if "lora_" in n))
    files = files_of(theirs, tmp_path)
    assert b"classifier" in files["adapter_model.safetensors"]
    backbone = tiny("bert")
    inputs = batch(backbone)
    body = theirs.base_model.model.bert
    torch.testing.assert_close(
        laws.plugged(backbone, [restored(files, backbone)], inputs),
        values(body, inputs),
        atol=1e-5,
        rtol=0,
    )


def _changed(files: dict[str, bytes], **keys: Any) -> dict[str, bytes]:
    config = json.loads(files["adapter_config.json"]) | keys
    return files | {"adapter_config.json": json.dumps(config).encode()}


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"alora_invocation_tokens": [3]}, "alora_invocation_tokens"),
        ({"init_lora_weights": "pissa"}, "rewrites"),
        ({"bias": "all"}, "every bias"),
        ({"use_dora": True}, "lora_magnitude_vector"),
        ({"lora_bias": True}, "lora_B.bias"),
        ({"r": 5}, "rank 5"),
        ({"rank_pattern": {"q_proj": 2}}, "rank 2"),
    ],
)
def test_what_is_not_computed_stops_the_load(keys: dict[str, Any], words: str) -> None:
    backbone = tiny("llama")
    files = lora(backbone).files()
    with pytest.raises(UserError, match=words):
        restored(_changed(files, **keys), backbone)


def test_tensors_that_do_not_fit_are_named() -> None:
    llama = tiny("llama")
    files = lora(llama).files()
    with pytest.raises(UserError, match="trained on another model"):
        restored(files, tiny("bert"))
    dora = lora(llama, dora=True).files()
    with pytest.raises(UserError, match="does not speak of"):
        restored(_changed(dora, use_dora=False), llama)
    narrow = lora(llama, sites=["attn.v"]).files()
    moved = narrow["adapter_model.safetensors"].replace(b"v_proj", b"q_proj")
    with pytest.raises(UserError, match="features"):
        restored(narrow | {"adapter_model.safetensors": moved}, llama)
    # As if PEFT had wrapped one stack of T5: paths that end like a module of either.
    files = lora(tiny("t5"), sites=["encoder.layer.0.attn.q"]).files()
    stem = "base_model.model."
    tensors = {
        name.replace(f"{stem}encoder.", stem): value
        for name, value in load(files["adapter_model.safetensors"]).items()
    }
    with pytest.raises(UserError, match=r"may be any of decoder.* encoder"):
        restored(files | {"adapter_model.safetensors": save(tensors)}, tiny("t5"))


def test_sites_that_set_a_row_twice_are_refused() -> None:
    backbone = tiny("gpt2")
    for changed in ({"dora": True}, {"bias": "lora_only"}):
        with pytest.raises(UserError, match="share output rows"):
            lora(backbone, sites=["attn.qkv", "attn.q"], **changed)
    with pytest.raises(UserError, match="lora_bias"):
        lora(backbone, dora=True, bias="lora_bias")
    laws.round_trips(lambda b: lora(b, sites=["attn.qkv", "attn.q"]), "gpt2")


def test_a_site_that_is_not_linear_is_refused() -> None:
    with pytest.raises(UserError, match="not a linear layer"):
        lora(tiny("llama"), sites=["layer.0"])
