"""What a training run says of itself: its record, and where it broke off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfm_train.config.signature import kinds
from cfm_train.errors import UserError

if TYPE_CHECKING:
    from cfm_train.backbone.load import Backbone
    from cfm_train.bricks.brick import Brick
    from cfm_train.data.encode import TaskData
    from cfm_train.data.sources import Checked
    from cfm_train.evaluation.judge import Judged
    from cfm_train.library.card import Card
    from cfm_train.library.store import Library
    from cfm_train.training.fit import Fitted
    from cfm_train.training.module import Diverged


def check_kind(kind: str) -> None:
    """Refuses a brick kind that is computed from facts, where a run has none."""
    if kind in kinds("bricks", "ByVector"):
        raise UserError(
            f"brick={kind} is computed from facts, and there are none: use recipe=knowledge/facts "
            f"brick={kind} data.facts=FILE.jsonl."
        )


def record_of(
    tasks: Mapping[str, Checked],
    library: Library,
    card: Card,
    brick: Brick,
    backbone: Backbone,
    fitted: Fitted,
    judged: Judged,
    floor: Judged | None,
    same: bool,
) -> dict[str, Any]:
    """The record's own part, without matrix, samples and W&B.

    Args:
        tasks: the tasks as they were checked.
        library: where the brick lies.
        card: the brick's card, as stored.
        brick: the trained brick.
        backbone: the backbone.
        fitted: what training left behind.
        judged: the brick's figures.
        floor: those of the lower bound, where it was asked for.
        same: whether the backbone is what it was.
    """
    from cfm_train.operations.setting import backbone_entries, brick_entry

    entries = backbone_entries(backbone, same)
    entries["checks"]["unplugged equals bare"] = judged.unplugged
    return {
        "brick": brick_entry(card, library),
        **entries,
        "metrics": judged.figures() | (floor.figures("floor") if floor else {}),
        # A finished brick asks for no gradients, so all of its numbers are counted.
        "cost": fitted.cost(sum(p.numel() for p in brick.parameters())),
        "data": data_report(tasks),
        "curves": "metrics.jsonl",
    }


def keep_examples(
    matrix: Sequence[dict[str, Any]],
    judged: Judged,
    brick: Brick,
    card: Card,
    checked: Mapping[str, Checked],
    tasks: Mapping[str, TaskData],
    backbone: Backbone,
    folder: Path,
) -> dict[str, Any]:
    """Keeps what each test row added, so that a later comparison need not ask again.

    Args:
        matrix: the brick's cells; each gets the name of its head and the key of its examples.
        judged: the brick's figures.
        brick: the trained brick.
        card: its card, as stored.
        checked: the tasks as they were checked.
        tasks: the tasks as token numbers.
        backbone: the backbone.
        folder: the run folder.

    Returns:
        The ``examples`` of the record, where there are any.
    """
    from cfm_train.evaluation.scorer import hash_of_head, key_of
    from cfm_train.evaluation.shelf import Shelf

    shelf = Shelf(None)
    for cell in matrix:
        name = cell["task"]
        head, split = brick.head_for(name), tasks[name].test
        assert split is not None
        cell["key"] = key_of(
            backbone,
            tasks[name].spec,
            str(card.tokenizer),
            identity=card.version,
            rows=checked[name].fingerprints["test"],
            max_length=split.max_length,
            head=None if head is None else hash_of_head(head),
        )
        cell["head"] = None if head is None else cell["brick"]
        shelf.keep(cell["key"], judged.answers[name].examples())
    kept = shelf.write(folder)
    return {"examples": kept} if kept else {}


def data_report(tasks: Mapping[str, Checked]) -> dict[str, Any]:
    """What the record says of the data."""
    reports = {name: task.report() for name, task in tasks.items()}
    return {
        "leaks": {name: report["leaks"] for name, report in reports.items()},
        "skipped_rows": sum(report["skipped_rows"] for report in reports.values()),
        "fingerprints": {
            f"{name}/{split}": value
            for name, report in reports.items()
            for split, value in report["fingerprints"].items()
        },
    }


def where(error: Diverged, tasks: Mapping[str, TaskData]) -> str:
    """A divergence with the tasks and the places of its rows."""
    names = sorted({task for task, _ in error.rows})
    rows = [tasks[task].train.row(i)["_at"] for task, i in error.rows[:5]]
    more = f" and {len(error.rows) - 5} more" if len(error.rows) > 5 else ""
    return (
        f"Training stopped: {error}; rows of {' and '.join(names)}: {', '.join(rows)}{more}. Lower "
        "trainer.learning_rate, or look at these rows."
    )


def rows_line(task: Checked, encoded: TaskData | None = None) -> str:
    """One line on a task's rows: how many, and every one that was left out or cut.

    Args:
        task: the task as it was checked.
        encoded: its splits as tokens, where they are known.
    """
    counts = [f"{len(rows):,} {split}" for split, rows in task.rows.items() if rows]
    parts = [f"{task.spec.name}: {', '.join(counts)} rows"]
    if task.leaks.total:
        parts.append(f"{task.leaks.total} rows left out that another split holds too")
    if task.skipped:
        parts.append(f"{sum(task.skipped.values())} bad rows skipped")
    splits = [s for s in (encoded.train, encoded.validation, encoded.test) if s] if encoded else []
    if cut := sum(split.truncated for split in splits):
        parts.append(f"{cut} rows cut at {splits[0].max_length} tokens")
    if not task.rows.get("test"):
        parts.append("no test rows, so no test figures (data.test=FILE or data.test_fraction=0.1)")
    return "; ".join(parts)


def turns_line(task: Checked, tokenizer: Any) -> str | None:
    """How conversations are written where the tokenizer does not say it; None where it does."""
    if task.spec.type != "instruct" or tokenizer.chat_template:
        return None
    return (
        f"{task.spec.name}: the tokenizer has no chat template, so each turn is written below "
        "'### User:' or '### Assistant:'"
    )
