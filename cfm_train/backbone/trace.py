"""The record of one tiny forward pass on the meta device: which products feed which.

No tensor holds a value there, but every storage, view and operation is real. `watcher.py` follows
the data; here stands what it writes down, and how the model is run.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cfm_train.backbone.ranges import Ranges
from cfm_train.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TOKENS = 3
_ATTENTION = "cfm_trace"
_PORT = "_cfm_port"
_ID_KEYS = ("input_ids", "decoder_input_ids")


@dataclass
class Product:
    """A product with a weight: the call of a linear map.

    Attributes:
        module: path of the module that owns the weight.
        in_features, out_features: its widths.
        transposed: whether the weight is stored ``[in, out]``.
        base: the label of its first output feature.
        plain, active: labels in its input that passed no activation function, or one; kept only
            where there is an active one.
        attention: results of attention in its input.
        is_output: whether the module's output is this product (else nothing can be plugged in).
    """

    module: str
    in_features: int
    out_features: int
    transposed: bool
    base: int
    plain: Ranges = ()
    active: Ranges = ()
    attention: frozenset[int] = frozenset()
    is_output: bool = False


@dataclass
class Scores:
    """A product of queries and keys.

    Attributes:
        module: path of the module that computed it.
        query, key: their labels.
        query_inputs, key_inputs: which token ids they depend on (bits as in `flow.Flow`).
        heads, kv_heads: number of heads of queries, and of different ones of keys.
        head_dim: width of one.
    """

    module: str
    query: Ranges
    key: Ranges
    query_inputs: int
    key_inputs: int
    heads: int
    kv_heads: int
    head_dim: int

    def swap(self) -> None:
        """Takes the first factor for the keys: the softmax ran over it."""
        self.query, self.key = self.key, self.query
        self.query_inputs, self.key_inputs = self.key_inputs, self.query_inputs
        self.heads, self.kv_heads = self.kv_heads, self.heads


@dataclass
class Result:
    """A product of attention probabilities and values.

    Attributes:
        scores: numbers of the scores behind the probabilities.
        value: labels of the values.
        value_dim: width of one head of them.
    """

    scores: frozenset[int]
    value: Ranges
    value_dim: int


@dataclass
class Trace:
    """What one forward pass showed, in the order in which it ran.

    Attributes:
        model: the model on the meta device.
        products, scores, results: see there.
        norms: paths of normalising modules.
        embeddings: paths of modules that token ids were looked up in, with the ids' bits.
        ports: paths of modules that call transformers' attention function.
        experts: paths of modules with products over three-dimensional weights.
        ran: paths of all modules that ran, numbered.
        widths: widths of their outputs (of the first one where there are several).
        head: labels of the logits.
    """

    model: PreTrainedModel
    products: list[Product] = field(default_factory=list)
    scores: list[Scores] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    norms: list[str] = field(default_factory=list)
    embeddings: dict[str, int] = field(default_factory=dict)
    ports: set[str] = field(default_factory=set)
    experts: list[str] = field(default_factory=list)
    ran: dict[str, int] = field(default_factory=dict)
    widths: dict[str, int] = field(default_factory=dict)
    head: Ranges = ()


def trace(model: PreTrainedModel) -> Trace:
    """Runs a twin of a model on the meta device and records how its data flows.

    Args:
        model: a transformers model; only its class and config are used.

    Returns:
        The record.

    Raises:
        UserError: the model needs values to decide what it computes, so it cannot be traced.
    """
    from cfm_train.backbone.watcher import Watcher

    try:
        with quiet(), torch.no_grad():
            record = Trace(_twin(model))
            watcher = Watcher(record)
            with watcher.hooks(), torch.device("meta"), _ListIndices():
                inputs = _inputs(record.model)
                for bit, ids in enumerate(inputs[k] for k in _ID_KEYS if k in inputs):
                    watcher.mark_ids(ids, 1 << bit)
                with watcher:
                    output = record.model(**inputs)
                watcher.finish(getattr(output, "logits", None))
            record.ports = {path for path, m in record.model.named_modules() if hasattr(m, _PORT)}
    except Exception as error:
        # A model may raise anything where it meets a tensor without values.
        reason = (str(error).splitlines() or [""])[0][:120]
        raise UserError(
            f"The sites of '{type(model).__name__}' cannot be found: its forward pass does not run "
            f"without values ({type(error).__name__}: {reason}). Use another backbone."
        ) from error
    return record


class _ListIndices(TorchFunctionMode):
    """Keeps the values of lists that tensors are indexed with: ``t[..., [-2], :]``."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__getitem__ and isinstance(args[1], tuple):
            index = tuple(
                torch.tensor(i, device="cpu") if isinstance(i, list) else i for i in args[1]
            )
            args = (args[0], index)
        return func(*args, **(kwargs or {}))


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps transformers from reporting what a caller checks by itself."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def _twin(model: PreTrainedModel) -> PreTrainedModel:
    """The same model on the meta device, with attention made of plain products."""
    from transformers import AttentionInterface, AttentionMaskInterface, initialization
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(_ATTENTION, _attention)
    AttentionMaskInterface.register(_ATTENTION, eager_mask)
    config = copy.deepcopy(model.config)
    config._experts_implementation = "batched_mm"  # of shapes that do not depend on values
    # Nothing is initialised, nor tied: every module then owns its weight.
    with torch.device("meta"), initialization.no_init_weights():
        try:
            config._attn_implementation = _ATTENTION
            return type(model)(config).eval()
        except (KeyError, ValueError):  # models that bring attention classes of their own
            config._attn_implementation = "eager"
            return type(model)(config).eval()


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention without mask, bias and scale, which have no part in where data flows.

    Args:
        module: the attention module; marked as one that calls this function.
        query: ``[batch, heads, tokens, head_dim]``.
        key, value: ``[batch, kv_heads, tokens, head_dim]``.

    Returns:
        ``[batch, tokens, heads, value_dim]``, and no probabilities.
    """
    object.__setattr__(module, _PORT, True)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    probabilities = (query @ key.transpose(2, 3)).softmax(dim=-1)
    return (probabilities @ value).transpose(1, 2).contiguous(), None


def _inputs(model: PreTrainedModel) -> dict[str, Any]:
    """A few tokens for each stack."""
    inputs: dict[str, Any] = {"input_ids": torch.zeros(1, _TOKENS, dtype=torch.int64)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.zeros(1, _TOKENS, dtype=torch.int64)
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs["use_cache"] = False
    return inputs
