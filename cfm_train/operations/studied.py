"""What a run on documents says of itself: its arms, what it costs elsewhere, its record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cfm_train.knowledge.documents import Documents

if TYPE_CHECKING:
    from cfm_train.backbone.load import Backbone
    from cfm_train.bricks.brick import Brick
    from cfm_train.data.encode import Encoded
    from cfm_train.evaluation.intervals import Score
    from cfm_train.knowledge.tokens import Reader
    from cfm_train.library.card import Card
    from cfm_train.library.store import Library
    from cfm_train.training.fit import Fitted

#: The arm in which the distractors are plugged in beside the brick.
AMONG = "among others"


@dataclass(frozen=True)
class Judged:
    """What a brick of documents was found to be worth.

    Attributes:
        scores: ``<arm>/<metric>`` and ``<arm> over <arm>/<metric>``.
        unrelated: see `unrelated.cost`; empty where there was no text for it.
        cut: how many questions have a passage that did not fit into a context.
        given: whether a person asked the questions.
    """

    scores: Mapping[str, Score]
    unrelated: Mapping[str, Score]
    cut: int
    given: bool

    @property
    def figures(self) -> dict[str, dict[str, float | int]]:
        """All of it as figures of a record."""
        found = {f"test/{key}": score.as_dict() for key, score in self.scores.items()}
        return found | {f"unrelated/{key}": s.as_dict() for key, s in self.unrelated.items()}


def judge(
    config: Mapping[str, Any],
    backbone: Backbone,
    reader: Reader,
    brick: Brick,
    others: Sequence[Brick],
    unrelated: Encoded | None,
) -> Judged:
    """Asks the test questions in every arm, and what the brick costs elsewhere.

    Args:
        config: the run's config: ``evaluation`` and ``seed``.
        backbone: the backbone, nothing plugged.
        reader: the documents.
        brick: the brick.
        others: distractors; with some there is an arm in which all are plugged in at once.
        unrelated: text for the cost; None for none.
    """
    from tqdm import tqdm

    from cfm_train.knowledge.arms import all_arms, scores
    from cfm_train.knowledge.unrelated import cost

    settings, seed = config["evaluation"], config["seed"]
    arms = 4 + bool(others)
    count = len(reader.documents.questions["test"])
    reader.cut = 0
    total = count * arms * (2 if settings["generate"] else 1)
    total += 0 if unrelated is None else 2 * len(unrelated)
    with tqdm(total=total, desc="asking", unit="answer", leave=False, disable=None) as bar:
        answered = all_arms(
            backbone,
            reader,
            [brick],
            generate=settings["generate"],
            more={AMONG: [brick, *others]} if others else None,
            progress=bar.update,
        )
        elsewhere = {}
        if unrelated is not None:
            elsewhere = cost(
                backbone,
                [brick],
                unrelated,
                bootstrap=settings["bootstrap"],
                seed=seed,
                progress=bar.update,
            )
    found = scores(answered, bootstrap=settings["bootstrap"], seed=seed)
    return Judged(found, elsewhere, reader.cut, reader.documents.given)


def record_of(
    config: Mapping[str, Any],
    library: Library,
    card: Card,
    brick: Brick,
    backbone: Backbone,
    fitted: Fitted,
    judged: Judged,
    *,
    same: bool,
    back: bool,
) -> dict[str, Any]:
    """The record's own part, without data, samples and W&B.

    Args:
        config: the run's config.
        library: where the brick lies.
        card: the brick's card, as stored.
        brick: the brick.
        backbone: the backbone.
        fitted: what training left behind.
        judged: what was found.
        same: whether the backbone is what it was.
        back: whether it answers as before once nothing is plugged.
    """
    from cfm_train.operations.setting import backbone_entries, brick_entry

    entries = backbone_entries(backbone, same)
    entries["checks"]["unplugged equals bare"] = {"value": back, "tolerance": None, "passed": back}
    arms = arms_of(judged)
    return {
        "brick": brick_entry(card, library),
        **entries,
        "metrics": judged.figures,
        "cost": fitted.cost(sum(p.numel() for p in brick.parameters())),
        "matrix": cells(arms, config["name"]),
        "arms": arms,
        "curves": "metrics.jsonl",
    }


def arms_of(judged: Judged) -> dict[str, Any]:
    """The typed entry of the record: the arms in the order of a table, gains, cost elsewhere."""
    arms: dict[str, dict[str, Any]] = {}
    gains: dict[str, dict[str, Any]] = {}
    for key, score in judged.scores.items():
        name, metric = key.rsplit("/", 1)
        held = gains if " over " in name else arms
        held.setdefault(name, {})[metric] = score.as_dict()
    order = ["bare", "text", "brick", "both", *(name for name in arms if name == AMONG)]
    return {
        "questions": next(iter(judged.scores.values())).n,
        "made": "given" if judged.given else "by rule",
        "cut": judged.cut,
        "arms": [{"name": name, **arms[name]} for name in order],
        "gains": [
            {"arm": name.split(" over ")[0], "over": name.split(" over ")[1], **metrics}
            for name, metrics in gains.items()
        ],
        "unrelated": {
            key.replace("/", "_"): score.as_dict() for key, score in judged.unrelated.items()
        }
        or None,
    }


def cells(arms: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """The brick and the bare backbone as cells of the brick × task matrix."""
    found = {arm["name"]: arm for arm in arms["arms"]}
    metric = "exact_match" if "exact_match" in found["brick"] else "token_accuracy"
    return [
        {"brick": label, "task": name, "metric": metric, **found[arm][metric], "role": role}
        | {"head": None}
        for arm, label, role in (("brick", name, "brick"), ("bare", "frozen backbone", "floor"))
    ]


def tables(arms: Mapping[str, Any]) -> dict[str, tuple[list[str], list[list[Any]]]]:
    """Arms and gains as tables for W&B: columns and rows."""
    columns = ["metric", "value", "low", "high", "n"]
    rows = [
        [arm["name"], metric, *(arm[metric][key] for key in columns[1:])]
        for arm in arms["arms"]
        for metric in arm
        if metric != "name"
    ]
    gained = [
        [gain["arm"], gain["over"], metric, *(gain[metric][key] for key in columns[1:])]
        for gain in arms["gains"]
        for metric in gain
        if metric not in ("arm", "over")
    ]
    return {"arms": (["arm", *columns], rows), "gains": (["arm", "over", *columns], gained)}


def data_report(documents: Documents) -> dict[str, Any]:
    """What the record says of the data."""
    return {
        "leaks": {},
        "skipped_rows": 0,
        "fingerprints": {
            name.removeprefix("data/"): value for name, value in documents.fingerprints.items()
        },
    }
