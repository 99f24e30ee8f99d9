"""Loading a backbone: frozen, in eval mode, with its sites known and its slots in place.

The backbone comes without a task head (language models keep theirs), in the dtype that the
processor multiplies natively, from safetensors on this machine only. Nothing here writes to a
weight, and `Backbone.checksum` proves it: operations compare it before and after each run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cfm_train.backbone.checksum import checksum
from cfm_train.backbone.dtypes import native_dtype
from cfm_train.backbone.fingerprint import fingerprint
from cfm_train.backbone.pretrained import auto_class, load_tokenizer, read_config, read_model
from cfm_train.backbone.sites import AttentionSite, SiteMap, find_sites
from cfm_train.backbone.spec import ResolvedBackbone
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


# A gate loads its encoder at the first prompt, which may be read in inference mode: neither can
# sites be followed there, nor is what is made there of use outside.
@torch.inference_mode(False)
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
    config = read_config(resolved)
    auto, family = auto_class(config)
    model = read_model(resolved, config, auto, weights_dtype)
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


def _vocabulary(model: PreTrainedModel) -> int:
    """How many tokens the model embeds."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight.shape[0]
