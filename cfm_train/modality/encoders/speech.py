"""Google's speech embedding, as openWakeWord ships it: a small CNN over mel windows.

    16 kHz ─► spectrogram in 32 mel bands, 100 frames a second, dB ─► windows of 76 frames, every
    ``hop`` ─► 96 numbers each

The folder holds ``config.json`` (a list of operations), ``melspectrogram.safetensors`` and
``embedding.safetensors``. Weights: Apache-2.0, Google.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from cfm_train.config.types import NonNegative, Positive
from cfm_train.errors import UserError
from cfm_train.modality.encoders.encoder import Encoder, padded
from cfm_train.modality.sounds import read_sound


class Speech(Encoder):
    """The speech embedding.

    Args:
        path: its folder.
        least: seconds; a shorter sound is heard in the middle of so much silence (a window alone
            is 0.76 s).
        hop: mel frames (of 10 ms) from one window to the next.
        pool: ``mean`` for one vector, ``none`` for one for each window.
    """

    modality = "audio"

    def __init__(
        self, path: str, least: NonNegative, hop: Positive, pool: Literal["mean", "none"]
    ) -> None:
        super().__init__()
        self.least, self.hop, self.pool = least, hop, pool

    def build(self, folder: Path | None) -> Self:
        """Reads operations and weights."""
        assert folder is not None
        try:
            self.about: dict[str, Any] = json.loads((folder / "config.json").read_text("utf-8"))
            tensors = {
                f"{prefix}_{name.replace('.', '_')}": value.float()
                for prefix, file in (("w", "embedding"), ("m", "melspectrogram"))
                for name, value in load_file(folder / f"{file}.safetensors").items()
            }
            self.width, self.rate = int(self.about["embedding_dim"]), self.about["sample_rate"]
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"encoder.path: {folder} holds no speech embedding ({error})."
            ) from None
        for name, value in tensors.items():
            self.register_buffer(name, value)
        return self

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(self.buffers()).device

    def load(self, content: bytes, at: str) -> Tensor:
        """The sound, float32 ``[samples]`` in the range of 16-bit numbers, at 16 kHz."""
        sound = torch.from_numpy(read_sound(content, self.rate, at)) * 32768
        lacking = max(0, round(self.least * self.rate) - len(sound))
        return F.pad(sound, (lacking // 2, lacking - lacking // 2))

    def features(self, items: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Windows ``[items, n, 96]``; each sound by itself: silence behind it would be heard."""
        parts = []
        for item in items:
            mel = self._mel(item)
            frames = self.about["window_frames"]
            if len(mel) < frames:
                mel = F.pad(mel, (0, 0, 0, frames - len(mel)), value=float(mel.min()))
            windows = mel.unfold(0, frames, self.hop).transpose(1, 2)  # [n, frames, bands]
            found = self._embed(windows)
            parts.append(found.mean(dim=0, keepdim=True) if self.pool == "mean" else found)
        return padded(parts)

    def _mel(self, samples: Tensor) -> Tensor:
        """Mel bands in dB, not lower than 80 below the loudest, scaled: ``[frames, bands]``."""
        m = {name: self.get_buffer(f"m_{name}") for name in ("dft_real", "dft_imag", "mel")}
        samples = F.pad(samples, (0, max(0, int(self.about["n_fft"]) - len(samples))))
        hop = int(self.about["hop"])
        parts = [F.conv1d(samples[None, None], m[n], stride=hop) for n in ("dft_real", "dft_imag")]
        power = (parts[0] ** 2 + parts[1] ** 2)[0].T @ m["mel"]
        db = 10 * torch.log10(power.clamp_min(1e-10))
        return torch.maximum(db, db.max() - 80) / 10 + 2

    def _embed(self, windows: Tensor) -> Tensor:
        """The CNN, operation by operation: ``[n, frames, bands]`` to ``[n, 96]``."""
        x = windows[:, None]
        for step in self.about["ops"]:
            kind, key = step["op"], f"w_{step.get('key')}"
            if kind == "pad":
                x = F.pad(x, (1, 1, 0, 0))
            elif kind == "conv":
                top, left, bottom, right = step["pads"]
                bias = self.get_buffer(f"{key}_bias") if step["bias"] else None
                x = F.pad(x, (left, right, top, bottom))
                x = F.conv2d(x, self.get_buffer(f"{key}_weight"), bias, stride=step["stride"])
            elif kind == "bn":
                mean, var, scale, shift = (
                    self.get_buffer(f"{key}_{name}") for name in ("mean", "var", "scale", "b")
                )
                x = F.batch_norm(x, mean, var, scale, shift, eps=step["eps"])
            elif kind == "relu":
                x = x.relu()
            elif kind == "leaky":
                x = F.leaky_relu(x, step["alpha"])
            elif kind == "max":
                x = x.clamp_min(step["value"])
            elif kind == "maxpool":
                x = F.max_pool2d(x, step["kernel"], step["stride"])
            elif kind != "reshape":
                raise UserError(f"encoder.path: the speech embedding has an unknown '{kind}'.")
        return x.flatten(1)
