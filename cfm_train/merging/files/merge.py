"""Adapters in, an adapter out: the merge engine of bricks, on the frame that adapters tell."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from cfm_train.backbone.folders import written_aside
from cfm_train.config import merging
from cfm_train.errors import UserError
from cfm_train.library.peft_format import CONFIG_FILE, TENSOR_FILE
from cfm_train.merging.files.adapters import Adapters
from cfm_train.merging.sidecars import needed_by

if TYPE_CHECKING:
    from cfm_train.backbone.load import Backbone

NOTE_FILE = "merge.json"


@dataclass(frozen=True)
class MergedAdapter:
    """A merged adapter, not yet written.

    Attributes:
        files: content by name, as PEFT reads them, and a note of what it was made from.
        lost: the largest share of a module's update that a cut to a rank left out; None where
            nothing was cut.
        rank: the largest rank of a module.
    """

    files: dict[str, bytes]
    lost: float | None
    rank: int

    def write(self, out: Path) -> None:
        """Writes the folder, which is whole or not there."""
        with written_aside(out.expanduser().absolute()) as folder:
            for name, content in self.files.items():
                (folder / name).write_bytes(content)


def parameters_of(rule: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """All parameters of a merge of files.

    Args:
        rule: an option of ``conf/rule``, such as ``ties/mergekit``.
        given: parameters that replace the option's.

    Raises:
        UserError: there is no such rule, it has no such parameter, or it needs statistics.
    """
    found = merging.complete(rule, given)
    statistic = needed_by(found["rule"])
    if statistic is not None:
        raise UserError(
            f"rule={rule} goes by {statistic} statistics, which adapter folders do not hold: add "
            f"the adapters to a library and run recipe=analyze/{statistic}."
        )
    return found


def merge_adapters(
    adapters: Adapters, weights: object, rule: str, given: Mapping[str, Any]
) -> MergedAdapter:
    """Merges LoRA adapters by any rule, in any space of low-rank bricks.

    Args:
        adapters: what `open_adapters` found.
        weights: one for each, or None for the rule's own; see `cfm_train.merging.weights`.
        rule: an option of ``conf/rule``.
        given: parameters in place of the option's: ``space``, ``rank``, ``density``, …

    Returns:
        The adapter: alpha is each module's rank, so that nothing is scaled.

    Raises:
        UserError: they cannot be merged this way.
    """
    parameters = parameters_of(rule, given)
    merging.check_count(parameters["rule"], len(adapters.all), "adapters")

    from safetensors import safe_open
    from safetensors.torch import load, save

    from cfm_train.bricks.lora import LoRA
    from cfm_train.merging import engine
    from cfm_train.merging.mix import make_mix

    # Spaces ask a backbone for sites and a device, and for weights only where DoRA or biases do.
    backbone = cast("Backbone", adapters.frame)
    bricks = []
    for adapter in adapters.all:
        names = (CONFIG_FILE, TENSOR_FILE)
        files = {name: (adapter.folder / name).read_bytes() for name in names}
        bricks.append(LoRA.restore({}, files, backbone))
    sources = [adapter.hash for adapter in adapters.all]
    result = engine.merge(bricks, weights, make_mix(parameters), backbone, sources=sources)
    files = result.brick.body_files()
    config = json.loads(files[CONFIG_FILE])
    config["task_type"] = adapters.task_type
    config["base_model_name_or_path"] = adapters.base
    aside: dict[str, Any] = {}
    for adapter in adapters.all:
        with safe_open(adapter.folder / TENSOR_FILE, "pt") as stored:
            aside |= {name: stored.get_tensor(name) for name in adapter.aside}
    whole = {m for a in adapters.all for m in a.config.get("modules_to_save") or []}
    config["modules_to_save"] = sorted(whole) or None
    if aside:
        files[TENSOR_FILE] = save({**load(files[TENSOR_FILE]), **aside})
    files[CONFIG_FILE] = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    files[NOTE_FILE] = _note(adapters, weights, rule, parameters)
    rank = int(cast(LoRA, result.brick).hyper["rank"])
    return MergedAdapter(files, result.lost, rank)


def _note(adapters: Adapters, weights: object, rule: str, parameters: Mapping[str, Any]) -> bytes:
    """What the adapter was made from."""
    content = {
        "adapters": [{"name": a.folder.resolve().name, "sha256": a.hash} for a in adapters.all],
        "rule": rule,
        "weights": weights,
        "merge": dict(parameters),
    }
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def check_out(out: Path, inputs: Sequence[Path]) -> None:
    """Refuses a folder that holds something.

    Raises:
        UserError: it does, or it cannot be written.
    """
    from cfm_train.backbone.folders import check_room

    out = out.expanduser().absolute()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"--out: {out} is there already: choose a new folder, or delete it.")
    check_room(out, sum((folder / TENSOR_FILE).stat().st_size for folder in inputs), "the adapter")
