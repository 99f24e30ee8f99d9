"""The roles of a model's modules, from the record of its data flow (`trace.py`).

    q, k, v   what feeds the scores (first and second factor) and what the probabilities multiply
    o         the first product after attention
    down      a product whose input passed an activation function
    gate, up  what passed it, and what was multiplied with that; alone, it is ``up``
    cross     attention whose keys come from the other stack's tokens

What has two answers gets no site: its name is kept with the reason, and asking for it is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from cfm_train.backbone.draft import Draft, listed
from cfm_train.backbone.ranges import minus
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
        self.draft = Draft(trace)
        self.two_stacks = bool(trace.model.config.is_encoder_decoder)
        modules = trace.model.named_modules()
        self.lists = {path for path, module in modules if isinstance(module, nn.ModuleList)}

    def run(self) -> SiteMap:
        blocks = self._blocks()
        names = dict.fromkeys(block.stack for block in blocks)
        stacks = {s: self._layers([b for b in blocks if b.stack == s]) for s in names}
        first_layer, output = next(iter(stacks.values()))[0], blocks[0].outputs[0]
        self.draft.hidden_size = self.trace.widths.get(first_layer, output.out_features)
        self._embeddings()
        for stack, layers in stacks.items():
            self._outer_norms(stack, stacks, before=True)
            for number, path in enumerate(layers):
                name = f"{stack}layer.{number}"
                inside = [b for b in blocks if _under(b.scores.module, path)]
                self.draft.module(name, path, "layer")
                self._attention(name, inside)
                self._feed_forward(name, path, inside)
                self._norms(name, path, blocks)
            self._outer_norms(stack, stacks, before=False)
        self._head()
        counts = {stack: len(layers) for stack, layers in stacks.items()}
        return SiteMap(self.draft.sites, self.draft.hidden_size, counts, self.draft.absent)

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
                    f"The sites of '{self.draft.title}' cannot be found: attention in "
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
                f"'{self.draft.title}' has no attention that could be followed: its sites cannot "
                "be found. Use a transformer as backbone."
            )
        return list(blocks.values())

    def _layers(self, blocks: Sequence[_Block]) -> list[str]:
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
                f"The layers of '{self.draft.title}' cannot be told: its attention lies in "
                f"{len(found)} lists of modules{listed(found)}. Use another backbone."
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
            self.draft.sites.append(
                AttentionSite(
                    name,
                    seen.module,
                    "attention",
                    self.draft.hidden_size,
                    self.draft.hidden_size,
                    heads=seen.heads,
                    kv_heads=seen.kv_heads,
                    head_dim=seen.head_dim,
                    value_dim=block.result.value_dim,
                    kv=seen.module in self.trace.ports and self.trace.model._supports_sdpa,
                )
            )
            self.draft.parts(name, {"q": seen.query, "k": seen.key, "v": block.result.value})
            if len(block.outputs) == 1:
                self.draft.linear(f"{name}.o", block.outputs[0])
            else:
                self.draft.refuse(f"{name}.o", {p.module for p in block.outputs})

    # -- feed-forward -----------------------------------------------------------------------------

    def _feed_forward(self, layer: str, path: str, blocks: Sequence[_Block]) -> None:
        experts = [e for e in self.trace.experts if _under(e, path)]
        name = f"{layer}.ffn.shared" if experts else f"{layer}.ffn"
        taken = {p.module for b in blocks for p in b.outputs}
        downs: dict[str, Product] = {}
        for product in self.trace.products:
            inner = [m for m in self.draft.products_of(product.active) if _under(m.module, path)]
            if inner and _under(product.module, path) and product.module not in taken:
                downs.setdefault(product.module, product)
        for module in experts:
            self.draft.module(f"{layer}.ffn.experts", module, "experts")
            for role in ("gate", "up", "down"):
                self.draft.absent[f"{layer}.ffn.{role}"] = (
                    f"The experts of '{layer}' share three-dimensional weights in '{module}', "
                    "which have no sites of their own: use attn.* or ffn.experts."
                )
        if len(downs) > 1:
            for role in ("gate", "up", "down"):
                self.draft.refuse(f"{name}.{role}", downs)
        elif downs:
            down = next(iter(downs.values()))
            gate, up = down.active, minus(down.plain, down.active)
            self.draft.parts(name, {"gate": gate, "up": up} if up else {"up": gate})
            self.draft.linear(f"{name}.down", down)

    # -- what is around ---------------------------------------------------------------------------

    def _norms(self, layer: str, path: str, blocks: Sequence[_Block]) -> None:
        """Norms of the residual stream; those of queries and keys run before the output."""
        ran = self.trace.ran
        inner = [(b.scores.module, ran.get(b.outputs[0].module, len(ran))) for b in blocks]
        norms = [
            norm
            for norm in self.trace.norms
            if _under(norm, path)
            and self.trace.widths[norm] == self.draft.hidden_size
            and not any(_under(norm, attention) and ran[norm] < end for attention, end in inner)
        ]
        for number, norm in enumerate(norms):
            self.draft.module(f"{layer}.norm.{number}", norm, "norm")

    def _outer_norms(self, stack: str, stacks: dict[str, list[str]], *, before: bool) -> None:
        """The norm after the embedding, and the norm after the last layer."""
        layers = stacks[stack]
        root = layers[0].rpartition(".")[0].rpartition(".")[0]
        every = [layer for paths in stacks.values() for layer in paths]
        ran = self.trace.ran
        norms = [
            norm
            for norm in self.trace.norms
            if self.trace.widths[norm] == self.draft.hidden_size
            and (len(stacks) == 1 or _under(norm, root))
            and not any(_under(norm, layer) for layer in every)
            and (ran[norm] < ran[layers[0]]) == before
        ]
        # In a prediction head there may be more: those are no part of the stack.
        inside = [norm for norm in norms if _under(norm, root)] or norms
        if len(inside) == 1:
            self.draft.module(f"{stack}{'embed_norm' if before else 'norm'}", inside[0], "norm")

    def _embeddings(self) -> None:
        """Where token ids are looked up; one module may serve both stacks."""
        names = {1: "encoder.embed", 2: "decoder.embed", 3: "embed"}
        found: dict[str, list[str]] = {}
        for path, bits in self.trace.embeddings.items():
            found.setdefault(names[bits] if self.two_stacks else "embed", []).append(path)
        for name, paths in found.items():
            if len(paths) > 1:
                self.draft.refuse(name, paths)
                continue
            weight = self.trace.model.get_submodule(paths[0]).weight
            assert isinstance(weight, Tensor)
            self.draft.sites.append(Site(name, paths[0], "embed", weight.shape[0], weight.shape[1]))

    def _head(self) -> None:
        owners = self.draft.products_of(self.trace.head)
        if len(owners) == 1:
            self.draft.linear("head", owners[0], kind="head")
        elif owners:
            self.draft.refuse("head", {p.module for p in owners})


def _under(path: str, root: str) -> bool:
    return not root or path == root or path.startswith(root + ".")
