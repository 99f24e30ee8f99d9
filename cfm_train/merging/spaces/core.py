"""Core space: small cores between bases that all bricks share (arXiv 2509.17786).

With ``U`` an orthonormal basis of the columns of all B, ``V`` one of the rows of all A, every
update is ``U Mᵢ Vᵀ`` exactly, and the rule merges the cores ``Mᵢ = UᵀBᵢAᵢV`` (at most Σr × Σr
numbers). Any mix of ranks; nothing is multiplied out.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cfm_train.bricks.brick import Brick
from cfm_train.errors import UserError
from cfm_train.merging.spaces.low_rank import LowRankSpace, factors, is_dora, keep
from cfm_train.merging.spaces.space import Entry, Options

if TYPE_CHECKING:
    from cfm_train.backbone.load import Backbone


class Core(LowRankSpace):
    """Cores ``[Σr, Σr]`` in the bases of the stacked factors."""

    def __init__(self, bricks: Sequence[Brick], backbone: Backbone, options: Options) -> None:
        super().__init__(bricks, backbone, options)
        if any(map(is_dora, self.loras)):
            raise UserError(
                "The update of a DoRA brick has full rank and so no core: use merge.space=delta "
                "with merge.rank=16 or another rank."
            )

    def update_entry(self, site: str) -> Entry:
        """A site's cores, float32."""
        return Entry(f"{site}.core", site, functools.partial(self._cores, site))

    def put_update(self, site: str, merged: Tensor) -> None:
        """``ΔW = U M Vᵀ``."""
        left, right = self._bases(site)
        U, S, Vh = torch.linalg.svd(merged * self.options.scale, full_matrices=False)
        cut = keep(left @ U, S, Vh @ right.T, self.options.rank or len(S))
        self.merged.add(site, cut)

    @functools.cache  # noqa: B019 (a space lives as long as its merge)
    def _bases(self, site: str) -> tuple[Tensor, Tensor]:
        """Orthonormal bases ``[out, k]`` of all B and ``[in, l]`` of all A at a site."""
        found = [factors(brick, site) for brick in self.loras if site in brick.scales]
        return (
            basis(torch.cat([one.B for one in found], dim=1)),
            basis(torch.cat([one.A for one in found]).T),
        )

    def _cores(self, site: str) -> Tensor:
        left, right = self._bases(site)
        cores = left.new_zeros(len(self.loras), left.shape[1], right.shape[1])
        for core, brick in zip(cores, self.loras, strict=True):
            if site in brick.scales:
                found = factors(brick, site)
                core.copy_((left.T @ found.B) @ (found.A @ right))
        # The factors were float32, and what a rule takes for rounding goes by the dtype.
        return cores.float()


def basis(columns: Tensor) -> Tensor:
    """An orthonormal basis ``[n, k]`` of some columns ``[n, m]``: their left singular vectors.

    Singular vectors up to their sign, not those of a QR: they do not depend on the order in which
    the bricks stand, and so neither does what a rule does to the numbers of a core.
    """
    U, S, _ = torch.linalg.svd(columns, full_matrices=False)
    if not len(S) or not S[0]:
        return columns.new_zeros(columns.shape[0], 1)
    U = U[:, S[0] * 1e-12 < S]
    # The sign of a singular vector is free: the largest number of each is made positive.
    top = U.gather(0, U.abs().argmax(0, keepdim=True))
    return U * torch.where(top < 0, -1.0, 1.0)
