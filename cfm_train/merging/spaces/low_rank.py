"""Low-rank bricks as updates of a site's weight: exact sums, products, and truncation to a rank.

Nothing is multiplied out unless it must be: a sum of updates is the factors side by side, and its
best approximation of a lower rank comes from two triangular factors and the SVD of the small matrix
between them (the Frobenius optimum, Eckart and Young 1936).
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from cfm_train.bricks.bank import bias_of, weight_of
from cfm_train.bricks.brick import Brick, parameter_name
from cfm_train.bricks.lora import LoRA
from cfm_train.bricks.peft_modules import overlap
from cfm_train.errors import UserError
from cfm_train.merging.spaces.space import Entry, Options, Result, Space

if TYPE_CHECKING:
    from cfm_train.backbone.load import Backbone


#: A share of an update that is left out up to this is the rounding of float32 entries.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Factors:
    """One brick's update of one site, ``B A``.

    Attributes:
        A: ``[rank, in]`` float64.
        B: ``[out, rank]`` float64, the scale in it.
    """

    A: Tensor
    B: Tensor


def low_rank(bricks: Sequence[Brick], space: str) -> list[LoRA]:
    """The bricks as LoRA bricks.

    Raises:
        UserError: one of them is of another kind.
    """
    other = next((brick for brick in bricks if not isinstance(brick, LoRA)), None)
    if other is not None:
        raise UserError(
            f"merge.space={space} is for low-rank updates, and a brick of kind {other.kind} has "
            "none: use merge.space=parameters."
        )
    return cast("list[LoRA]", list(bricks))


def is_dora(brick: LoRA) -> bool:
    """Whether the brick's update depends on the backbone's weight (DoRA)."""
    return len(brick.magnitude) > 0


def factors(brick: LoRA, site: str) -> Factors:
    """The factors of a site, whatever rank and scale it has there; rank 0 where it has none."""
    key = parameter_name(site)
    return Factors(
        brick.lora_A[key].detach().double(),
        brick.lora_B[key].detach().double() * brick.scales[site],
    )


def dense(brick: LoRA, site: str, backbone: Backbone) -> Tensor:
    """The update ``ΔW`` of a site's weight, ``[out, in]`` float64; for DoRA too.

    DoRA's weight is ``m ⊙ (W + sBA) / ‖W + sBA‖`` (row norms), so its update is that minus W.
    """
    found = factors(brick, site)
    product = found.B @ found.A
    key = parameter_name(site)
    if key not in brick.magnitude:
        return product
    place = backbone.sites[site]
    weight = weight_of(backbone.model.get_submodule(place.module), place).detach().double()
    adapted = weight + product.to(weight.device)
    ratio = brick.magnitude[key].detach().double() / adapted.norm(dim=1)
    return ratio[:, None] * adapted - weight


def added_bias(brick: LoRA, site: str, backbone: Backbone) -> Tensor | None:
    """What a brick adds to a site's output whatever the input is, ``[out]`` float64, or None."""
    key = parameter_name(site)
    if key not in brick.bias:
        return None
    bias = brick.bias[key].detach().double()
    if brick.hyper["bias"] == "lora_bias":
        return brick.scales[site] * bias
    place = backbone.sites[site]
    own = bias_of(backbone.model.get_submodule(place.module), place)
    return bias if own is None else bias - own.detach().double()


def truncate(left: Tensor, right: Tensor, rank: int | None) -> tuple[Factors, float]:
    """The best approximation of ``left @ right`` of a rank, without multiplying it out.

    Args:
        left: ``[out, k]`` float64.
        right: ``[k, in]`` float64.
        rank: 1 or more; None, or ``k`` and more, leaves the factors as they are.

    Returns:
        Factors with the singular values' roots on both sides, and what was left out as a share of
        the whole (relative Frobenius norm).
    """
    if rank is None or rank >= left.shape[1]:
        return Factors(right, left), 0.0
    between_left, outer = triangle(left)
    between_right, inner = triangle(right.T)
    U, S, Vh = torch.linalg.svd(between_left @ between_right.T, full_matrices=False)
    return keep(outer(U[:, :rank]), S, inner(Vh[:rank].T).T, rank)


def triangle(tall: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """``tall = Q R``: R, and what multiplies a few columns by Q without making all of Q.

    R comes from the Gram matrix (a fraction of the work of a QR), unless its columns are so nearly
    dependent that squaring them would cost more digits than float32 has to spare.

    Args:
        tall: ``[n, k]`` float64.

    Returns:
        R ``[k, k]``, upper triangular, and a function from ``[k, m]`` to ``[n, m]``.
    """
    R, failed = torch.linalg.cholesky_ex(tall.T @ tall, upper=True)
    size = R.diagonal().abs()
    if not failed and size.min() > 1e-3 * size.max():
        # Long rows are multiplied several times faster than many short ones.
        wide = tall.T
        return (
            R,
            lambda columns: (
                (torch.linalg.solve_triangular(R, columns, upper=True).T.contiguous() @ wide).T
            ),
        )
    Q, R = torch.linalg.qr(tall)
    return R, lambda columns: Q @ columns


def truncate_dense(update: Tensor, rank: int) -> tuple[Factors, float]:
    """As `truncate`, for a matrix ``[out, in]`` that is there in full."""
    if rank >= min(update.shape):
        wide = update.shape[0] <= update.shape[1]
        eye = torch.eye(min(update.shape), dtype=update.dtype, device=update.device)
        return (Factors(update, eye) if wide else Factors(eye, update)), 0.0
    U, S, Vh = torch.linalg.svd(update, full_matrices=False)
    return keep(U, S, Vh, rank)


def keep(U: Tensor, S: Tensor, Vh: Tensor, rank: int) -> tuple[Factors, float]:
    """The first ``rank`` triplets of an SVD, and the share (of the norm) of the others.

    Args:
        U: ``[out, k]``, of which the first ``rank`` columns are read.
        S: ``[k]``, falling; all of them.
        Vh: ``[k, in]``, of which the first ``rank`` rows are read.
        rank: how many are kept; the roots of their values go to both sides.
    """
    root = S[:rank].sqrt()
    whole = S.norm().item()
    lost = S[rank:].norm().item() / whole if whole else 0.0
    return Factors(root[:, None] * Vh[:rank], U[:, :rank] * root), lost


class Merged:
    """A low-rank brick in the making.

    Args:
        bricks: the parents.
        backbone: their backbone.
        options: rank and λ.
    """

    def __init__(self, bricks: Sequence[LoRA], backbone: Backbone, options: Options) -> None:
        self.bricks = bricks
        self.backbone = backbone
        self.options = options
        self.updates: dict[str, Factors] = {}
        self.biases: dict[str, Tensor] = {}
        self.lost: float | None = None

    def sites(self) -> list[str]:
        """The sites that a parent touches, in the backbone's order."""
        return [name for name in self.backbone.sites if any(name in b.scales for b in self.bricks)]

    def refuse_overlap(self) -> None:
        """Refuses sites that share rows of a weight (a fused one, and a part of it).

        Raises:
            UserError: two do; a plain sum alone may take them one by one.
        """
        sites = [self.backbone.sites[name] for name in self.sites()]
        for number, site in enumerate(sites):
            for other in sites[:number]:
                if overlap(site, other):
                    raise UserError(
                        f"The bricks change '{other.name}' and '{site.name}', which share rows of "
                        "one weight: only rule=linear or rule=task_arithmetic with sparsify=none "
                        "can merge them."
                    )

    def has_bias(self, site: str) -> bool:
        """Whether a parent adds a bias there."""
        return any(parameter_name(site) in brick.bias for brick in self.bricks)

    def whole_rank(self, site: str) -> int:
        """The sum of the parents' ranks at a site."""
        return sum(b.lora_A[parameter_name(site)].shape[0] for b in self.bricks if site in b.scales)

    def add(self, site: str, update: tuple[Factors, float]) -> None:
        """Takes up a site's update and what its truncation lost."""
        self.updates[site], lost = update
        self.lost = max(lost, self.lost or 0.0)

    def add_product(self, site: str, left: Tensor, right: Tensor) -> None:
        """Takes up ``left @ right`` at the rank asked for."""
        self.add(site, truncate(left * self.options.scale, right, self.options.rank))

    def add_bias(self, site: str, bias: Tensor) -> None:
        """Takes up the merged bias ``[out]`` of a site."""
        self.biases[site] = bias * self.options.scale

    def result(self) -> Result:
        """The brick: alpha is the rank, so that PEFT and we scale by one; cast once, here."""
        rank = max(found.A.shape[0] for found in self.updates.values())
        brick = LoRA(
            rank=rank,
            alpha=rank,
            dropout=0.0,
            sites=list(self.updates),
            layers=None,
            rslora=False,
            dora=False,
            bias="lora_bias" if self.biases else "none",
        )
        brick.task_type = self.bricks[0].task_type
        for name, found in self.updates.items():
            site = self.backbone.sites[name]
            bias = None
            if self.biases:
                bias = self.biases.get(name, torch.zeros(site.out_features))
            A, B = found.A.float().contiguous(), found.B.float().contiguous()
            brick.add_site(site, A, B, A.shape[0], None, bias)
            brick.know(self.backbone, site)
        cut = self.options.rank is not None or (self.lost or 0.0) > _ROUNDING
        return Result(brick.to(self.backbone.device), self.lost if cut else None)


class LowRankSpace(Space):
    """What all spaces of low-rank updates share: LoRA in, LoRA out, biases added one by one.

    Attributes:
        loras: the parents.
        merged: the brick in the making.
    """

    def __init__(self, bricks: Sequence[Brick], backbone: Backbone, options: Options) -> None:
        super().__init__(bricks, backbone, options)
        self.loras = low_rank(bricks, self.kind)
        self.merged = Merged(self.loras, backbone, options)

    def refuse_overlap(self) -> None:
        """See the contract."""
        self.merged.refuse_overlap()

    def entries(self) -> Iterator[Entry]:
        """Each site's update as the space has it, and the biases."""
        for site in self.merged.sites():
            yield self.update_entry(site)
            if self.merged.has_bias(site):
                yield Entry(f"{site}.bias", site, functools.partial(self.biases, site))

    def put(self, entry: Entry, merged: Tensor) -> None:
        """See the contract."""
        if entry.name.endswith(".bias"):
            self.merged.add_bias(entry.site, merged.double())
        else:
            self.put_update(entry.site, merged.double())

    def result(self) -> Result:
        """A LoRA brick."""
        return self.merged.result()

    @abstractmethod
    def update_entry(self, site: str) -> Entry:
        """The updates of a site's weight, float32."""

    @abstractmethod
    def put_update(self, site: str, merged: Tensor) -> None:
        """Takes up what became of `update_entry`, float64; λ is applied here."""

    def biases(self, site: str) -> Tensor:
        """The biases that the bricks add at a site, ``[N, out]`` float64."""
        width = self.backbone.sites[site].out_features
        nothing = torch.zeros(width, dtype=torch.float64)
        found = [added_bias(brick, site, self.backbone) for brick in self.loras]
        return torch.stack([nothing if bias is None else bias.cpu() for bias in found])
