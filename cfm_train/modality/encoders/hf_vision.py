"""Any vision model of transformers (and timm's through it): a folder or a Hub id.

    image ─► resized, cropped, normalised as preprocessor_config.json tells ─► the model
          ─► hidden states [n, d_v] (a map of a convolutional network counts as n places)
          ─► pool=mean: one vector; pool=none: all of them

Images are prepared here in torch, so that no second image library decides the pixels.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from cfm_train.config.types import Count, Positive
from cfm_train.errors import UserError
from cfm_train.modality.encoders.encoder import Encoder
from cfm_train.modality.images import as_tensor, read_image

#: Numbers of Pillow's filters, as preprocessor_config.json writes them, in torch's words.
_FILTERS = {2: "bilinear", 3: "bicubic"}


class HFVision(Encoder):
    """A frozen vision model.

    Args:
        path: folder or Hub id.
        size: side of the square that the model sees; null for what its preprocessor tells.
        layer: which hidden states: null for the last, ``-2`` for those before the last layer (as
            LLaVA takes them), not normalised.
        drop: how many vectors are left out in front (CLIP's class token: 1).
        pool: ``mean`` for one vector, ``none`` for one for each place.
    """

    def __init__(
        self,
        path: str,
        size: Positive | None,
        layer: int | None,
        drop: Count,
        pool: Literal["mean", "none"],
    ) -> None:
        super().__init__()
        self.size, self.layer, self.drop, self.pool = size, layer, drop, pool
        self.prepared: dict[str, Any] = {}

    def build(self, folder: Path | None) -> Self:
        """Loads the model in float32, and how it wants its images."""
        from transformers import AutoModel

        assert folder is not None
        try:
            whole = AutoModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
        except (ImportError, OSError, ValueError) as error:
            first = str(error).strip().splitlines()[0]
            raise UserError(
                f"encoder.path: transformers cannot load a vision model from {folder} ({first})."
            ) from None
        model = getattr(whole, "vision_model", whole)  # CLIP and its like have a text tower too
        if getattr(model, "main_input_name", "") != "pixel_values":
            raise UserError(f"encoder.path: the model in {folder} reads no images.")
        self.model = model
        file = folder / "preprocessor_config.json"
        self.prepared = json.loads(file.read_text("utf-8")) if file.is_file() else {}
        filter = self.prepared.get("resample", 2)
        if filter not in _FILTERS:
            raise UserError(
                f"encoder.path: {file} resizes with Pillow's filter {filter}, and only 2 "
                "(bilinear) and 3 (bicubic) are computed here."
            )
        try:
            found = self.features([self._square(torch.zeros(3, 8, 8))])[0]
        except (ValueError, IndexError, RuntimeError) as error:
            first = str(error).strip().splitlines()[0]
            raise UserError(
                f"encoder: the model in {folder} cannot be asked for size={self.size}, "
                f"layer={self.layer} ({first})."
            ) from None
        if not found.numel() or not bool(found.isfinite().all()):
            raise UserError(f"encoder.drop={self.drop} leaves no vector of an image.")
        self.width = found.shape[-1]
        return self

    def load(self, content: bytes, at: str) -> Tensor:
        """The image as the model sees it, float32 ``[3, side, side]``."""
        return self._square(as_tensor(read_image(content, at)))

    def _square(self, image: Tensor) -> Tensor:
        how = self.prepared
        size = how.get("size") or {}
        if isinstance(size, int):  # before transformers 4.26: the shorter edge where a crop follows
            size = {"shortest_edge" if how.get("crop_size") else "height": size}
        native = getattr(self.model.config, "image_size", None) or 224
        side = self.size or _side(how.get("crop_size")) or _side(size) or int(native)
        filter = _FILTERS.get(int(how.get("resample", 2)), "bilinear")
        keeps = "shortest_edge" in size
        height, width = image.shape[1:]
        short = side if self.size else int(size.get("shortest_edge", side))
        target = (side, side)
        if keeps:  # the shorter edge is resized and the middle cropped, else the image is squeezed
            # Cut to whole numbers, as transformers does.
            tall, wide = (int(short * edge / min(height, width)) for edge in (height, width))
            target = (max(side, tall), max(side, wide))
        image = F.interpolate(image[None], target, mode=filter, antialias=True)[0].clamp(0, 1)
        top, left = (target[0] - side) // 2, (target[1] - side) // 2
        image = image[:, top : top + side, left : left + side]
        mean, std = (
            torch.tensor(how.get(key) or [0.5] * 3)[:, None, None]
            for key in ("image_mean", "image_std")
        )
        return (image - mean) / std if how.get("do_normalize", True) else image

    def features(self, items: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Hidden states ``[items, n, width]``, all of them there."""
        output = self.model(
            pixel_values=torch.stack(list(items)), output_hidden_states=self.layer is not None
        )
        hidden: Tensor = (
            output.last_hidden_state if self.layer is None else output.hidden_states[self.layer]
        )
        if hidden.ndim == 4:  # a map [items, channels, height, width]
            hidden = hidden.flatten(2).transpose(1, 2)
        hidden = hidden[:, self.drop :]
        if self.pool == "mean":
            hidden = hidden.mean(dim=1, keepdim=True)
        return hidden, torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)


def _side(size: Any) -> int | None:
    """The side of a square from a size as transformers writes it."""
    if isinstance(size, int):
        return size
    found = (size or {}).get("height") or (size or {}).get("shortest_edge")
    return None if found is None else int(found)
