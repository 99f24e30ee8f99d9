"""What transformers makes of a backbone's folder: config, class, weights and tokenizer.

Never from the network, never with code that a model brings along, never from pickled weights; what
transformers refuses is told in one sentence.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cfm_train.backbone.fingerprint import tokenizer_files
from cfm_train.backbone.spec import ResolvedBackbone
from cfm_train.backbone.trace import quiet
from cfm_train.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def skeleton(resolved: ResolvedBackbone) -> PreTrainedModel:
    """A backbone on the meta device: its class, config and modules as loaded, without any value.

    Raises:
        UserError: the architecture is unknown to transformers, or cannot be built from its config.
    """
    from transformers import initialization

    config = read_config(resolved)
    model_class, options = _model_class(resolved, config, auto_class(config)[0])
    try:
        with quiet(), torch.device("meta"), initialization.no_init_weights():
            model: PreTrainedModel = model_class(config, **options)
    except Exception as error:
        # A model class may raise anything where its config makes no sense to it.
        raise UserError(
            f"transformers cannot build the backbone '{resolved.id}' from its config "
            f"({_first_line(error)})."
        ) from error
    return model


def load_tokenizer(folder: Path, vocabulary: int | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a backbone folder, with a padding token that the backbone can embed.

    Args:
        folder: the backbone's folder.
        vocabulary: how many tokens it embeds; None if that is of no interest.

    Returns:
        The tokenizer; its vocabulary is unchanged.

    Raises:
        UserError: the folder has no tokenizer that transformers can read.
    """
    from transformers import AutoTokenizer

    tokenizer_files(folder)  # without any, transformers makes up an empty tokenizer
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        # Tokenizer libraries raise bare Exceptions; each is a broken or missing file here.
        raise UserError(
            f"The backbone folder '{folder}' has no tokenizer that can be read "
            f"({_first_line(error)}): copy the model's tokenizer files into it."
        ) from error
    pad = tokenizer.pad_token_id
    if pad is None or (vocabulary is not None and pad >= vocabulary):
        # A padded position is masked, so any token does; a new one would resize the embedding.
        known = tokenizer.eos_token or tokenizer.bos_token or tokenizer.unk_token
        tokenizer.pad_token = known or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def read_config(resolved: ResolvedBackbone) -> Any:
    """transformers' config of a backbone.

    Raises:
        UserError: transformers does not know it.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(
            resolved.folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        raise UserError(
            f"transformers cannot read the config of the backbone '{resolved.id}' "
            f"({_first_line(error)}): models that bring their own code are not run."
        ) from error


def auto_class(config: Any) -> tuple[Any, str]:
    """The class to load with, and the family, from what the config says about its architecture."""
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM
    from transformers.models.auto import modeling_auto as auto

    name = (config.architectures or [None])[0]
    if config.is_encoder_decoder:
        lm = name in auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values()
        return (AutoModelForSeq2SeqLM if lm else AutoModel), "encoder-decoder"
    if name in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        return AutoModelForCausalLM, "decoder"
    # A body without head: a decoder if its kind only ever predicts the next token.
    causal = config.model_type in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    masked = config.model_type in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return AutoModel, "decoder" if causal and not masked else "encoder"


def read_model(
    resolved: ResolvedBackbone, config: Any, auto: Any, dtype: torch.dtype
) -> PreTrainedModel:
    """The model with its weights, from safetensors alone.

    Raises:
        UserError: it cannot be loaded, or its weights lack tensors.
    """
    options = _model_class(resolved, config, auto)[1]
    try:
        with quiet():
            model, report = auto.from_pretrained(
                resolved.folder,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                **options,
            )
    except Exception as error:
        raise UserError(
            f"transformers cannot load the backbone '{resolved.id}' ({_first_line(error)}): check "
            "that its weights belong to its config."
        ) from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise UserError(
            f"The weights of the backbone '{resolved.id}' lack {len(missing)} tensors "
            f"(first '{missing[0]}'): they do not belong to its config.json."
        )
    loaded: PreTrainedModel = model
    return loaded


def _model_class(resolved: ResolvedBackbone, config: Any, auto: Any) -> tuple[Any, dict[str, Any]]:
    """The class that an auto class stands for, and what to build it with."""
    options: dict[str, Any] = {}
    try:
        classes = auto._model_mapping[type(config)]
        model_class = classes[0] if isinstance(classes, (tuple, list)) else classes
    except KeyError:
        raise UserError(
            f"The backbone '{resolved.id}' (model type '{config.model_type}') is neither an "
            "encoder, a decoder nor an encoder-decoder of transformers."
        ) from None
    if "add_pooling_layer" in inspect.signature(model_class.__init__).parameters:
        options["add_pooling_layer"] = False  # a task head in disguise, random in many checkpoints
    return model_class, options


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__
