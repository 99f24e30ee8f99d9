"""What operations share once torch may be imported: the backbone, tracking, and proofs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfm_train.backbone.spec import ResolvedBackbone

if TYPE_CHECKING:
    from cfm_train.backbone.load import Backbone
    from cfm_train.data.sources import Checked
    from cfm_train.evaluation.scorer import Scorer
    from cfm_train.evaluation.shelf import Shelf
    from cfm_train.library.card import Card
    from cfm_train.library.store import Library
    from cfm_train.tracking.wandb_run import WandbRun


def open_backbone(
    resolved: ResolvedBackbone,
    section: Mapping[str, Any],
    trainer: Mapping[str, Any] | None = None,
) -> tuple[Backbone, str]:
    """Loads the backbone on the best device and takes the checksum of its tensors.

    Args:
        resolved: the backbone's folder.
        section: the ``backbone`` section; its ``dtype`` goes before the trainer's ``precision``.
        trainer: the ``trainer`` section where there is one: precision, threads, determinism.

    Returns:
        The backbone and its checksum.
    """
    import torch
    from transformers.utils import logging

    from cfm_train.backbone.load import load_backbone

    logging.disable_progress_bar()
    trainer = trainer or {}
    if trainer.get("threads"):
        torch.set_num_threads(trainer["threads"])
    torch.use_deterministic_algorithms(bool(trainer.get("deterministic")))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = section["dtype"]
    if dtype == "auto":
        dtype = trainer.get("precision", "auto")
    backbone = load_backbone(resolved, dtype=dtype, device=device)
    return backbone, backbone.checksum()


def scorer_for(
    tasks: Mapping[str, Checked],
    backbone: Backbone,
    resolved: ResolvedBackbone,
    config: Mapping[str, Any],
    shelf: Shelf | None = None,
) -> Scorer:
    """What asks a run's tasks of bodies; tokenises their rows.

    Args:
        tasks: the tasks with all their rows.
        backbone: nothing plugged.
        resolved: the backbone's folder.
        config: the run's config: ``evaluation`` and ``seed``.
        shelf: what earlier records hold; None asks everything anew.
    """
    from cfm_train.backbone.fingerprint import tokenizer_hash
    from cfm_train.config.compose import option
    from cfm_train.data.encode import encode
    from cfm_train.evaluation.scorer import Scorer
    from cfm_train.evaluation.shelf import Shelf
    from cfm_train.paths import cache_dir

    return Scorer(
        backbone,
        {name: encode(task, backbone.tokenizer, cache_dir()) for name, task in tasks.items()},
        {name: task.fingerprints for name, task in tasks.items()},
        tokenizer=tokenizer_hash(resolved.folder),
        trainer=option("trainer", "default", learning_rate=1e-3),
        evaluation=config["evaluation"],
        seed=config["seed"],
        shelf=Shelf(None) if shelf is None else shelf,
    )


def unchanged(backbone: Backbone, before: str, resolved: ResolvedBackbone) -> bool:
    """Whether tensors in memory and files on disk are what they were when the run began."""
    from cfm_train.backbone.fingerprint import fingerprint

    return backbone.checksum() == before and fingerprint(resolved.folder) == backbone.fingerprint


def brick_entry(card: Card, library: Library, parents: list[Any] | None = None) -> dict[str, Any]:
    """A stored brick as records name it; ``parents`` in place of those in its card."""
    return {
        "name": card.name,
        "version": card.version,
        "path": str(library.folder(card)),
        "parents": card.parents if parents is None else parents,
    }


def backbone_entries(backbone: Backbone, same: bool) -> dict[str, dict[str, Any]]:
    """What every record says of its backbone: ``backbone``, and the first of its ``checks``.

    Args:
        backbone: the backbone.
        same: what `unchanged` found.
    """
    return {
        "backbone": {
            "id": backbone.id,
            "fingerprint": backbone.fingerprint,
            "unchanged": same,
        },
        "checks": {"backbone unchanged": {"value": same, "tolerance": None, "passed": same}},
    }


@contextmanager
def tracked(config: Mapping[str, Any], folder: Path) -> Iterator[WandbRun]:
    """The run's W&B side; it ends with exit code 1 where the block raises."""
    from cfm_train.tracking.wandb_run import WandbRun

    tracking = config["tracking"]
    wandb = WandbRun(
        tracking["mode"],
        tracking["project"],
        tracking["group"],
        config["operation"],
        tracking["tags"],
        config,
        folder,
    )
    try:
        yield wandb
    except BaseException:
        wandb.finish(1)
        raise
    wandb.finish(0)
