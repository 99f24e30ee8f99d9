"""One merge of whole models: what goes in, what is wanted, and the last step of every number."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cfm_train.backbone.tensors import Placed
from cfm_train.errors import UserError
from cfm_train.merging.mix import Mix
from cfm_train.merging.models.files import DTYPES, Reader, numbers_in
from cfm_train.merging.models.sources import FLOATS, Plan
from cfm_train.merging.weights import Weights


@dataclass(frozen=True)
class Task:
    """A merge of whole models.

    Attributes:
        mix: rule, sparsifier, scope, λ.
        weights: by name of the tensor.
        inputs: the tensors of each model.
        base: those of the base; None for a rule that takes parameters as they are.
        plan: what becomes of every tensor.
        sources: what each input is, by content: what a random sparsifier draws depends on it.
        names: what sentences call the inputs.
    """

    mix: Mix
    weights: Weights
    inputs: Sequence[Mapping[str, Placed]]
    base: Mapping[str, Placed] | None
    plan: Plan
    sources: Sequence[str]
    names: Sequence[str]

    @functools.cached_property
    def dtype(self) -> torch.dtype:
        """What is computed in: float64 where a model or the result has it, else float32."""
        models = [*self.inputs, *([] if self.base is None else [self.base])]
        words = {tensors[name].info.dtype for tensors in models for name in self.plan.merged}
        wide = "F64" in words | set(self.plan.dtypes.values())
        return torch.float64 if wide else torch.float32

    def groups(self) -> list[list[str]]:
        """Names of the tensors that are merged at once, as the mix's scope has it.

        Raises:
            UserError: the rule or sparsifier takes one tensor at a time, or matrices alone.
        """
        names = [name for name in self.plan.merged if name not in self.plan.twins]
        found = self.mix.groups([(name, name) for name in names])
        groups = [[names[number] for number in group] for group in found]
        if self.mix.rule.matrices:
            for name in names:
                shape = self.inputs[0][name].info.shape
                if len(shape) > 2:
                    raise UserError(
                        f"rule={self.mix.rule.kind} merges matrices, and '{name}' has the shape "
                        f"{list(shape)}: use a rule that goes by number, such as rule=ties."
                    )
        return groups

    def finish(self, name: str, merged: Tensor, base: Tensor | None, out: Tensor) -> None:
        """λ, the base, and the one cast to the new model's dtype.

        Args:
            name: the tensor's name.
            merged: ``[*shape]``, the merged update.
            base: the base's numbers there, if any.
            out: of the same shape; filled.

        Raises:
            UserError: a number is not finite, or too large for the dtype.
        """
        if base is not None:
            merged = (merged if self.mix.scale == 1 else merged * self.mix.scale) + base
        if merged.numel():
            low, high = torch.aminmax(merged)
            limit = torch.finfo(out.dtype).max
            if not (-limit <= low.item() and high.item() <= limit):
                raise UserError(self._why(name, out.dtype))
        out.copy_(merged)

    def _why(self, name: str, dtype: torch.dtype) -> str:
        """Whose fault a number is that is not finite."""
        models = [*zip(self.names, self.inputs, strict=True)]
        if self.base is not None:
            models.append(("the base", self.base))
        with Reader() as reader:
            for called, tensors in models:
                found = torch.empty(numbers_in(tensors[name]), dtype=self.dtype)
                reader.read(tensors[name], 0, found)
                if bad := int((~found.isfinite()).sum()):
                    return (
                        f"{bad} of the values of '{name}' in '{called}' are NaN or infinite: its "
                        "training diverged or the file is damaged; use another model."
                    )
        word = next(FLOATS[word] for word, one in DTYPES.items() if one == dtype)
        return (
            f"The merged values of '{name}' are too large for {word}: use smaller weights or "
            "merge.dtype=float32."
        )
