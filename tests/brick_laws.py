"""The laws that every brick kind keeps, checked on the tiny backbones: each kind's tests call them.

``make`` builds a new brick of the kind on a backbone. A kind's test file adds its own oracle.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from cfm_train.backbone.load import Backbone
from cfm_train.bricks.brick import Brick
from tests.backbones import answers, bare, batch, randomise, tiny

Make = Callable[[Backbone], Brick]


def plugged(
    backbone: Backbone,
    bricks: Sequence[Brick],
    inputs: dict[str, Tensor],
    weights: Sequence[float | Tensor | None] | None = None,
) -> Tensor:
    """The answers with bricks, under ``inference_mode``."""
    with backbone.slots.plugged(bricks, weights), torch.inference_mode():
        return answers(backbone, inputs)


def random_brick(make: Make, backbone: Backbone, seed: int = 1, scale: float = 0.1) -> Brick:
    """A brick that does something."""
    brick = make(backbone).eval()
    randomise(brick, seed, scale)
    return brick


def starts_as_identity(
    make: Make, family: str, dtypes: Sequence[str] = ("float32", "bfloat16")
) -> None:
    """A new brick leaves every answer as it was, to the bit."""
    for dtype in dtypes:
        backbone = tiny(family, dtype)
        inputs = batch(backbone)
        brick = make(backbone).eval()
        assert all(p.dtype == torch.float32 for p in brick.parameters())
        assert torch.equal(plugged(backbone, [brick], inputs), bare(backbone, inputs)), dtype


def unplugs_exactly(make: Make, family: str) -> None:
    """A brick changes the answers, its absence does not, and the backbone never moves."""
    for dtype in ("float32", "bfloat16"):
        backbone = tiny(family, dtype)
        inputs, checksum = batch(backbone), backbone.checksum()
        before = bare(backbone, inputs)
        brick = random_brick(make, backbone)
        changed = plugged(backbone, [brick], inputs)
        assert changed.dtype == before.dtype
        assert changed.isfinite().all()
        assert (changed - before).abs().max() > 1e-3
        assert torch.equal(bare(backbone, inputs), before)
        assert backbone.checksum() == checksum


def rows_are_their_own(
    make: Make, family: str, scale: float = 0.1, untouched: float = 1e-6
) -> None:
    """Rows of a mixed batch equal their solo runs; rows without a brick equal the bare backbone.

    ``untouched``: how far the latter may be off; kernels change where a row becomes longer.
    """
    backbone = tiny(family)
    inputs = batch(backbone, rows=4)
    one, two = (random_brick(make, backbone, seed, scale) for seed in (1, 2))
    weights = [torch.tensor([1.0, 0, 0, 1]), torch.tensor([0.0, 1, 0, 0])]
    mixed = plugged(backbone, [one, two], inputs, weights)
    alone = [plugged(backbone, [brick], inputs) for brick in (one, two)]
    for row, expected in enumerate((alone[0], alone[1], bare(backbone, inputs), alone[0])):
        tolerance = untouched if row == 2 else 1e-5
        torch.testing.assert_close(mixed[row], expected[row], atol=tolerance, rtol=0)


def only_the_brick_learns(make: Make, family: str) -> None:
    """Gradients reach every parameter of the brick and nothing of the backbone."""
    backbone = tiny(family)
    brick = random_brick(make, backbone).train()
    with backbone.slots.plugged([brick]):
        answers(backbone, batch(backbone)).square().mean().backward()
    for name, value in brick.named_parameters():
        if value.requires_grad:
            assert value.grad is not None and value.grad.abs().sum() > 0, name
    assert all(p.grad is None and not p.requires_grad for p in backbone.parameters())


def round_trips(make: Make, family: str) -> None:
    """What `files` and `interface` write, `restore` reads: the same answers to the bit."""
    backbone = tiny(family)
    inputs = batch(backbone)
    brick = random_brick(make, backbone)
    interface = json.loads(json.dumps(brick.interface()))
    again = type(brick).restore(interface, brick.files(), backbone).eval()
    assert torch.equal(plugged(backbone, [again], inputs), plugged(backbone, [brick], inputs))
    assert again.interface() == brick.interface()
    assert again.files() == brick.files()


def answers_like(oracle: nn.Module, brick: Brick, backbone: Backbone) -> None:
    """The brick answers as the oracle does, and not as the bare backbone; then both learn.

    After it the parameters of the oracle and of the brick hold the gradients of one loss.
    """
    inputs = batch(backbone)
    expected = answers(oracle, inputs)
    with backbone.slots.plugged([brick]):
        found = answers(backbone, inputs)
    assert (expected - bare(backbone, inputs)).abs().max() > 1e-2
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    expected.square().mean().backward()
    found.square().mean().backward()


def recomputes_the_same(make: Make, family: str) -> None:
    """Gradient checkpointing gives the gradients that a plain backward gives."""
    backbone = tiny(family)
    inputs = batch(backbone)
    brick = random_brick(make, backbone).train()

    def gradients() -> list[Tensor]:
        brick.zero_grad()
        torch.manual_seed(0)
        with backbone.slots.plugged([brick]):
            answers(backbone, inputs).square().mean().backward()
        return [p.grad.clone() for p in brick.parameters() if p.requires_grad]

    expected = gradients()
    with checkpointing(backbone) as layers:
        assert layers > 0
        found = gradients()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-5)


class checkpointing:
    """Turns gradient checkpointing on for a ``with`` block; the layers' dropout stays off."""

    def __init__(self, backbone: Backbone) -> None:
        from transformers.modeling_layers import GradientCheckpointingLayer

        self.model = backbone.model
        self.layers = [m for m in self.model.modules() if isinstance(m, GradientCheckpointingLayer)]

    def __enter__(self) -> int:
        self.model.activation_checkpointing_enable({"use_reentrant": False})
        for layer in self.layers:
            layer.training = True  # the flag alone: what lies inside stays in eval mode
        return len(self.layers)

    def __exit__(self, *_: object) -> None:
        self.model.activation_checkpointing_disable()
        self.model.disable_input_require_grads()  # transformers turned them on and leaves them on
        for layer in self.layers:
            layer.training = False


def generates_with_a_cache(make: Make, family: str) -> None:
    """``generate`` writes the same with and without a cache, and not what the bare model writes."""
    backbone = tiny(family)
    ids = batch(backbone, length=6)["input_ids"].clamp_min(3)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    brick = random_brick(make, backbone, scale=0.3)

    def write(use_cache: bool) -> tuple[Tensor, Tensor]:
        written = backbone.model.generate(
            **inputs,
            max_new_tokens=6,
            min_new_tokens=6,
            do_sample=False,
            use_cache=use_cache,
            output_logits=True,
            return_dict_in_generate=True,
        )
        return written.sequences, torch.stack(written.logits)

    plain = write(True)[1]
    with backbone.slots.plugged([brick]):
        (tokens, logits), (again, slow) = write(True), write(False)
    assert torch.equal(tokens, again)
    torch.testing.assert_close(logits, slow, atol=1e-4, rtol=0)
    assert (logits[0] - plain[0]).abs().max() > 1e-3
