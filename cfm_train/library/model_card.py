"""The README.md of an artifact: a Hub model card, written from ``brick.json`` alone."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from cfm_train.library.card import Card
from cfm_train.library.choice import choice

FILE = "README.md"

#: The Hub's names for our task types.
_HUB_TASKS = {
    "classification": "text-classification",
    "multilabel": "text-classification",
    "regression": "text-classification",
    "token": "token-classification",
    "causal": "text-generation",
    "instruct": "text-generation",
    "seq2seq": "text2text-generation",
}


def write(card: Card, files: Iterable[str]) -> str:
    """The text of the model card.

    Args:
        card: the artifact's card; its version must be filled in.
        files: names of the artifact's files.

    Returns:
        Markdown with YAML front matter that the Hub understands.
    """
    import yaml  # only needed to write

    peft = "adapter_config.json" in set(files)
    front = yaml.safe_dump(_front_matter(card, peft), sort_keys=False, allow_unicode=True)
    sections = [
        f"---\n{front}---",
        f"# {card.name}",
        _summary(card),
        "## How to use it\n\n" + _usage(card, peft),
        _table("## Metrics", ("metric", "value", "95 % interval", "rows"), _metric_rows(card)),
        _table("## Heads", ("head", "task", "labels"), _head_rows(card)),
        _table("## Data", ("data", "fingerprint", "licence"), _data_rows(card)),
        _table(
            "## Made from", ("brick", "version"), [(p["name"], p["version"]) for p in card.parents]
        ),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def metric_items(card: Card) -> list[tuple[str, dict[str, Any]]]:
    """The card's metrics, each as ``{"value", "low", "high", "n"}`` with what is known of them."""
    items = []
    for name, score in card.metrics.items():
        if isinstance(score, dict) and isinstance(score.get("value"), int | float):
            items.append((name, score))
        elif isinstance(score, int | float) and not isinstance(score, bool):
            items.append((name, {"value": score}))
    return items


def main_metric(card: Card) -> tuple[str, dict[str, Any]] | None:
    """The metric to show where there is room for one: the first on test, else the first."""
    items = metric_items(card)
    on_test = [item for item in items if item[0].startswith("test")]
    return next(iter(on_test or items), None)


def _front_matter(card: Card, peft: bool) -> dict[str, Any]:
    front: dict[str, Any] = {"library_name": "peft" if peft else "cfm_train"}
    if card.backbone_id and re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", card.backbone_id):
        front["base_model"] = card.backbone_id
    front["tags"] = ["cfm_train", "brick", card.kind]
    if card.licence:
        front["license"] = card.licence
    tasks = [_HUB_TASKS.get(str(head.get("task"))) for head in card.heads.values()]
    known = [task for task in tasks if task]
    if known:
        front["pipeline_tag"] = known[0]
    metrics = [
        {"type": name.rsplit("/", 1)[-1], "name": name, "value": s["value"]}
        for name, s in metric_items(card)
    ]
    if metrics and known:
        data = str(card.data[0].get("name")) if card.data else next(iter(card.heads))
        result = {
            "task": {"type": known[0]},
            "dataset": {"name": data, "type": data},
            "metrics": metrics,
        }
        front["model-index"] = [{"name": card.name, "results": [result]}]
    return front


def _summary(card: Card) -> str:
    kind = "backbone" if card.kind == "backbone" else f"`{card.kind}` brick"
    lines = [
        f"Version `{card.version}`, a {kind} made by `{card.operation or 'unknown'}` on "
        f"{card.created[:10]}."
    ]
    if card.kind != "backbone" and (card.backbone_id or card.requires):
        prints = [f"`{one[:12]}`" for one in card.requires] or ["unknown"]
        if card.kind == "bridge":
            lines.append(
                f"It joins the models `{card.backbone_id}` (fingerprints {', '.join(prints)})."
            )
        else:
            lines.append(
                f"It fits the backbone `{card.backbone_id or 'unknown'}` (fingerprint {prints[0]}) "
                "and no other."
            )
            if prints[1:]:
                lines.append(f"It also needs the encoder {', '.join(prints[1:])}.")
    if card.expression:
        lines.append(f"Its configuration: `{card.expression}`.")
    if found := choice(card):
        lines.append(f"Its {found}.")
    if card.sites:
        shown = ", ".join(f"`{site}`" for site in card.sites[:6])
        lines.append(
            f"It plugs into {len(card.sites)} sites: {shown}{', …' if len(card.sites) > 6 else ''}."
        )
    return "\n".join(lines)


def _usage(card: Card, peft: bool) -> str:
    backbone = card.backbone_id or "BACKBONE"
    if card.kind == "backbone":
        return (
            f"Its weights are the model folder `{backbone}`, which any run takes:\n\n"
            f"```\npython -m cfm_train … backbone=hf backbone.path=…/{backbone}\n```"
        )
    if card.kind == "bridge":
        return (
            "In cfm_train, from the library that it lies in:\n\n"
            "```python\nfrom cfm_train.library.store import Library\n"
            "from cfm_train.stitching.layers.stored import load_stitched\n\n"
            'library = Library("outputs/library")\n'
            f'model = load_stitched(library.find("{card.ref}"), library)\n'
            "logits = model(input_ids, attention_mask).logits\n```"
        )
    text = (
        "In cfm_train, from the library that it lies in:\n\n"
        "```python\nimport cfm_train\n\n"
        f'model = cfm_train.load("{backbone}", "{card.ref}")\n```\n\n'
        "or on the command line:\n\n"
        f"```\npython -m cfm_train recipe=predict bricks=[{card.ref}] data.input=x.jsonl\n```"
    )
    if not peft:
        return text
    return text + (
        "\n\nIn PEFT (this folder is an ordinary adapter; heads of cfm_train are no part of "
        "it):\n\n"
        "```python\nfrom peft import PeftModel\n\n"
        'model = PeftModel.from_pretrained(backbone, "path/of/this/folder")\n```'
    )


def _table(title: str, head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    if not rows:
        return ""
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    lines += [
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |"
        for row in rows
    ]
    return f"{title}\n\n" + "\n".join(lines)


def _metric_rows(card: Card) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for name, score in metric_items(card):
        low, high = score.get("low"), score.get("high")
        interval = "" if low is None or high is None else f"{low:.4f} to {high:.4f}"
        rows.append((name, f"{score['value']:.4f}", interval, str(score.get("n", ""))))
    return rows


def _head_rows(card: Card) -> list[tuple[str, ...]]:
    return [
        (name, str(head.get("task", "")), ", ".join(map(str, head.get("labels") or [])))
        for name, head in card.heads.items()
    ]


def _data_rows(card: Card) -> list[tuple[str, ...]]:
    return [
        (
            str(one.get("name", "")),
            str(one.get("fingerprint", ""))[:12],
            str(one.get("licence") or "unknown"),
        )
        for one in card.data
    ]
