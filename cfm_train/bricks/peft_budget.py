"""AdaLoRA's rank budget: PEFT's allocator, with its memory kept where a checkpoint finds it.

AdaLoRA (Zhang et al. 2023, arXiv 2303.10512) starts with too high a rank everywhere, scores each
rank by smoothed sensitivity and uncertainty while it trains, and sets the least important ones to
zero until the mean rank is the target. PEFT keeps the scores in plain dicts; here they are buffers,
so a killed run goes on with the very same scores, and the best checkpoint has its own ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from cfm_train.bricks.brick import parameter_name
from cfm_train.errors import UserError

#: What PEFT's allocator remembers of each parameter.
SCORES = ("ipt", "exp_avg_ipt", "exp_avg_unc")
#: Shares of a run during which all ranks stay, and at its end the chosen ones alone are trained.
WARM_UP, COOL_DOWN = 0.1, 0.3


class RankBudget(nn.Module):
    """The state of AdaLoRA's allocator.

    Args:
        tuner: PEFT's ``AdaLoraModel``; not registered here.
        warm_up: steps during which all ranks stay, None for `WARM_UP` of the run.
        cool_down: steps at the end without further cuts, None for `COOL_DOWN` of the run.
    """

    def __init__(self, tuner: Any, warm_up: int | None, cool_down: int | None) -> None:
        super().__init__()
        self._tuner = [tuner]  # in a list: no submodule of this one
        self.warm_up, self.cool_down = warm_up, cool_down
        for name, value in self._factors().items():
            for score in SCORES:
                self.register_buffer(_key(score, name), torch.zeros_like(value))
            if ".lora_E." in name:
                kept = torch.ones(len(value), dtype=torch.bool, device=value.device)
                self.register_buffer(_key("kept", name), kept)

    def _factors(self) -> dict[str, nn.Parameter]:
        """The factors A, B and E of all layers, by PEFT's names."""
        tree = self._tuner[0].model
        return {name: value for name, value in tree.named_parameters() if "lora_" in name}

    def _pattern(self) -> dict[str, list[bool]]:
        return {
            name: self.get_buffer(_key("kept", name)).tolist()
            for name in self._factors()
            if ".lora_E." in name
        }

    def after_step(self, step: int, total: int) -> None:
        """Scores all ranks and cuts the least important, as PEFT does after an optimiser step.

        Args:
            step: optimiser steps done, from 1 on; the step's gradients are still there.
            total: optimiser steps of the run.

        Raises:
            UserError: the run has no steps between warm-up and cool-down.
        """
        tuner = self._tuner[0]
        config = tuner.peft_config[tuner.trainable_adapter_name]
        config.total_step = total
        config.tinit = int(WARM_UP * total) if self.warm_up is None else self.warm_up
        config.tfinal = int(COOL_DOWN * total) if self.cool_down is None else self.cool_down
        if config.tinit >= total - config.tfinal:
            raise UserError(
                f"brick.options.tinit={config.tinit} and tfinal={config.tfinal} leave none of the "
                f"{total} steps for cutting ranks: lower them, or leave both null."
            )
        if total - config.tfinal < 2:  # not one step to score ranks by
            return
        allocator, factors = tuner.rankallocator, self._factors()
        for name, value in factors.items():
            if value.grad is None:  # a stack that the task does not run
                value.grad = torch.zeros_like(value)
            for score in SCORES:
                getattr(allocator, score)[name] = self.get_buffer(_key(score, name))
        config.rank_pattern = self._pattern()
        tuner.update_and_allocate(step)
        for name, value in factors.items():
            for score in SCORES:
                new = getattr(allocator, score).get(name, torch.zeros_like(value))
                self.get_buffer(_key(score, name)).copy_(new)
        for name, kept in config.rank_pattern.items():
            self.get_buffer(_key("kept", name)).copy_(torch.tensor(kept))

    def pattern_to_save(self) -> dict[str, list[bool]] | None:
        """Which ranks PEFT's file keeps, None for all: the chosen, and those that came back."""
        factors = self._factors()
        pattern = {
            name: (torch.tensor(kept) | (factors[name].detach().flatten() != 0).cpu()).tolist()
            for name, kept in self._pattern().items()
        }
        return None if all(all(kept) for kept in pattern.values()) else pattern


def _key(what: str, name: str) -> str:
    """A parameter's name as the name of a buffer, which allows no dots."""
    return f"{what}:{parameter_name(name)}"
