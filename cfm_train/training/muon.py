"""Muon: the momentum of a matrix, made nearly orthogonal, is its step; AdamW takes all else.

Jordan et al. 2024 (kellerjordan.github.io/posts/muon), at the scale of Liu et al. 2025
(arXiv 2502.16982), with which a matrix moves as much as AdamW would move it: one learning rate and
one weight decay then serve both. `torch.optim.Muon` iterates in bfloat16 and takes matrices alone;
here the iteration is in the parameter's own type, exact enough for a resume to be compared and
fast on a processor without native bfloat16, and one optimiser holds the state of a whole model.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

#: Coefficients of the quintic iteration and how often it is done (Jordan et al. 2024).
QUINTIC = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
MOMENTUM = 0.95
#: The root mean square of AdamW's steps, in units of the learning rate (Liu et al. 2025).
ADAMW_SIZE = 0.2


def nearly_orthogonal(matrix: Tensor) -> Tensor:
    """U V' of a matrix U S V', up to singular values of about 0.7 to 1.2.

    Args:
        matrix: [..., rows, columns], real.

    Returns:
        The same shape and dtype.
    """
    a, b, c = QUINTIC
    tall = matrix.shape[-2] > matrix.shape[-1]
    X = matrix.mT if tall else matrix
    X = X / X.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    for _ in range(ITERATIONS):
        gram = X @ X.mT
        X = a * X + (b * gram + c * gram @ gram) @ X
    return X.mT if tall else X


def hidden_matrices(module: nn.Module) -> set[str]:
    """Names of the parameters that Muon is made for: matrices that map hidden states.

    Tables of tokens are none, and neither is what gives the logits, nor a task's head.
    """
    tables = [m for m in module.modules() if isinstance(m, nn.Embedding)]
    tables += [
        out
        for m in module.modules()
        if callable(ask := getattr(m, "get_output_embeddings", None)) and (out := ask()) is not None
    ]
    left = {id(p) for table in tables for p in table.parameters()}
    return {
        name
        for name, p in module.named_parameters()
        if p.ndim == 2 and id(p) not in left and not name.startswith("heads.")
    }


class Muon(torch.optim.AdamW):
    """AdamW whose groups with ``muon=True`` take Muon's steps.

    Args:
        groups: parameter groups with ``lr``; those with ``muon`` hold matrices alone.
        weight_decay: decoupled decay, of all groups.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], weight_decay: float) -> None:
        super().__init__([{"muon": False, **group} for group in groups], weight_decay=weight_decay)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step of every group."""
        groups = self.param_groups
        try:
            self.param_groups = [group for group in groups if not group["muon"]]
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            if group["muon"]:
                self._orthogonal_step(group)
        return loss

    def _orthogonal_step(self, group: dict[str, Any]) -> None:
        alike: dict[tuple[Any, ...], list[Tensor]] = {}
        for p in group["params"]:
            if p.grad is not None:
                alike.setdefault((p.shape, p.dtype, p.device), []).append(p)
        for parameters in alike.values():
            directions = torch.stack([self._momentum(p) for p in parameters])
            rows, columns = parameters[0].shape
            size = group["lr"] * ADAMW_SIZE * max(rows, columns) ** 0.5
            for p, direction in zip(parameters, nearly_orthogonal(directions), strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-size)

    def _momentum(self, parameter: Tensor) -> Tensor:
        """Nesterov's momentum of a parameter's gradients."""
        gradient = parameter.grad
        assert gradient is not None
        state = self.state[parameter]
        if not state:
            # AdamW looks for a count of steps in every state that it takes up.
            state["step"] = torch.tensor(0.0)
            state["momentum"] = torch.zeros_like(parameter)
        state["step"] += 1
        momentum: Tensor = state["momentum"]
        momentum.lerp_(gradient, 1 - MOMENTUM)
        return gradient.lerp(momentum, MOMENTUM)
