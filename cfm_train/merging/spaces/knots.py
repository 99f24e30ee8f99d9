"""KnOTS: updates in one shared basis of outputs (Stoica et al. 2024, arXiv 2410.19735).

    [ΔW₁ … ΔW_N] = U Σ [V₁ … V_N]ᵀ          merged = U Σ merge(V₁ … V_N)ᵀ

The rule sees each brick's ``Vᵢᵀ`` ``[k, in]``. The decomposition is taken of the factors, so
nothing of the outputs' width is multiplied out.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cfm_train.bricks.brick import Brick
from cfm_train.errors import UserError
from cfm_train.merging.spaces.core import basis
from cfm_train.merging.spaces.low_rank import LowRankSpace, factors, is_dora
from cfm_train.merging.spaces.space import Entry, Options

if TYPE_CHECKING:
    from cfm_train.backbone.load import Backbone


class Knots(LowRankSpace):
    """Blocks ``Vᵢᵀ`` in the basis that the updates' columns share.

    Where no brick's B depends on the others', ``VᵢᵀVⱼ`` is zero and all singular values of a block
    are one.
    """

    flat = True

    def __init__(self, bricks: Sequence[Brick], backbone: Backbone, options: Options) -> None:
        super().__init__(bricks, backbone, options)
        if any(map(is_dora, self.loras)):
            raise UserError(
                "The update of a DoRA brick has full rank and no factors to align: use "
                "merge.space=delta with merge.rank=16 or another rank."
            )

    def update_entry(self, site: str) -> Entry:
        """A site's blocks, float32."""
        return Entry(f"{site}.aligned", site, functools.partial(self._blocks, site))

    def put_update(self, site: str, merged: Tensor) -> None:
        """``ΔW = U Σ Vᵀ``."""
        scaled, _ = self._aligned(site)
        self.merged.add_product(site, scaled, merged)

    @functools.cache  # noqa: B019 (a space lives as long as its merge)
    def _aligned(self, site: str) -> tuple[Tensor, Tensor]:
        """``U Σ`` ``[out, k]`` and the blocks ``[N, k, in]`` of ``Vᵀ``."""
        place = self.backbone.sites[site]
        found = [factors(b, site) if site in b.scales else None for b in self.loras]
        columns = basis(torch.cat([one.B for one in found if one is not None], dim=1))
        blocks = columns.new_zeros(len(found), columns.shape[1], place.in_features)
        for block, one in zip(blocks, found, strict=True):
            if one is not None:
                block.copy_((columns.T @ one.B) @ one.A)
        # [k, N·in]: small, since k is at most the sum of the ranks. Its Gram matrix is the sum of
        # those of the blocks, the same in any order of the bricks.
        U, S, Vh = torch.linalg.svd(torch.cat(list(blocks), dim=1), full_matrices=False)
        # The factors were float32. Directions below its rounding are no directions of an update,
        # and their vectors, as long as all others, must not take part in what a rule compares; nor
        # may a brick that has nothing in a direction vote there with the rounding of a zero.
        rounding = torch.finfo(torch.float32).eps
        some = max(S[0].item(), 1e-300) * rounding < S
        if not some.any():  # no brick changes anything here
            return columns.new_zeros(len(columns), 1), blocks[:, :1].float()
        U, S, Vh = U[:, some], S[some], Vh[some]
        aligned = (U / S).T @ blocks
        aligned[aligned.abs() < rounding * Vh.abs().amax(1, keepdim=True)] = 0
        return columns @ (U * S), aligned.float()

    def _blocks(self, site: str) -> Tensor:
        return self._aligned(site)[1]
