"""The roles of a model's modules, from the record of its data flow (`trace.py`).

    q, k, v   what feeds the scores (first and second factor) and what the probabilities multiply
    o         the first product after attention
    down      a product whose input passed an activation function
    gate, up  what passed it, and what was multiplied with that; alone, it is ``up``
    cross     attention whose keys come from the other stack's tokens

What has two answers gets no site: its name is kept with the reason, and asking for it is refused.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from cfm_train.backbone.ranges import Ranges, clip, minus, shifted, size
from cfm_train.backbone.sites import AttentionSite, Site, SiteMap
from cfm_train.backbone.trace import Product, Result, Scores, Trace
from cfm_train.errors import UserError

_DECODER = 2  # the bit of the decoder's token ids


@dataclass(frozen=True)
class _Block:
    """One attention of one layer: what the trace saw, where it is, and what follows it."""

    scores: Scores
    result: Result
    stack: str
    cross: bool
    outputs: tuple[Product, ...]


def assign(trace: Trace) -> SiteMap:
    """Turns the record of a forward pass into sites.

    Args:
        trace: from `trace.trace`.

    Returns:
        All sites of the model, in the order in which they run.

    Raises:
        UserError: the model has no attention, or its layers cannot be told.
    """
    return _Assigner(trace).run()


class _Assigner:
    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.model: nn.Module = trace.model
        self.title = type(trace.model).__name__
        self.two_stacks = bool(trace.model.config.is_encoder_decoder)
        self.sites: list[Site] = []
        self.absent: dict[str, str] = {}
        self.lists = {n for n, m in self.model.named_modules() if isinstance(m, nn.ModuleList)}
        by_base = {product.base: product for product in trace.products}
        self.products = [by_base[base] for base in sorted(by_base)]
        self.bases = sorted(by_base)

    def run(self) -> SiteMap:
        blocks = self._blocks()
        self.hidden_size = blocks[0].outputs[0].out_features
        stacks = {s: self._layers(s, [b for b in blocks if b.stack == s]) for s in _stacks(blocks)}
        self._embeddings()
        for stack, layers in stacks.items():
            self._outer_norms(stack, stacks, before=True)
            for number, path in enumerate(layers):
                name = f"{stack}layer.{number}"
                inside = [b for b in blocks if _under(b.scores.module, path)]
                self._module(name, path, "layer")
                self._attention(name, inside)
                self._feed_forward(name, path, inside)
                self._norms(name, path, blocks)
            self._outer_norms(stack, stacks, before=False)
        self._head()
        counts = {stack: len(layers) for stack, layers in stacks.items()}
        return SiteMap(self.sites, self.hidden_size, counts, self.absent)

    # -- attention --------------------------------------------------------------------------------

    def _blocks(self) -> list[_Block]:
        """The attentions of the model, each module once however often it runs."""
        blocks: dict[str, _Block] = {}
        for number, result in enumerate(self.trace.results):
            # Scores against a table of positions depend on no token: they are a bias.
            every = [self.trace.scores[i] for i in sorted(result.scores)]
            real = [s for s in every if s.query_inputs and s.key_inputs]
            outputs = {p.module: p for p in self.trace.products if number in p.attention}
            if len(real) != 1 or not outputs:
                raise UserError(
                    f"The sites of '{self.title}' cannot be found: attention in "
                    f"'{every[0].module}' has {len(real)} pairs of queries and keys and "
                    f"{len(outputs)} output projections. Use another backbone."
                )
            scores = real[0]
            decoder = self.two_stacks and bool(scores.query_inputs & _DECODER)
            cross = decoder and not scores.key_inputs & _DECODER
            stack = ("decoder." if decoder else "encoder.") if self.two_stacks else ""
            block = _Block(scores, result, stack, cross, tuple(outputs.values()))
            blocks.setdefault(scores.module, block)
        if not blocks:
            raise UserError(
                f"'{self.title}' has no attention that could be followed: its sites cannot be "
                "found. Use a transformer as backbone."
            )
        return list(blocks.values())

    def _layers(self, stack: str, blocks: Sequence[_Block]) -> list[str]:
        """Paths of a stack's layers in the order in which they run."""
        found: set[str] = set()
        for block in blocks:
            parts = block.scores.module.split(".")
            for end in range(1, len(parts)):
                path = ".".join(parts[:end])
                if path in self.lists and self._is_layer_list(path, blocks):
                    found.add(path)
                    break
        if len(found) != 1:
            raise UserError(
                f"The layers of '{self.title}' cannot be told: its attention lies in {len(found)} "
                f"lists of modules{_listed(found)}. Use another backbone."
            )
        parent = found.pop()
        ran = self.trace.ran
        layers = [p for p in ran if p.rpartition(".")[0] == parent]
        return sorted(layers, key=ran.__getitem__)

    def _is_layer_list(self, path: str, blocks: Sequence[_Block]) -> bool:
        """Whether each element has one attention of a kind at most (groups of layers have more)."""
        seen = set()
        for block in blocks:
            if _under(block.scores.module, path):
                element = block.scores.module[len(path) + 1 :].split(".")[0]
                if (element, block.cross) in seen:
                    return False
                seen.add((element, block.cross))
        return True

    def _attention(self, layer: str, blocks: Iterable[_Block]) -> None:
        for block in blocks:
            seen, name = block.scores, f"{layer}.{'cross' if block.cross else 'attn'}"
            self.sites.append(
                AttentionSite(
                    name,
                    seen.module,
                    "attention",
                    self.hidden_size,
                    self.hidden_size,
                    heads=seen.heads,
                    kv_heads=seen.kv_heads,
                    head_dim=seen.head_dim,
                    value_dim=block.result.value_dim,
                    kv=seen.module in self.trace.ports and self.trace.model._supports_sdpa,
                )
            )
            self._parts(name, {"q": seen.query, "k": seen.key, "v": block.result.value})
            if len(block.outputs) == 1:
                self._linear(f"{name}.o", block.outputs[0])
            else:
                self._refuse(f"{name}.o", {p.module for p in block.outputs})

    # -- feed-forward -----------------------------------------------------------------------------

    def _feed_forward(self, layer: str, path: str, blocks: Sequence[_Block]) -> None:
        experts = [e for e in self.trace.experts if _under(e, path)]
        name = f"{layer}.ffn.shared" if experts else f"{layer}.ffn"
        taken = {p.module for b in blocks for p in b.outputs}
        downs: dict[str, Product] = {}
        for product in self.trace.products:
            inner = [m for m in self._modules_of(product.active) if _under(m.module, path)]
            if inner and _under(product.module, path) and product.module not in taken:
                downs.setdefault(product.module, product)
        for module in experts:
            self._module(f"{layer}.ffn.experts", module, "experts")
            for role in ("gate", "up", "down"):
                self.absent[f"{layer}.ffn.{role}"] = (
                    f"The experts of '{layer}' share three-dimensional weights in '{module}', "
                    "which have no sites of their own: use attn.* or ffn.experts."
                )
        if len(downs) > 1:
            for role in ("gate", "up", "down"):
                self._refuse(f"{name}.{role}", downs)
        elif downs:
            down = next(iter(downs.values()))
            gate, up = down.active, minus(down.plain, down.active)
            self._parts(name, {"gate": gate, "up": up} if up else {"up": gate})
            self._linear(f"{name}.down", down)

    # -- what is around ---------------------------------------------------------------------------

    def _norms(self, layer: str, path: str, blocks: Sequence[_Block]) -> None:
        """Norms of the residual stream; those of queries and keys lie inside the attention."""
        inner = [b.scores.module for b in blocks]
        norms = [
            norm
            for norm, width in self.trace.norms.items()
            if _under(norm, path)
            and width == self.hidden_size
            and not any(_under(norm, attention) for attention in inner)
        ]
        for number, norm in enumerate(norms):
            self._module(f"{layer}.norm.{number}", norm, "norm")

    def _outer_norms(self, stack: str, stacks: dict[str, list[str]], *, before: bool) -> None:
        """The norm after the embedding, and the norm after the last layer."""
        layers = stacks[stack]
        root = layers[0].rpartition(".")[0].rpartition(".")[0]
        every = [layer for paths in stacks.values() for layer in paths]
        ran = self.trace.ran
        norms = [
            norm
            for norm, width in self.trace.norms.items()
            if width == self.hidden_size
            and (len(stacks) == 1 or _under(norm, root))
            and not any(_under(norm, layer) for layer in every)
            and (ran[norm] < ran[layers[0]]) == before
        ]
        # In a prediction head there may be more: those are no part of the stack.
        inside = [norm for norm in norms if _under(norm, root)] or norms
        if len(inside) == 1:
            self._module(f"{stack}{'embed_norm' if before else 'norm'}", inside[0], "norm")

    def _embeddings(self) -> None:
        found: dict[str, list[str]] = {}
        for path, bits in self.trace.embeddings.items():
            if not self.two_stacks or bits == 3:
                names = ["embed"]
            else:
                names = ["decoder.embed" if bits & _DECODER else "encoder.embed"]
            for name in names:
                found.setdefault(name, []).append(path)
        for name, paths in found.items():
            if len(paths) > 1:
                self._refuse(name, paths)
                continue
            weight = self.model.get_submodule(paths[0]).weight
            assert isinstance(weight, Tensor)
            self.sites.append(Site(name, paths[0], "embed", weight.shape[0], weight.shape[1]))

    def _head(self) -> None:
        owners = self._modules_of(self.trace.head)
        if len(owners) == 1:
            self._linear("head", owners[0], kind="head")
        elif owners:
            self._refuse("head", {p.module for p in owners})

    # -- sites ------------------------------------------------------------------------------------

    def _parts(self, prefix: str, roles: dict[str, Ranges]) -> None:
        """One site for each role, and one for a module that carries several of them."""
        owners: dict[str, Product] = {}
        for role, labels in roles.items():
            modules = self._modules_of(labels)
            others = [x for r, x in roles.items() if r != role]
            if len(modules) != 1 or any(minus(labels, x) != labels for x in others):
                self._refuse(f"{prefix}.{role}", {p.module for p in modules})
                continue
            owners[role] = modules[0]
            self._linear(f"{prefix}.{role}", modules[0], labels)
        for product in {p.base: p for p in owners.values()}.values():
            shared = [role for role, owner in owners.items() if owner.base == product.base]
            if len(shared) > 1:
                joint = "" if len(shared[0]) == 1 else "_"
                self._linear(f"{prefix}.{joint.join(shared)}", product)

    def _linear(
        self,
        name: str,
        product: Product,
        labels: Ranges | None = None,
        kind: str | None = None,
    ) -> None:
        if not product.is_output:
            self.absent[name] = (
                f"The projection '{name}' is computed inside of '{product.module}' and is not its "
                "output: nothing can be plugged in there."
            )
            return
        rows = None
        if labels is not None and size(labels) < product.out_features:
            rows = shifted(labels, -product.base)
        self.sites.append(
            Site(
                name,
                product.module,
                kind or ("conv1d" if product.transposed else "linear"),
                product.in_features,
                product.out_features if rows is None else size(rows),
                rows,
                product.transposed,
                self._has_bias(product.module),
            )
        )

    def _module(self, name: str, path: str, kind: str) -> None:
        width, bias = self.hidden_size, self._has_bias(path)
        self.sites.append(Site(name, path, kind, width, width, bias=bias))

    def _has_bias(self, path: str) -> bool:
        return getattr(self.model.get_submodule(path), "bias", None) is not None

    def _modules_of(self, labels: Ranges) -> list[Product]:
        """The products that the labels belong to (token ids have labels too, but no product)."""
        found: dict[int, Product] = {}
        for start, stop in labels:
            first = max(bisect_right(self.bases, start) - 1, 0)
            last = bisect_right(self.bases, stop - 1)
            for product in self.products[first:last]:
                if clip(((start, stop),), product.base, product.base + product.out_features):
                    found[product.base] = product
        return list(found.values())

    def _refuse(self, name: str, modules: Iterable[str]) -> None:
        self.absent[name] = (
            f"The site '{name}' of '{self.title}' is ambiguous{_listed(modules)}: choose others."
        )


def _stacks(blocks: Iterable[_Block]) -> list[str]:
    return list(dict.fromkeys(block.stack for block in blocks))


def _under(path: str, root: str) -> bool:
    return not root or path == root or path.startswith(root + ".")


def _listed(names: Iterable[str]) -> str:
    shown = ", ".join(f"'{n}'" for n in sorted(names))
    return f" ({shown})" if shown else ""
