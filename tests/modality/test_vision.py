"""Vision encoders: pixels and features against transformers' own, and what is refused."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cfm_train.errors import UserError
from cfm_train.modality.finding import find_encoder


def photo(height: int, width: int) -> tuple[np.ndarray, bytes]:
    """Noise on waves, so that every filter shows; as an array and as the bytes of a file."""
    y, x = np.mgrid[:height, :width]
    waves = [127 + 80 * np.sin(y / 9 + k) * np.cos(x / 13 - k) for k in range(3)]
    noise = np.random.default_rng(0).integers(-40, 40, (height, width, 3))
    image = np.clip(np.stack(waves, -1) + noise, 0, 255).astype(np.uint8)
    stream = io.BytesIO()
    np.save(stream, image)
    return image, stream.getvalue()


def section(path: Path, **more: Any) -> dict[str, Any]:
    """A section of ``conf/encoder``."""
    base = {"kind": "hf_vision", "path": str(path), "size": None, "layer": None, "drop": 0}
    return {**base, "pool": "mean", **more}


@pytest.mark.parametrize("size", [128, None])
@pytest.mark.parametrize("shape", [(300, 201), (97, 160)])
def test_mobilenet_sees_and_says_what_transformers_does(
    size: int | None, shape: tuple[int, int], shared: Path
) -> None:
    """Pixels of its Pillow processor but for that one's rounding; its pooled features."""
    from transformers import MobileNetV2Model
    from transformers.models.mobilenet_v2.image_processing_pil_mobilenet_v2 import (
        MobileNetV2ImageProcessorPil,
    )

    pillow = pytest.importorskip("PIL.Image")
    folder = shared / "models" / "vision-mobilenetv2-100-imagenet"
    ours = find_encoder(section(folder, size=size)).open()
    image, content = photo(*shape)
    side = size or 224
    processor = MobileNetV2ImageProcessorPil.from_pretrained(
        folder, size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )
    (expected,) = processor(pillow.fromarray(image), return_tensors="np")["pixel_values"]
    pixels = ours.load(content, "here")
    assert pixels.shape == expected.shape == (3, side, side)
    # Pillow rounds to 1/255 along each axis; pixels lie between -1 and 1.
    assert np.abs(pixels.numpy() - expected).max() < 2.5 / 255
    theirs = MobileNetV2Model.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        pooled = theirs(pixel_values=pixels[None]).pooler_output
    features, mask = ours.encode([pixels])
    assert features.shape == (1, 1, 1280) and mask.shape == (1, 1)
    torch.testing.assert_close(features[:, 0], pooled, atol=1e-5, rtol=1e-5)


@pytest.fixture
def tower(tmp_path: Path) -> Path:
    """A tiny CLIP tower."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        image_size=16, patch_size=8, projection_dim=16,
    )  # fmt: skip
    CLIPVisionModel(config).save_pretrained(tmp_path / "tower")
    return tmp_path / "tower"


@pytest.mark.parametrize("crop", [True, False])
def test_sizes_as_older_folders_write_them(crop: bool, tower: Path) -> None:
    """A plain number is the shorter edge where a crop follows (CLIP), and a square else (ViT)."""
    found = []
    for size in (16, {"shortest_edge": 16} if crop else {"height": 16, "width": 16}):
        how = {"size": size, "resample": 3} | ({"crop_size": 16} if crop else {})
        (tower / "preprocessor_config.json").write_text(json.dumps(how))
        found.append(find_encoder(section(tower)).open().load(photo(40, 25)[1], "here"))
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("more", "how", "complaint"),
    [
        ({"size": 32}, {}, r"cannot be asked for size=32"),
        ({"layer": 9}, {}, r"layer=9"),
        ({"drop": 5}, {}, r"encoder\.drop=5 leaves no vector"),
        ({}, {"resample": 1}, r"Pillow's filter 1"),
    ],
)
def test_what_a_model_cannot_do_is_said_in_one_sentence(
    more: dict[str, Any], how: dict[str, Any], complaint: str, tower: Path
) -> None:
    (tower / "preprocessor_config.json").write_text(json.dumps(how))
    with pytest.raises(UserError, match=complaint):
        find_encoder(section(tower, **more)).open()
