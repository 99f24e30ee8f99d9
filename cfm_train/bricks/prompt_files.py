"""Prompt-like bricks on disk, as PEFT keeps them, and the real tokens that they start from.

PEFT writes what a prompt comes to in the end, as one tensor ``prompt_embeddings``: whatever
computed it while training is gone, and any such adapter is read the same way.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from cfm_train.bricks.brick import json_bytes
from cfm_train.bricks.peft_modules import TASK_TYPES
from cfm_train.errors import UserError
from cfm_train.library.peft_checks import check_computed
from cfm_train.library.peft_format import CONFIG_FILE, TENSOR_FILE, aside_tensors

if TYPE_CHECKING:
    from cfm_train.backbone.load import Backbone

TENSOR = "prompt_embeddings"


def write(
    peft_type: str, family: str, embeddings: Tensor, shape: Mapping[str, int], submodules: int
) -> dict[str, bytes]:
    """The two files of a prompt adapter.

    Args:
        peft_type: ``PROMPT_TUNING``, ``PREFIX_TUNING`` or ``CARTRIDGE``.
        family: the backbone's.
        embeddings: ``[tokens, width]``.
        shape: ``token_dim``, ``num_attention_heads`` and ``num_layers``, as PEFT means them, and
            what else the type's config has.
        submodules: PEFT's number of stacks that share the prompt.
    """
    config: dict[str, Any] = {
        "peft_type": peft_type,
        "task_type": TASK_TYPES[family],
        "base_model_name_or_path": None,
        "inference_mode": True,
        "num_virtual_tokens": len(embeddings),
        "num_transformer_submodules": submodules,
        **shape,
    }
    if peft_type == "PREFIX_TUNING":
        config |= {"encoder_hidden_size": shape["token_dim"], "prefix_projection": False}
    tensors = {TENSOR: embeddings.detach().float().cpu().contiguous()}
    return {CONFIG_FILE: json_bytes(config), TENSOR_FILE: save(tensors)}


def read_adapter(
    files: Mapping[str, bytes], kind: str, backbone: Backbone
) -> tuple[dict[str, Any], Tensor]:
    """Config and embeddings ``[tokens, width]`` float32 of a prompt adapter.

    Raises:
        UserError: it is of another type, asks for what the kind does not compute, or its tensor is
            missing or has another number of tokens than the config tells.
    """
    config = json.loads(files[CONFIG_FILE])
    check_computed(kind, config, f"for '{backbone.id}'")
    tensors = load(files[TENSOR_FILE])
    extra = tensors.keys() - {TENSOR} - set(aside_tensors(config, tensors))
    if TENSOR not in tensors or extra:
        what = f"misses '{TENSOR}'" if TENSOR not in tensors else f"holds '{min(extra)}'"
        raise UserError(f"The adapter {what}: it is no {kind} as PEFT saves it.")
    embeddings, count = tensors[TENSOR].float(), config["num_virtual_tokens"]
    # A prompt for two stacks has the encoder's part first; PEFT's encoder-decoders use that alone.
    if len(embeddings) not in (count, count * (config.get("num_transformer_submodules") or 1)):
        raise UserError(
            f"The adapter's config tells {count} virtual tokens, but '{TENSOR}' has shape "
            f"{tuple(embeddings.shape)}: save it again."
        )
    return config, embeddings[:count]


def start_ids(backbone: Backbone, tokens: int, init: str, text: str | None) -> Tensor:
    """The real tokens that a prompt starts from.

    Args:
        backbone: whose tokenizer is used.
        tokens: how many.
        init: ``text`` takes ``text``, cut or repeated; anything else draws from the vocabulary,
            special tokens left out.
        text: the text.

    Returns:
        ``[tokens]`` int64 on the backbone's device.

    Raises:
        UserError: there is no text.
    """
    tokenizer = backbone.tokenizer
    if init == "text":
        found = tokenizer(text or "", add_special_tokens=False)["input_ids"]
        if not found:
            raise UserError(
                "brick.init=text needs a text to start from: give brick.text, a sentence that says "
                "what the task is, or choose brick.init=vocabulary."
            )
        ids = torch.tensor((found * (tokens // len(found) + 1))[:tokens])
    else:
        special = set(tokenizer.all_special_ids)
        words = torch.tensor([i for i in range(len(tokenizer)) if i not in special])
        ids = words[torch.randint(len(words), (tokens,))]
    return ids.to(backbone.device)
