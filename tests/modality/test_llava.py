"""transformers' own Llava, fed by our encoder and connector, answers as with its own tower."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from cfm_train.backbone.load import load_backbone
from cfm_train.backbone.spec import resolve
from cfm_train.modality.encoding import given
from cfm_train.modality.finding import find_encoder
from cfm_train.modality.modality import Modality
from tests.backbones import CONFIGS, _tokenizer

IMAGE = 60  # the token that stands for an image in Llava's own vocabulary


def test_llava_through_mm_encoder_outputs_and_through_our_backbone(tmp_path: Path) -> None:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
    from transformers import LlavaForConditionalGeneration as Llava
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        image_size=16, patch_size=8, projection_dim=16,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**CONFIGS["llama"]),
        image_token_index=IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    llava = Llava(config).eval()
    llava.model.vision_tower.save_pretrained(tmp_path / "tower")
    from transformers import LlamaForCausalLM

    inner = LlamaForCausalLM(config.text_config).eval()
    inner.model.load_state_dict(llava.model.language_model.state_dict())
    inner.lm_head.load_state_dict(llava.lm_head.state_dict())
    inner.save_pretrained(tmp_path / "lm")
    _tokenizer().save_pretrained(tmp_path / "lm")

    encoder = find_encoder(
        {"kind": "hf_vision", "path": str(tmp_path / "tower"), "size": None, "layer": -2,
         "drop": 1, "pool": "none"}
    ).open()  # fmt: skip
    backbone = load_backbone(resolve({"path": str(tmp_path / "lm")}), dtype="float32")
    about = {"kind": "hf_vision", "width": 16, "fingerprint": encoder.fingerprint}
    connector = {"kind": "mlp", "tokens": 1, "inner": config.text_config.hidden_size}
    brick = Modality("image", about, connector, False).build(backbone).eval()
    projector = llava.model.multi_modal_projector
    brick.connector.up.load_state_dict(projector.linear_1.state_dict())
    brick.connector.down.load_state_dict(projector.linear_2.state_dict())

    pixels = torch.randn(2, 3, 16, 16)
    image = [IMAGE] * 4
    ids = torch.tensor([[5, *image, 9, 7], [8, 6, *image, 3]])
    with torch.inference_mode():
        own = llava(input_ids=ids, pixel_values=pixels).logits
        features, mask = encoder.encode(list(pixels))
        tokens, there = brick.tokens_of(features, mask)
        ours = BaseModelOutputWithPooling(
            pooler_output=[t[m] for t, m in zip(tokens, there, strict=True)]
        )
        fed = llava(input_ids=ids, mm_encoder_outputs={"image": ours}).logits
        torch.testing.assert_close(fed, own, atol=1e-5, rtol=0)
        with backbone.slots.plugged([brick]):
            rows = [[np.asarray(f)] for f in features]
            backbone.slots.take(given("image", rows))
            plugged = backbone.logits(input_ids=ids.masked_fill(ids == IMAGE, brick.sentinel))
    torch.testing.assert_close(plugged, own, atol=1e-5, rtol=0)
    assert (own[0] - llava(input_ids=ids, pixel_values=-pixels).logits[0]).abs().max() > 1e-4
