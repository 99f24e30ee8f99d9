"""Follows data through a forward pass, operation by operation.

    labels(product with a weight) = first label of the module + column
    labels(view of t)             = the same view of labels(t)
    labels(cat, index, … of t)    = the same operation on labels(t)
    labels(f(t)), elementwise     = labels(t); kept apart as *active* behind an activation function

A product with a weight starts anew, so a flow reaches from one linear map to the next, and the rows
of a fused projection that reach the queries are read off after any mix of splits, transposes and
rotations. A product of two labelled tensors that feeds a softmax is attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cfm_train.backbone.flow import Flow, first, joined, key_of, run_on_labels, spread, view
from cfm_train.backbone.ranges import Ranges, ranges_of, size
from cfm_train.backbone.trace import Product, Result, Scores, Trace


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


#: Operations that move elements and leave them as they are.
_LAYOUT = _names("cat stack index index_select repeat constant_pad_nd roll flip")
_COPY = _names("clone _to_copy copy_")
#: Nonlinear functions of one element that feed-forward layers are built from.
_ACTIVATION = _names(
    "gelu silu relu relu_ relu6 leaky_relu elu celu selu tanh sigmoid erf softplus hardtanh "
    "hardswish hardsigmoid mish threshold expm1 clamp_min log_sigmoid_forward"
)
_NORM = _names("native_layer_norm _fused_rms_norm rsqrt sqrt linalg_vector_norm")
#: Operations whose elements depend on many others: what follows is no single feature any more.
_OPAQUE = _names("convolution cumsum sort topk gather scatter")


class Watcher(TorchDispatchMode):
    """The dispatch mode that moves flows along with tensors and writes the record.

    Args:
        record: holds the model on the meta device; filled while the model runs.
    """

    def __init__(self, record: Trace) -> None:
        super().__init__()
        self.record = record
        self._flows: dict[int, Flow] = {}
        self._alive: list[Any] = []  # the address of a freed storage would be used again
        self._weights: dict[int, tuple[str, nn.Parameter]] = {}
        self._bases: dict[int, int] = {}
        self._labels = 0
        self._stack: list[str] = [""]
        self._normalised: set[str] = set()
        for name, parameter in record.model.named_parameters():
            self._weights[key_of(parameter)] = (name, parameter)

    # The forward pass as its modules see it.

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Keeps track of which module runs."""
        handles = []
        for path, module in self.record.model.named_modules():
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
            self.record.ran.setdefault(path, len(self.record.ran))

        return enter

    def _leave(self, path: str) -> Any:
        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self._stack.pop()
            output = output[0] if isinstance(output, tuple) and output else output
            if not isinstance(output, Tensor) or not output.ndim:
                return
            self.record.widths[path] = output.shape[-1]
            # A table of positions may be normalised as well: it depends on no token.
            normed = path in self._normalised and self._flow(output).inputs
            if normed and path not in self.record.norms:
                self.record.norms.append(path)
            product = self.record.products[-1] if self.record.products else None
            if product is not None and product.module == path:
                product.is_output = self._is_output(product, output)

        return leave

    def _is_output(self, product: Product, output: Tensor) -> bool:
        """Whether a module answers with its product as it is (a bias may be added)."""
        labels = self._plain(output)
        if labels is None or labels.shape[-1] != product.out_features:
            return False
        row = labels.reshape(-1, product.out_features)[0]
        return int(row[0]) == product.base and bool((row.diff() == 1).all())

    def mark_ids(self, ids: Tensor, bit: int) -> None:
        """Labels token ids, so that the embedding they are looked up in can be told."""
        labels = torch.arange(ids.numel(), dtype=torch.int32, device="cpu")
        self._put(ids, Flow(inputs=bit), labels.reshape(ids.shape) + self._new(ids.numel()))

    def finish(self, logits: Tensor | None) -> None:
        """Reads where the logits come from (a soft cap makes them active)."""
        if logits is not None:
            labels = self._plain(logits)
            self.record.head = ranges_of(self._active(logits) if labels is None else labels)

    # The forward pass as its operations see it.

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        if name == "_local_scalar_dense" and args[0].is_meta:
            # A branch on a value: answer as for an input in which nothing special occurs.
            return torch.zeros((), dtype=args[0].dtype, device="cpu").item()
        output = func(*args, **kwargs)
        with torch._C.DisableTorchFunction():  # labels are no part of the pass
            self._follow(func, name, args, kwargs, output)
        return output

    def _follow(self, func: Any, name: str, args: Any, kwargs: Any, output: Any) -> None:
        if name in _NORM:
            self._normalised.add(self._stack[-1])
        if name in ("mm", "addmm", "bmm", "baddbmm"):
            self._product(args[-2], args[-1], output, [self._flow(t) for t in args])
        elif name == "embedding":
            self._embedding(args[0], args[1], output)
        elif name in ("_softmax", "_safe_softmax"):
            self._softmax(args[0], args[1], output)
        else:
            self._other(func, name, args, kwargs, output)

    def _product(self, left: Tensor, right: Tensor, output: Tensor, flows: list[Flow]) -> None:
        a, b = flows[-2:]
        weight = a.weight or b.weight
        total = joined(flows)
        if weight is not None and self.record.model.get_parameter(weight).ndim == 2:
            matrix = right[0] if right.ndim == 3 and right.shape[0] == 1 else right
            if matrix.ndim == 2 and key_of(right) in self._weights:
                self._linear(left, matrix, output)
                return
            total = Flow(inputs=total.inputs)
        elif weight is not None:
            owner = weight.rpartition(".")[0]
            if owner not in self.record.experts:
                self.record.experts.append(owner)
            total = Flow(inputs=total.inputs)
        elif bool(a.probabilities) != bool(b.probabilities):
            values, width = (right, right.shape[-1]) if a.probabilities else (left, left.shape[-2])
            result = Result(a.probabilities | b.probabilities, self._sources(values), width)
            self.record.results.append(result)
            number = len(self.record.results) - 1
            total = Flow(attention=frozenset({number}), inputs=total.inputs)
        elif (query := self._sources(left)) and (key := self._sources(right)):
            width = left.shape[-1]
            heads, kv_heads = max(size(query) // width, 1), self._heads(right)
            where = self._stack[-1]
            self.record.scores.append(
                Scores(where, query, key, a.inputs, b.inputs, heads, kv_heads, width)
            )
            total.scores |= {len(self.record.scores) - 1}
        self._put(output, total)

    def _linear(self, left: Tensor, right: Tensor, output: Tensor) -> None:
        name, parameter = self._weights[key_of(right)]
        transposed = right.stride(1) == 1 and right.stride(0) != 1
        features = parameter.shape[1] if transposed else parameter.shape[0]
        if key_of(right) not in self._bases:
            self._bases[key_of(right)] = self._new(features)
        base = self._bases[key_of(right)]
        product = Product(name.rpartition(".")[0], right.shape[0], features, transposed, base)
        flow = self._flow(left)
        product.attention = flow.attention
        product.active = ranges_of(self._active(left))
        product.plain = self._sources(left) if product.active else ()
        self.record.products.append(product)
        # A module may multiply with a part of its weight only.
        start = base + right.storage_offset() // (1 if transposed else right.shape[0])
        labels = torch.arange(start, start + right.shape[1], dtype=torch.int32, device="cpu")
        self._put(output, Flow(inputs=flow.inputs), labels.expand(output.shape))

    def _embedding(self, weight: Tensor, ids: Tensor, output: Tensor) -> None:
        flow = self._flow(ids)
        if flow.plain is not None and self._flow(weight).weight is not None:
            known = self.record.embeddings
            known[self._stack[-1]] = known.get(self._stack[-1], 0) | flow.inputs
        self._put(output, Flow(inputs=flow.inputs))

    def _softmax(self, scores: Tensor, dim: int, output: Tensor) -> None:
        flow = self._flow(scores)
        if dim not in (-1, scores.ndim - 1):
            for number in flow.scores:  # computed as keys times queries
                self.record.scores[number].swap()
        self._put(output, Flow(probabilities=flow.scores, inputs=flow.inputs))

    def _other(self, func: Any, name: str, args: Any, kwargs: Any, output: Any) -> None:
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        keys = {key_of(t) for t in tensors}
        if not any(key in self._flows or key in self._weights for key in keys):
            return
        writes = name.endswith("_")
        for out in tree_leaves(output):
            if not isinstance(out, Tensor) or (not writes and key_of(out) in keys):
                continue  # a view: its storage already has a flow
            flow = joined(map(self._flow, tensors))
            if name in _LAYOUT or name in _COPY:
                flow.weight = next((w for t in tensors if (w := self._flow(t).weight)), None)
            self._put(out, flow, *self._moved(func, name, args, kwargs, tensors, out))

    def _moved(
        self, func: Any, name: str, args: Any, kwargs: Any, tensors: list[Tensor], out: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """Plain and active labels of what an operation made of its tensors."""
        if name in _LAYOUT:
            plain = run_on_labels(func, args, kwargs, self._plain)
            return plain, run_on_labels(func, args, kwargs, self._active)
        if name in _OPAQUE or not (name in _COPY or out.is_floating_point()):
            return None, None
        if name == "copy_":
            tensors = tensors[1:]
        plain = first(map(self._plain, tensors), out.shape)
        active = first(map(self._active, tensors), out.shape)
        if name in _ACTIVATION:
            return None, first([active, plain], out.shape)
        if plain is not None and active is not None:
            # x · sigmoid(x) and the like: the factor is the activation's own.
            plain = plain.masked_fill(plain == active, -1)
        return plain, active

    # Flows and labels.

    def _flow(self, tensor: Tensor) -> Flow:
        key = key_of(tensor)
        if key in self._flows:
            return self._flows[key]
        return Flow(weight=self._weights[key][0]) if key in self._weights else Flow()

    def _plain(self, tensor: Tensor) -> Tensor | None:
        return view(self._flow(tensor).plain, tensor)

    def _active(self, tensor: Tensor) -> Tensor | None:
        return view(self._flow(tensor).active, tensor)

    def _sources(self, tensor: Tensor) -> Ranges:
        return ranges_of(self._plain(tensor))

    def _heads(self, key: Tensor) -> int:
        """How many different heads there are among keys ``[heads, dim, tokens]``."""
        labels = self._plain(key)
        if labels is None or labels.ndim != 3:
            return 1
        return len(set(map(tuple, labels[..., 0].tolist())))

    def _put(
        self,
        tensor: Tensor,
        flow: Flow,
        plain: Tensor | None = None,
        active: Tensor | None = None,
    ) -> None:
        """Sets the flow of a tensor's storage; a write into a part keeps the labels of the rest."""
        key = key_of(tensor)
        old = self._flows.get(key)
        if old is None:
            self._alive.append(tensor.untyped_storage())
        if plain is not None:
            flow.plain = spread(plain, tensor, old.plain if old else None)
        if active is not None:
            flow.active = spread(active, tensor, old.active if old else None)
        self._flows[key] = flow

    def _new(self, count: int) -> int:
        self._labels += count
        return self._labels - count
