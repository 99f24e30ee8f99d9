"""What a stitch does to its tasks: both orders, the average and each brick alone, and the penalty.

    penalty = score of the best single brick on its own task − score of the stitch there

with a paired bootstrap interval on the same rows; above zero is what stitching costs. A brick's own
tasks are those that it brings a head for or was trained on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from cfm_train.backbone.load import Backbone
from cfm_train.bricks.brick import Brick
from cfm_train.configuration.apply import assemble
from cfm_train.configuration.expression import Call, Expression, bricks
from cfm_train.configuration.pin import pin
from cfm_train.data.encode import TaskData
from cfm_train.data.tasks import LOWER_IS_BETTER
from cfm_train.errors import UserError
from cfm_train.evaluation.examples import advantage
from cfm_train.evaluation.matrix import cells_of, figures_of, heads_of, row
from cfm_train.evaluation.scorer import Body, Scorer, identity_of
from cfm_train.operations.selection import Selection, own_sections
from cfm_train.stitching.promises import Probe, backwards, random_probe
from cfm_train.stitching.stitch import Stitch
from cfm_train.training.dataset import make_batch


@dataclass(frozen=True)
class Comparison:
    """What came out.

    Attributes:
        matrix: the cells of the brick × task matrix.
        metrics: every figure of every row, and the penalties.
        lines: what a person reads besides.
        own: the stitch's own figures, for its card.
    """

    matrix: list[dict[str, Any]]
    metrics: dict[str, Any]
    lines: list[str]
    own: dict[str, Any]


def probe_of(backbone: Backbone, tasks: Mapping[str, TaskData], rows: int = 8) -> Probe:
    """The first training rows of the first task, or random tokens where there is none."""
    if not tasks:
        return random_probe(backbone)
    split = next(iter(tasks.values())).train
    batch = make_batch(
        "probe", split, range(min(rows, len(split))), backbone.tokenizer.pad_token_id
    )
    ids, mask = batch["input_ids"], batch["attention_mask"]
    assert isinstance(ids, torch.Tensor) and isinstance(mask, torch.Tensor)
    return Probe(backbone, ids, mask)


def compare(
    stitched: Stitch,
    parts: Sequence[Brick],
    tree: Call,
    selection: Selection,
    scorer: Scorer,
) -> Comparison:
    """Scores the stitch, the opposite order, the average and each brick alone.

    Args:
        stitched: the stitch.
        parts: its bricks in order.
        tree: its configuration, versions pinned.
        selection: what the bricks are called and what they were trained on.
        scorer: what evaluates; its tasks each have a test split.
    """
    labels, library, backbone = list(selection.labels), selection.library, scorer.backbone
    lines: list[str] = []

    def body(label: str, role: str, tree: Expression, brick: Brick) -> Body:
        return Body(label, brick, identity_of(tree, brick), role, tree)

    given, reverse = ", ".join(labels), ", ".join(labels[::-1])
    mode = stitched.mode.name
    turned = replace(tree, args=tree.args[::-1])
    bodies = [
        body(f"stitch([{given}], mode={mode})", "merged", tree, stitched),
        body(f"stitch([{reverse}], mode={mode})", "merged", turned, backwards(stitched, backbone)),
    ]
    try:
        average = pin(Call("merge", "linear", tree.args), library)
        made = assemble(average, library, backbone)
        bodies.append(body(f"merge(linear, [{given}])", "merged", average, made))
    except UserError as error:
        lines.append(f"no average to compare with: {error}")
    singles = [
        body(label, "brick", tree, part)
        for label, tree, part in zip(labels, selection.trees, parts, strict=True)
    ]
    bodies += singles
    tasks, heads = list(scorer.tasks), heads_of(singles)
    rows = {one.label: row(scorer, one, tasks, heads) for one in bodies}
    metrics: dict[str, Any] = {
        f"{label}: {key}": figure
        for label, scored in rows.items()
        for key, figure in figures_of(scored).items()
    }
    first, bootstrap = bodies[0].label, max(1, scorer.evaluation["bootstrap"])
    for task, owners in own_parts(parts, selection).items():
        if task not in tasks:
            continue
        column = {label: scored[tasks.index(task)] for label, scored in rows.items()}
        metric = column[first].metric
        sign = -1 if metric in LOWER_IS_BETTER else 1
        best = max(owners, key=lambda label: sign * column[label].scores[metric].value)
        penalty = advantage(
            column[best].examples,
            column[first].examples,
            metric,
            bootstrap=bootstrap,
            seed=scorer.seed,
        )
        metrics[f"stitching penalty/{task}/{metric}"] = penalty.as_dict()
        lines.append(
            f"stitching penalty on {task}: {penalty.value:.4f} {metric} "
            f"[{penalty.low:.4f}, {penalty.high:.4f}] against {best} alone, {penalty.n} rows"
        )
    own = figures_of(rows[first])
    matrix = [cell for scored in rows.values() for cell in cells_of(scored)]
    return Comparison(matrix, metrics, lines, own)


def own_parts(parts: Sequence[Brick], selection: Selection) -> dict[str, list[str]]:
    """For each task the bricks whose own it is, by label."""
    owners: dict[str, list[str]] = {}
    for label, tree, part in zip(selection.labels, selection.trees, parts, strict=True):
        cards = [selection.cards[str(ref)] for ref in bricks(tree)]
        for task in dict.fromkeys([*part.heads, *own_sections(cards)]):
            owners.setdefault(task, []).append(label)
    return owners
