"""A PatchTST of transformers: a transformer over patches of each channel (Nie et al. 2023).

    the last ``context_length`` steps ─► normalised, patched, encoded ─► [channels · patches, d]
    ─► beside each vector the mean (as asinh) and the deviation (as its logarithm) of its channel

A shorter series stands at the end of the context, and what is before it counts as not observed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

import torch
from torch import Tensor, nn

from cfm_train.errors import UserError
from cfm_train.modality.encoders.encoder import Encoder
from cfm_train.modality.series import read_series


class PatchTST(Encoder):
    """A frozen PatchTST.

    Args:
        path: folder or Hub id.
        pool: ``mean`` for one vector of each channel, ``none`` for one of each of its patches.
    """

    modality = "series"

    def __init__(self, path: str, pool: Literal["mean", "none"]) -> None:
        super().__init__()
        self.pool = pool

    def build(self, folder: Path | None) -> Self:
        """Loads the model in float32; nothing is masked, as in its own pretraining."""
        from transformers import AutoConfig, AutoModel

        assert folder is not None
        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
            if config.model_type != "patchtst":
                raise ValueError(f"a {config.model_type}")
            config.do_mask_input = False
            self.model = AutoModel.from_pretrained(
                folder, config=config, dtype=torch.float32, local_files_only=True
            )
        except (ImportError, OSError, ValueError) as error:
            first = str(error).strip().splitlines()[0]
            raise UserError(
                f"encoder.path: transformers cannot load a PatchTST from {folder} ({first})."
            ) from None
        self.channels = int(config.num_input_channels)
        self.length = int(config.context_length)
        self.width = int(config.d_model) + 2
        return self

    def load(self, content: bytes, at: str) -> Tensor:
        """The series, float32 ``[steps, channels]``, no longer than the model reads."""
        try:
            found = read_series(content, at, self.channels)
        except UserError as error:
            why = str(error).replace("encoder.channels=", "the model of encoder.path reads ")
            raise UserError(why) from None
        return torch.from_numpy(found)[-self.length :]

    def features(self, items: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Vectors ``[items, channels · patches, d + 2]``, all there."""
        values, observed = [], []
        for item in items:
            front = (0, 0, self.length - len(item), 0)
            values.append(nn.functional.pad(item, front))
            observed.append(nn.functional.pad(torch.ones_like(item), front))
        output = self.model(
            past_values=torch.stack(values), past_observed_mask=torch.stack(observed)
        )
        hidden: Tensor = output.last_hidden_state  # [items, channels, patches, d]
        level = [output.loc.asinh(), output.scale.log()]  # [items, 1, channels] each
        beside = torch.stack([one[:, 0] for one in level], dim=-1)[:, :, None]
        hidden = torch.cat([hidden, beside.expand(*hidden.shape[:3], 2)], dim=-1)
        hidden = hidden.mean(dim=2, keepdim=True) if self.pool == "mean" else hidden
        hidden = hidden.flatten(1, 2)
        return hidden, torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
