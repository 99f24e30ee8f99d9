"""Loading a backbone: frozen, in eval mode, with its sites known and its slots in place.

The backbone comes without a task head (language models keep theirs), in the dtype that the
processor multiplies natively, from safetensors on this machine only. Nothing here writes to a
weight, and `Backbone.checksum` proves it: operations compare it before and after each run.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cfm_train.backbone.checksum import checksum
from cfm_train.backbone.dtypes import native_dtype
from cfm_train.backbone.fingerprint import fingerprint, tokenizer_files
from cfm_train.backbone.sites import AttentionSite, SiteMap, find_sites
from cfm_train.backbone.spec import ResolvedBackbone
from cfm_train.backbone.trace import quiet
from cfm_train.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from cfm_train.backbone.slots import Slots

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Backbone(nn.Module):
    """A frozen foundation model.

    Attributes:
        model: the transformers model; frozen, always in eval mode.
        tokenizer: its tokenizer, with a padding token.
        family: ``encoder``, ``decoder`` or ``encoder-decoder``.
        sites: the places where bricks plug in.
        slots: what is plugged in.
        id: the name that cards and records give it.
        fingerprint: hash of its files.
        hidden_size: width of the residual stream.
        dtype: dtype of its weights.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        sites: SiteMap,
        slots: Slots,
        *,
        family: str,
        id: str,
        fingerprint: str,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.sites = sites
        self.slots = slots
        self.family = family
        self.id = id
        self.fingerprint = fingerprint
        self.hidden_size = sites.hidden_size
        self.dtype = dtype

    def train(self, mode: bool = True) -> Backbone:
        """Stays in eval mode, whatever a trainer asks for: dropout belongs to bricks."""
        return super().train(False)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    def hidden_states(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """The last hidden states, of the encoder where there are two stacks.

        Args:
            input_ids: ``[batch, seq]``, int64.
            attention_mask: ``[batch, seq]``, 1 for a token and 0 for padding.
            **kwargs: handed to the model (``position_ids``, ``token_type_ids``, …).

        Returns:
            ``[batch, seq, hidden]``.
        """
        model = self.model
        base = model.get_encoder() if self.family == "encoder-decoder" else model.base_model
        if self.family == "decoder":
            kwargs.setdefault("use_cache", False)
        output = base(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        hidden: Tensor = output.last_hidden_state
        # An encoder that a decoder attends to keeps its virtual tokens, in front.
        extra = hidden.shape[1] - input_ids.shape[1]
        return hidden[:, extra:] if extra else hidden

    def logits(self, **batch: Any) -> Tensor:
        """The language model's logits ``[batch, seq, vocabulary]``.

        Args:
            **batch: what the model takes: ``input_ids``, ``attention_mask``, …

        Raises:
            UserError: the backbone has no language model head.
        """
        if self.model.get_output_embeddings() is None:
            raise UserError(
                f"The backbone '{self.id}' is an {self.family} without a language model head: "
                "choose a backbone that can generate text for this task."
            )
        logits: Tensor = self.model(**{"use_cache": False, **batch}).logits
        return logits

    def checksum(self) -> str:
        """Exact hash of every tensor in memory, see `cfm_train.backbone.checksum`."""
        return checksum(self.model)


def load_backbone(
    resolved: ResolvedBackbone, *, dtype: str = "auto", device: torch.device | str = "cpu"
) -> Backbone:
    """Loads a backbone from its folder; never from the network.

    Args:
        resolved: what `spec.resolve` found.
        dtype: ``auto`` (see `native_dtype`), ``float32``, ``bfloat16`` or ``float16``.
        device: where it will run.

    Returns:
        The frozen backbone with empty slots.

    Raises:
        UserError: the architecture is unknown to transformers, tensors are missing or have another
            shape than the config tells, or its sites are ambiguous.
    """
    from cfm_train.backbone.attention import NAME
    from cfm_train.backbone.slots import Slots

    if dtype != "auto" and dtype not in _DTYPES:
        raise UserError(
            f"'backbone.dtype={dtype}' is unknown: use auto, float32, bfloat16 or float16."
        )
    weights_dtype = native_dtype(device) if dtype == "auto" else _DTYPES[dtype]
    config = _config(resolved)
    auto, family = _auto_class(config)
    model = _model(resolved, config, auto, weights_dtype)
    sites = find_sites(model)
    if any(isinstance(site, AttentionSite) and site.kv for site in sites.values()):
        model.set_attn_implementation(NAME)
    nn.Module.to(model, torch.device(device))
    return Backbone(
        model,
        load_tokenizer(resolved.folder, _vocabulary(model)),
        sites,
        Slots(model, sites),
        family=family,
        id=resolved.id,
        fingerprint=fingerprint(resolved.folder),
        dtype=weights_dtype,
    )


def skeleton(resolved: ResolvedBackbone) -> PreTrainedModel:
    """A backbone on the meta device: its class, config and modules as loaded, without any value.

    Raises:
        UserError: the architecture is unknown to transformers, or cannot be built from its config.
    """
    from transformers import initialization

    config = _config(resolved)
    model_class, options = _model_class(resolved, config, _auto_class(config)[0])
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


def _vocabulary(model: PreTrainedModel) -> int:
    """How many tokens the model embeds."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight.shape[0]


def _config(resolved: ResolvedBackbone) -> Any:
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


def _auto_class(config: Any) -> tuple[Any, str]:
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


def _model(
    resolved: ResolvedBackbone, config: Any, auto: Any, dtype: torch.dtype
) -> PreTrainedModel:
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
