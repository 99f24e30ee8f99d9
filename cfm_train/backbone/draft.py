"""The sites of a model while they are being found: labels become modules and rows.

`roles.py` says which labels play which role; here a role becomes a site, or a name with the reason
why there is none.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable

from torch import nn

from cfm_train.backbone.ranges import Ranges, clip, minus, shifted, size
from cfm_train.backbone.sites import Site
from cfm_train.backbone.trace import Product, Trace


class Draft:
    """Collects sites in the order in which they run.

    Args:
        trace: the record of a forward pass.

    Attributes:
        model: the model on the meta device.
        title: its class, for messages.
        hidden_size: width of the residual stream, set before the first site.
        sites: what was found.
        absent: names without a site, with the sentence why.
    """

    def __init__(self, trace: Trace) -> None:
        self.model: nn.Module = trace.model
        self.title = type(trace.model).__name__
        self.hidden_size = 0
        self.sites: list[Site] = []
        self.absent: dict[str, str] = {}
        by_base = {product.base: product for product in trace.products}
        self._bases = sorted(by_base)
        self._products = [by_base[base] for base in self._bases]

    def parts(self, prefix: str, roles: dict[str, Ranges]) -> None:
        """Adds one site for each role, and one for a module that carries several of them.

        Args:
            prefix: ``layer.i.attn`` and the like.
            roles: the labels of each role.
        """
        owners: dict[str, Product] = {}
        for role, labels in roles.items():
            modules = self.products_of(labels)
            others = [x for r, x in roles.items() if r != role]
            if len(modules) != 1 or any(minus(labels, x) != labels for x in others):
                self.refuse(f"{prefix}.{role}", {p.module for p in modules})
                continue
            owners[role] = modules[0]
            self.linear(f"{prefix}.{role}", modules[0], labels)
        for product in {p.base: p for p in owners.values()}.values():
            shared = [role for role, owner in owners.items() if owner.base == product.base]
            if len(shared) > 1:
                joint = "" if len(shared[0]) == 1 else "_"
                self.linear(f"{prefix}.{joint.join(shared)}", product)

    def linear(
        self, name: str, product: Product, labels: Ranges | None = None, kind: str | None = None
    ) -> None:
        """Adds the site of a linear map, or of the output features that ``labels`` name."""
        if not product.is_output:
            self.absent[name] = (
                f"The projection '{name}' is computed inside of '{product.module}' and is not its "
                "output: nothing can be plugged in there."
            )
            return
        rows = None
        if labels is not None and size(labels) < product.out_features:
            rows = shifted(labels, -product.base)
        site = Site(
            name,
            product.module,
            kind or ("conv1d" if product.transposed else "linear"),
            product.in_features,
            product.out_features if rows is None else size(rows),
            rows,
            product.transposed,
            self._has_bias(product.module),
        )
        self.sites.append(site)

    def module(self, name: str, path: str, kind: str) -> None:
        """Adds the site of a module on the residual stream."""
        width, bias = self.hidden_size, self._has_bias(path)
        self.sites.append(Site(name, path, kind, width, width, bias=bias))

    def refuse(self, name: str, modules: Iterable[str]) -> None:
        """Notes that several modules (or none) could be the site."""
        self.absent[name] = (
            f"The site '{name}' of '{self.title}' is ambiguous{listed(modules)}: choose others."
        )

    def products_of(self, labels: Ranges) -> list[Product]:
        """The products that labels belong to (token ids have labels too, but no product)."""
        found: dict[int, Product] = {}
        for start, stop in labels:
            first = max(bisect_right(self._bases, start) - 1, 0)
            last = bisect_right(self._bases, stop - 1)
            for product in self._products[first:last]:
                if clip(((start, stop),), product.base, product.base + product.out_features):
                    found[product.base] = product
        return list(found.values())

    def _has_bias(self, path: str) -> bool:
        return getattr(self.model.get_submodule(path), "bias", None) is not None


def listed(names: Iterable[str]) -> str:
    """Names in brackets, for the middle of a sentence."""
    shown = ", ".join(f"'{n}'" for n in sorted(names))
    return f" ({shown})" if shown else ""
