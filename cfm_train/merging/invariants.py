"""What a rule promises, tried on the run's own bricks: the figures go into the record."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cfm_train.bricks.brick import Brick
from cfm_train.merging.engine import Statistics, merge, open_space
from cfm_train.merging.mix import Mix
from cfm_train.merging.rule import PROMISES
from cfm_train.merging.sparsify.none import Nothing

if TYPE_CHECKING:
    from cfm_train.backbone.load import Backbone

Answer = Callable[[Sequence[Brick]], Tensor]


@torch.inference_mode()
def try_promises(
    bricks: Sequence[Brick],
    weights: object,
    mix: Mix,
    backbone: Backbone,
    *,
    sources: Sequence[str],
    statistics: Statistics | None = None,
) -> dict[str, dict[str, Any]]:
    """Tries what the mix's rule promises, on random tokens.

    Args:
        bricks: the parents of the merge.
        weights: their weights, as `merge` takes them.
        mix: the merge.
        backbone: the backbone, nothing plugged.
        sources: name and version of each parent.
        statistics: for rules that need them.

    Returns:
        One check for each promise: the largest difference of hidden states (an encoder) or logits
        as a share of the largest one, its tolerance, and whether it holds.
    """
    trial = _Trial(bricks, weights, mix, backbone, list(sources), statistics)
    # A rounding of the factors, which the layers above carry on.
    tolerance = 1e-4 if backbone.dtype == torch.float32 else 0.1
    kept = mix.rule.promises - open_space(mix, bricks[:1], backbone).breaks()
    checks = {}
    for name in sorted(kept):
        worst = max((share for share in getattr(trial, name)()), default=None)
        if worst is not None:
            checks[PROMISES[name]] = {
                "value": worst,
                "tolerance": tolerance,
                "passed": worst <= tolerance,
            }
    return checks


@dataclasses.dataclass
class _Trial:
    """One method for each promise; each yields differences as shares."""

    bricks: Sequence[Brick]
    weights: object
    mix: Mix
    backbone: Backbone
    sources: list[str]
    statistics: Statistics | None

    def identity(self) -> Iterator[float]:
        """One brick alone."""
        if self.mix.rule.fewest == 1:
            for number, brick in enumerate(self.bricks):
                yield self._apart([brick], [self._merged(self._plain, [number], [1.0])])

    def idempotent(self) -> Iterator[float]:
        """A brick with itself."""
        for number, brick in enumerate(self.bricks):
            twice = self._merged(self._plain, [number, number], None)
            yield self._apart([brick], [twice])

    def cancel(self) -> Iterator[float]:
        """A brick and its negative."""
        for number, brick in enumerate(self.bricks):
            yield self._apart([], [self._merged(self._plain, [number, number], [0.7, -0.7])], brick)

    def off(self) -> Iterator[float]:
        """λ = 0."""
        nothing = dataclasses.replace(self.mix, scale=0.0)
        merged = self._merged(nothing, range(len(self.bricks)), self.weights)
        yield self._apart([], [merged], self.bricks[0])

    def permutation(self) -> Iterator[float]:
        """The other way round."""
        forth = range(len(self.bricks))
        back = list(reversed(forth))
        weights = self.weights
        mix = self.mix
        if isinstance(weights, Sequence):
            weights = list(reversed(weights))
        if mix.filters:
            turned = [[pattern, *reversed(given)] for pattern, *given in mix.filters]
            mix = dataclasses.replace(mix, filters=turned)
        one = self._merged(self.mix, forth, self.weights)
        yield self._apart([one], [self._merged(mix, back, weights)])

    @property
    def _plain(self) -> Mix:
        """The rule alone: nothing dropped, cut or scaled, no weights but those of the trial."""
        return dataclasses.replace(
            self.mix, sparsifier=Nothing(), rank=None, scale=1.0, filters=None, normalize=False
        )

    def _merged(self, mix: Mix, numbers: Sequence[int], weights: object) -> Brick:
        chosen = [self.bricks[number] for number in numbers]
        statistics = self.statistics

        def of(site: str) -> list[Tensor]:
            assert statistics is not None
            found = statistics(site)
            return [found[number] for number in numbers]

        return merge(
            chosen,
            weights if mix.equal else None,
            mix,
            self.backbone,
            sources=[self.sources[number] for number in numbers],
            statistics=of if statistics else None,
        ).brick

    def _apart(
        self, one: Sequence[Brick], other: Sequence[Brick], scale: Brick | None = None
    ) -> float:
        """The largest difference of two plans' answers, as a share of the largest answer."""
        a, b = self._answer(one), self._answer(other)
        size = self._answer([scale]) if scale is not None else a
        return ((a - b).abs().max() / size.abs().max()).item()

    def _answer(self, bricks: Sequence[Brick]) -> Tensor:
        backbone = self.backbone
        size = backbone.model.get_input_embeddings().weight.shape[0]
        ids = torch.randint(size, (2, 12), generator=torch.Generator().manual_seed(0))
        ids = ids.to(backbone.device)
        with backbone.slots.plugged(list(bricks)):
            if backbone.model.get_output_embeddings() is None:
                return backbone.hidden_states(ids).float()
            more = {"decoder_input_ids": ids} if backbone.family == "encoder-decoder" else {}
            return backbone.logits(input_ids=ids, **more).float()
