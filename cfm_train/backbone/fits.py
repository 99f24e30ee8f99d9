"""Whether a foreign adapter can belong to a backbone, from names and shapes alone: no torch.

A refusal has to be certain, so only what cannot be otherwise is refused: no module of the adapter
is in the backbone, a layer is missing, or a low-rank factor has a width that the module has not.
Modules are known by what follows their stack's name (``layers.3.self_attn.q_proj``), as the front
differs between a model, its task models and its checkpoints. Experts are left alone: checkpoints
name them one by one where the model has them fused.
"""

from __future__ import annotations

from collections.abc import Mapping

from cfm_train.backbone.spec import ResolvedBackbone
from cfm_train.backbone.tensors import NUMBERED, placed_tensors
from cfm_train.errors import UserError
from cfm_train.library.tensorfile import TensorInfo

_FRONT = "base_model.model."
#: Dtypes of tensors that are not packed: their shape is that of the module.
_PLAIN = ("F64", "F32", "F16", "BF16")


def check_fits(adapter: Mapping[str, TensorInfo], backbone: ResolvedBackbone, where: str) -> None:
    """Refuses an adapter whose modules the backbone has not, or has in other widths.

    Args:
        adapter: its tensors by PEFT's names.
        backbone: the backbone's folder.
        where: what to call the adapter in the error sentence.

    Raises:
        UserError: naming the first module, layer or tensor that the backbone has not.
    """
    layers: set[str] = set()
    widths: dict[str, set[int]] = {}  # of every module that holds tensors of its own
    for name, placed in placed_tensors(backbone).items():
        if tails := _tails(name):
            layers.add(tails[0])
            widths.setdefault(tails[-1], set())
            if placed.info.dtype in _PLAIN:
                widths[tails[-1]] |= {*placed.info.shape}
    asked = {name: _tails(name.removeprefix(_FRONT)) for name in adapter if ".experts." not in name}
    found = {
        name: next((tail for tail in reversed(tails) if tail in widths), None)
        for name, tails in asked.items()
        if tails
    }
    if not found:
        return
    wrong = f"The adapter {where} does not fit the backbone '{backbone.id}'"
    remedy = "name the backbone that it was trained on"
    if not any(found.values()):
        raise UserError(
            f"{wrong}, which has none of its modules ('{next(iter(found))}', …): {remedy}."
        )
    for name, module in found.items():
        if asked[name][0] not in layers:
            raise UserError(f"{wrong}, which has no layer for its '{name}': {remedy}.")
        width = _outer_width(name, adapter[name])
        if module and widths[module] and width and width not in widths[module]:
            known = " × ".join(map(str, sorted(widths[module])))
            raise UserError(
                f"{wrong}: its '{name}' is {width} wide, and {module} there is {known}; {remedy}."
            )


def _tails(name: str) -> list[str]:
    """A tensor's layer, and then each module inside that holds it; nothing outside of layers."""
    match = NUMBERED.match(name)
    if match is None:
        return []
    tails = [f"{match['stack'].rsplit('.', 1)[-1]}.{match['layer']}"]
    for part in match["rest"].split(".")[:-1]:
        tails.append(f"{tails[-1]}.{part}")
    return tails


def _outer_width(name: str, tensor: TensorInfo) -> int | None:
    """The width that a low-rank factor shares with its module; None for any other tensor."""
    if len(tensor.shape) == 2:
        if name.endswith(".lora_A.weight"):
            return tensor.shape[1]
        if name.endswith(".lora_B.weight"):
            return tensor.shape[0]
    return None
