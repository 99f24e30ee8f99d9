"""Stages of training a modality brick, and what each one trains: asserted, not hoped for.

stage    trained                          frozen
align    the connector, its tags          encoder, language model
instruct the same, and a brick beside it  encoder, language model
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

#: Stage -> part of the run -> beginnings of the names of the parameters that are trained.
STAGES: dict[str, dict[str, tuple[str, ...]]] = {
    "align": {"brick": ("connector.", "tags")},
    "instruct": {"brick": ("connector.", "tags"), "beside": ("",)},
}


def assert_trainable(stage: str, parts: Mapping[str, nn.Module]) -> None:
    """Stops a run that would train something else than its stage says.

    Args:
        stage: of `STAGES`.
        parts: the modules of the run, by the names that `STAGES` uses; others must be frozen.

    Raises:
        RuntimeError: a parameter learns that must not, or one does not that must.
    """
    declared = STAGES[stage]
    for part, module in parts.items():
        for name, value in module.named_parameters():
            wanted = name.startswith(declared[part]) if part in declared else False
            if value.requires_grad != wanted:
                what = "learns and must not" if value.requires_grad else "must learn and does not"
                raise RuntimeError(f"stage {stage}: {part}.{name} {what}.")
