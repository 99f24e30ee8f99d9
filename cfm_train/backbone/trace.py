"""Follows the data of one tiny forward pass through a model on the meta device.

No tensor holds a value there, but every storage, view and operation is real. Each storage carries a
`Flow`: for every element the output feature (*label*) of the weight product that it comes from.
Views need no treatment, since a label array can be viewed like the tensor itself; so the rows of a
fused projection that reach the queries are read off after any mix of splits, transposes and chunks:

    labels(product output)      = first label of the module + column
    labels(view of t)           = the same view of labels(t)
    labels(f(t)), elementwise   = labels(t); kept apart (`active`) once f is an activation function
    labels(product output)      again fresh: a flow reaches from one product to the next

A product of two labelled tensors that feeds a softmax is attention. The roles that follow from these
records are assigned in `roles.py`.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from cfm_train.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Operations that move elements and leave them as they are; they run on the labels too.
_LAYOUT = frozenset(
    "cat stack index index_select repeat repeat_interleave constant_pad_nd roll flip "
    "slice_scatter select_scatter unfold_copy".split()
)
_COPY = frozenset("clone _to_copy copy_ contiguous".split())
#: Nonlinear functions of one element that feed-forward layers are built from.
_ACTIVATION = frozenset(
    "gelu silu relu relu6 leaky_relu elu celu selu tanh sigmoid erf softplus hardtanh hardswish "
    "hardsigmoid mish threshold expm1 prelu rrelu clamp_min log_sigmoid_forward".split()
)
_NORM = frozenset("native_layer_norm _fused_rms_norm rsqrt sqrt linalg_vector_norm".split())
#: Operations whose elements depend on many others: what follows is no single feature any more.
_OPAQUE = frozenset("convolution cumsum sort topk gather scatter fft_r2c".split())


@dataclass
class Flow:
    """Where the elements of one storage come from.

    Attributes:
        plain: labels that passed no activation function, int32, one per element of the storage; -1
            for none.
        active: labels that passed one.
        scores: attention scores in here, by number.
        probabilities: scores that went through a softmax.
        attention: results of attention in here, by number.
        inputs: which token ids it depends on: bit 0 the encoder's, bit 1 the decoder's.
        weight: the parameter that it is a copy of.
    """

    plain: Tensor | None = None
    active: Tensor | None = None
    scores: frozenset[int] = frozenset()
    probabilities: frozenset[int] = frozenset()
    attention: frozenset[int] = frozenset()
    inputs: int = 0
    weight: str | None = None


@dataclass
class Product:
    """A product with a weight: the call of a linear map.

    Attributes:
        module: path of the module that owns the weight.
        in_features, out_features: its widths.
        transposed: whether the weight is stored ``[in, out]``.
        base: its first label.
        plain, active: labels in its input, unique.
        attention: results of attention in its input.
        is_output: whether the module's output is this product (else it has no slot).
    """

    module: str
    in_features: int
    out_features: int
    transposed: bool
    base: int
    plain: list[int] = field(default_factory=list)
    active: list[int] = field(default_factory=list)
    attention: frozenset[int] = frozenset()
    is_output: bool = False


@dataclass
class Attention:
    """Scores, and once they met the values, a result of attention.

    Attributes:
        module: path of the module that computed the scores.
        query, key, value: labels, unique.
        head_dim: width of one head of queries or keys.
        query_inputs, key_inputs: which token ids queries and keys depend on.
    """

    module: str
    query: list[int]
    key: list[int]
    head_dim: int
    query_inputs: int
    key_inputs: int
    value: list[int] = field(default_factory=list)


@dataclass
class Trace:
    """What one forward pass showed, in the order in which it ran.

    Attributes:
        model: the model on the meta device.
        products, scores: see there.
        results: number of a result of attention -> the score numbers behind it.
        norms: paths of normalising modules and their widths.
        embeddings: paths of modules that token ids were looked up in, with the id bits.
        experts: paths of modules with products over three-dimensional weights.
        ran: paths of all modules that ran.
        head: labels of the logits.
    """

    model: PreTrainedModel
    products: list[Product] = field(default_factory=list)
    scores: list[Attention] = field(default_factory=list)
    results: list[tuple[frozenset[int], list[int]]] = field(default_factory=list)
    norms: dict[str, int] = field(default_factory=dict)
    embeddings: dict[str, int] = field(default_factory=dict)
    experts: list[str] = field(default_factory=list)
    ran: dict[str, int] = field(default_factory=dict)
    head: list[int] = field(default_factory=list)


def trace(model: PreTrainedModel) -> Trace:
    """Runs a twin of a model on the meta device and records how its data flows.

    Args:
        model: a transformers model; only its class and config are used.

    Returns:
        The record.

    Raises:
        UserError: the model needs values to decide what it computes, so it cannot be traced.
    """
    twin = _twin(model)
    watcher = _Watcher(twin)
    try:
        with torch.no_grad(), watcher.hooks(), torch.device("meta"):
            inputs = _inputs(twin)
            for bit, ids in enumerate(inputs[k] for k in _ID_KEYS if k in inputs):
                watcher.mark_ids(ids, 1 << bit)
            with watcher:
                output = twin(**inputs)
            watcher.finish(output)
    except UserError:
        raise
    except Exception as error:
        # A model may raise anything where it meets a tensor without values.
        raise UserError(
            f"The sites of '{type(model).__name__}' cannot be found: its forward pass cannot run "
            f"without values ({type(error).__name__}: {str(error).splitlines()[0][:120]}). Use a "
            "backbone of another architecture."
        ) from error
    return watcher.trace


_ID_KEYS = ("input_ids", "decoder_input_ids")


def _twin(model: PreTrainedModel) -> PreTrainedModel:
    from transformers import initialization

    config = copy.deepcopy(model.config)
    # Eager attention is made of plain products; batched experts of shapes that need no values.
    config._attn_implementation = "eager"
    config._experts_implementation = "batched_mm"
    with torch.device("meta"), initialization.no_init_weights():
        twin = type(model)(config)
    return twin.eval()


def _inputs(twin: PreTrainedModel) -> dict[str, Any]:
    """Three tokens; ids are different storages, so that each stack's can be told apart."""
    known = inspect.signature(twin.forward).parameters
    inputs: dict[str, Any] = {"input_ids": torch.zeros(1, 3, dtype=torch.int64)}
    if twin.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.zeros(1, 3, dtype=torch.int64)
    if "use_cache" in known:
        inputs["use_cache"] = False
    return inputs


class _Watcher(TorchDispatchMode):
    """The dispatch mode that moves flows along with the tensors."""

    def __init__(self, twin: PreTrainedModel) -> None:
        super().__init__()
        self.trace = Trace(twin)
        self._flows: dict[int, Flow] = {}
        self._alive: list[Any] = []  # a freed storage's address would be used again
        self._weights: dict[int, tuple[str, Tensor]] = {}
        self._owners: dict[tuple[str, int], str] = {}
        self._bases: dict[tuple[str, int], int] = {}
        self._labels = 0
        self._stack: list[str] = []
        self._normalised: set[str] = set()
        for name, parameter in twin.named_parameters(remove_duplicate=False):
            key = _key(parameter)
            self._weights.setdefault(key, (name, parameter))
            self._owners[(name.rpartition(".")[0], key)] = name

    # -- the forward pass seen from its modules ---------------------------------------------------

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Keeps track of which module runs."""
        handles = []
        for path, module in self.trace.model.named_modules():
            handles.append(module.register_forward_pre_hook(self._enter(path)))
            handles.append(module.register_forward_hook(self._leave(path)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, path: str) -> Any:
        def enter(module: nn.Module, args: Any) -> None:
            self._stack.append(path)
            self.trace.ran.setdefault(path, len(self.trace.ran))

        return enter

    def _leave(self, path: str) -> Any:
        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self._stack.pop()
            if not isinstance(output, Tensor):
                return
            if path in self._normalised:
                self.trace.norms.setdefault(path, output.shape[-1])
            last = self.trace.products[-1] if self.trace.products else None
            if last is not None and last.module == path:
                labels = self._plain(output)
                row = labels.reshape(-1, output.shape[-1])[0] if labels is not None else None
                whole = torch.arange(last.base, last.base + last.out_features, dtype=torch.int32, device="cpu")
                last.is_output = row is not None and torch.equal(row, whole)

        return leave

    def mark_ids(self, ids: Tensor, bit: int) -> None:
        """Labels token ids, so that the embedding they are looked up in can be told."""
        base = self._new_labels(ids.numel())
        labels = torch.arange(base, base + ids.numel(), dtype=torch.int32, device="cpu")
        self._put(ids, Flow(plain=labels, inputs=bit))

    def finish(self, output: Any) -> None:
        """Reads where the logits come from."""
        logits = getattr(output, "logits", None)
        if logits is not None:
            self.trace.head = _unique(self._plain(logits)) or _unique(self._active(logits))

    # -- and from its operations -----------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        if name == "_local_scalar_dense":
            # A branch on a value: answer as for an input in which nothing special occurs.
            return torch.zeros((), dtype=args[0].dtype, device="cpu").item()
        output = func(*args, **kwargs)
        if self._stack and name in _NORM:
            self._normalised.add(self._stack[-1])
        if name in ("mm", "addmm", "bmm", "baddbmm"):
            left, right = args[-2:]
            self._product(left, right, output, args[:-2])
        elif name == "embedding":
            self._embedding(args[0], args[1], output)
        elif name in ("_softmax", "_safe_softmax", "softmax"):
            self._softmax(args, output)
        else:
            self._other(func, name, args, kwargs, output)
        return output

    def _product(self, left: Tensor, right: Tensor, output: Tensor, added: Any) -> None:
        a, b = self._flow(left), self._flow(right)
        weight = next((f.weight for f in (b, a) if f.weight is not None), None)
        if weight is not None and b.weight is not None and right.ndim == 2 and self._flat(b):
            self._linear(left, right, output, a, b)
        elif weight is not None:
            owner = weight.rpartition(".")[0]
            if owner not in self.trace.experts:
                self.trace.experts.append(owner)
            self._put(output, Flow(inputs=a.inputs | b.inputs))
        elif bool(a.probabilities) != bool(b.probabilities):
            values = right if a.probabilities else left
            self.trace.results.append((a.probabilities | b.probabilities, self._sources(values)))
            number = frozenset({len(self.trace.results) - 1})
            self._put(output, Flow(attention=number, inputs=a.inputs | b.inputs))
        else:
            flow = _joined([a, b, *map(self._flow, (t for t in added if isinstance(t, Tensor)))])
            query, key = self._sources(left), self._sources(right)
            if query and key:
                where = self._stack[-1] if self._stack else ""
                self.trace.scores.append(
                    Attention(where, query, key, left.shape[-1], a.inputs, b.inputs)
                )
                flow.scores |= {len(self.trace.scores) - 1}
            self._put(output, flow)

    def _linear(self, left: Tensor, right: Tensor, output: Tensor, a: Flow, b: Flow) -> None:
        name, parameter = self._weights[_key(right)]
        owner = next(
            (p for p in reversed(self._stack) if (p, _key(right)) in self._owners),
            name.rpartition(".")[0],
        )
        transposed = right.stride(1) == 1 and right.stride(0) != 1
        rows = parameter.shape[1] if transposed else parameter.shape[0]
        offset = right.storage_offset() // (1 if transposed else right.shape[0])
        key = (owner, _key(right))
        if key not in self._bases:
            self._bases[key] = self._new_labels(rows)
        base = self._bases[key]
        product = Product(owner, right.shape[0], rows, transposed, base)
        product.plain, product.active = self._sources(left), _unique(self._active(left))
        product.attention = a.attention
        self.trace.products.append(product)
        first = base + offset
        labels = torch.arange(first, first + right.shape[1], dtype=torch.int32, device="cpu")
        self._put(output, Flow(inputs=a.inputs), plain=labels.expand(output.shape))

    def _embedding(self, weight: Tensor, ids: Tensor, output: Tensor) -> None:
        flow = self._flow(ids)
        if self._plain(ids) is not None and self._flow(weight).weight is not None:
            owner = self._stack[-1] if self._stack else ""
            self.trace.embeddings[owner] = self.trace.embeddings.get(owner, 0) | flow.inputs
        self._put(output, Flow(inputs=flow.inputs))

    def _softmax(self, args: Any, output: Tensor) -> None:
        flow = self._flow(args[0])
        over_keys = args[1] in (-1, args[0].ndim - 1)
        if flow.scores and not over_keys:
            for number in flow.scores:  # scores were computed as keys times queries
                score = self.trace.scores[number]
                score.query, score.key = score.key, score.query
                score.query_inputs, score.key_inputs = score.key_inputs, score.query_inputs
        self._put(output, Flow(probabilities=flow.scores, inputs=flow.inputs))

    def _other(self, func: Any, name: str, args: Any, kwargs: Any, output: Any) -> None:
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if not any(_key(t) in self._flows or _key(t) in self._weights for t in tensors):
            return
        writes = name.endswith("_") and not name.startswith("_")
        sources = {_key(t) for t in tensors}
        for out in tree_leaves(output):
            if not isinstance(out, Tensor) or (_key(out) in sources and not writes):
                continue  # a view: its storage already has a flow
            flow = _joined([self._flow(t) for t in tensors])
            plain, active = self._moved(func, name.rstrip("_"), args, kwargs, tensors, out)
            if name in _LAYOUT or name in _COPY:
                flow.weight = next((w for t in tensors if (w := self._flow(t).weight)), None)
            self._put(out, flow, plain, active)

    def _moved(
        self, func: Any, name: str, args: Any, kwargs: Any, tensors: list[Tensor], out: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """Plain and active labels of the output of an operation."""
        if name in _LAYOUT:
            return tuple(  # type: ignore[return-value]
                _run_on_labels(func, args, kwargs, of, out) if any(
                    of(t) is not None for t in tensors
                ) else None
                for of in (self._plain, self._active)
            )
        copied = name in {n.rstrip("_") for n in _COPY}
        if name in _OPAQUE or not (copied or out.is_floating_point()):
            return None, None
        if copied and name == "copy":
            tensors = tensors[1:2]
        plain = _first([self._plain(t) for t in tensors], out)
        active = _first([self._active(t) for t in tensors], out)
        if name in _ACTIVATION:
            return None, _first([active, plain], out)
        if plain is not None and active is not None:
            # x · sigmoid(x) and the like: the factor is the activation's own.
            plain = plain.masked_fill(plain == active, -1)
        return plain, active

    # -- flows ------------------------------------------------------------------------------------

    def _flow(self, tensor: Tensor) -> Flow:
        key = _key(tensor)
        if key in self._flows:
            return self._flows[key]
        if key in self._weights:
            return Flow(weight=self._weights[key][0])
        return Flow()

    def _flat(self, flow: Flow) -> bool:
        """Whether a weight is a matrix (a mixture's experts share one of three dimensions)."""
        return any(n == flow.weight and p.ndim == 2 for n, p in self._weights.values())

    def _plain(self, tensor: Tensor) -> Tensor | None:
        return _view(self._flow(tensor).plain, tensor)

    def _active(self, tensor: Tensor) -> Tensor | None:
        return _view(self._flow(tensor).active, tensor)

    def _sources(self, tensor: Tensor) -> list[int]:
        return _unique(self._plain(tensor))

    def _put(
        self,
        tensor: Tensor,
        flow: Flow,
        plain: Tensor | None = None,
        active: Tensor | None = None,
    ) -> None:
        """Sets the flow of a tensor's storage; a write into a part keeps the labels of the rest."""
        key = _key(tensor)
        old = self._flows.get(key)
        flow.plain = flow.plain if plain is None else _spread(plain, tensor, old and old.plain)
        flow.active = flow.active if active is None else _spread(active, tensor, old and old.active)
        if old is None:
            self._alive.append(tensor.untyped_storage())
        self._flows[key] = flow

    def _new_labels(self, count: int) -> int:
        self._labels += count
        return self._labels - count


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _view(labels: Tensor | None, tensor: Tensor) -> Tensor | None:
    if labels is None:
        return None
    return labels.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())


def _spread(labels: Tensor, tensor: Tensor, old: Tensor | None) -> Tensor:
    """Labels of a tensor as labels of its whole storage."""
    count = tensor.untyped_storage().nbytes() // tensor.element_size()
    flat = torch.full((count,), -1, dtype=torch.int32, device="cpu") if old is None else old.clone()
    flat.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset()).copy_(labels)
    return flat


def _unique(labels: Tensor | None) -> list[int]:
    if labels is None:
        return []
    found: list[int] = torch.unique(labels).tolist()
    return found[1:] if found and found[0] < 0 else found


def _joined(flows: Iterable[Flow]) -> Flow:
    """Everything but labels and weights, joined."""
    joined = Flow()
    for flow in flows:
        joined.scores |= flow.scores
        joined.probabilities |= flow.probabilities
        joined.attention |= flow.attention
        joined.inputs |= flow.inputs
    return joined


def _first(candidates: list[Tensor | None], out: Tensor) -> Tensor | None:
    """Elementwise the first label among inputs that broadcast to the output."""
    result: Tensor | None = None
    for labels in candidates:
        if labels is None or labels.ndim > out.ndim:
            continue
        fits = all(
            a in (1, b) for a, b in zip(reversed(labels.shape), reversed(out.shape), strict=False)
        )
        if fits:
            labels = labels.expand(out.shape)
            result = labels if result is None else torch.where(result >= 0, result, labels)
    return result


def _run_on_labels(func: Any, args: Any, kwargs: Any, of: Any, out: Tensor) -> Tensor | None:
    """The operation itself, on labels; None where it depends on values that meta tensors lack."""

    def labels(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point() and tensor.device.type == "cpu":
            return tensor  # an index with values
        found: Tensor | None = of(tensor)
        return torch.full(tensor.shape, -1, dtype=torch.int32, device="cpu") if found is None else found

    indices = [
        t
        for t in tree_leaves((args[1:], kwargs))
        if isinstance(t, Tensor) and not t.is_floating_point()
    ]
    if any(t.device.type == "meta" for t in indices):
        return None
    moved = func(*tree_map_only(Tensor, labels, args), **tree_map_only(Tensor, labels, kwargs))
    return moved if isinstance(moved, Tensor) and moved.shape == out.shape else None
