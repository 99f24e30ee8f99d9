"""What a person sees of a library: tables and trees on the terminal. No torch, answers at once."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from cfm_train.errors import UserError
from cfm_train.library.card import Card
from cfm_train.library.choice import choice
from cfm_train.library.lineage import Node
from cfm_train.library.model_card import main_metric, metric_items
from cfm_train.library.store import Library

_WIDTH = 160  # where nobody looks on: a pipe or a file


def console() -> Console:
    """A console as wide as the terminal; wide enough for every column elsewhere."""
    return Console(width=None if sys.stdout.isatty() else _WIDTH, highlight=False)


def list_rows(library: Library) -> tuple[list[dict[str, Any]], list[str]]:
    """One row for each name, its newest version and what matters of it; and what cannot be read."""
    rows, problems = [], []
    for name in library.names():
        try:
            versions = library.versions(name)
            card = library.find(f"{name}@{versions[-1]}")
        except UserError as error:  # one damaged card must not hide all others
            problems.append(str(error))
            continue
        metric = main_metric(card)
        rows.append(
            {
                "name": name,
                "version": card.version,
                "versions": len(versions),
                "kind": card.kind,
                "operation": card.operation,
                "backbone": card.backbone_id,
                "labels": {head: one.get("labels") for head, one in card.heads.items()},
                "metric": {"name": metric[0], **metric[1]} if metric else None,
                "bytes": library.size(card),
                "created": card.created,
            }
        )
    return rows, problems


def list_table(rows: list[dict[str, Any]]) -> Table:
    """The rows of `list_rows` as a table."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("name", "version", "kind", "backbone", "labels", "metric", "size", "age"):
        right = column in ("size", "age")
        table.add_column(column, justify="right" if right else "left", no_wrap=column != "labels")
    for row in rows:
        older = f" (+{row['versions'] - 1})" if row["versions"] > 1 else ""
        table.add_row(
            Text(row["name"], style="cyan"),
            Text(row["version"] + older),
            Text(row["kind"]),
            Text(row["backbone"] or ""),
            Text(_labels(row["labels"])),
            Text(_metric(row["metric"]["name"], row["metric"]) if row["metric"] else ""),
            Text(size_text(row["bytes"])),
            Text(age_text(row["created"])),
        )
    return table


def show_table(library: Library, card: Card) -> Table:
    """Everything of one card that a person asks for."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    entries: list[tuple[str, str]] = [
        ("brick", card.ref),
        ("kind", f"{card.kind}, {card.granularity}"),
        ("made by", " ".join(part for part in (card.operation, card.run) if part)),
        ("made at", f"{card.created} ({age_text(card.created)} ago)"),
        ("backbone", card.backbone_id or ""),
        ("requires", ", ".join(card.requires)),
        ("tokenizer", card.tokenizer or ""),
        ("sites", ", ".join(card.sites)),
        ("configuration", card.expression or ""),
        ("weights", choice(card)),
        ("parents", ", ".join(f"{p['name']}@{p['version']}" for p in card.parents)),
        ("licence", card.licence or ""),
        *(("head", f"{name}: {_head(head)}") for name, head in card.heads.items()),
        *(("metric", _metric(name, score)) for name, score in metric_items(card)),
        *(("data", _data(one)) for one in card.data),
        *(("file", f"{name}  {size_text(library.size(card, name))}") for name in card.files),
        ("folder", str(card.home or f"{library.root}/{card.name}/{card.version}")),
        ("versions", ", ".join(library.versions(card.name))),
    ]
    previous = ""
    for name, value in entries:
        if value:
            table.add_row("" if name == previous else name, Text(value))
            previous = name
    return table


def lineage_tree(node: Node) -> Tree:
    """A lineage, drawn."""
    tree = Tree(_node(node), guide_style="dim")
    _grow(tree, node)
    return tree


def _grow(tree: Tree, node: Node) -> None:
    for parent in node.parents:
        _grow(tree.add(_node(parent)), parent)


def _node(node: Node) -> Text:
    text = Text(node.ref, style="cyan")
    if node.card is None:
        return text.append("  no longer in the library", style="red")
    how = node.card.expression or node.card.operation
    return text.append(f"  {node.card.kind}  {how}", style="default")


def size_text(size: int) -> str:
    """Bytes for a person: ``12 B``, ``3.4 MB``."""
    amount = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000 or unit == "GB":
            break
        amount /= 1000
    return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"


def age_text(created: str) -> str:
    """How long ago: ``5 s``, ``3 min``, ``7 h``, ``12 d``."""
    try:
        seconds = (datetime.now(UTC) - datetime.fromisoformat(created)).total_seconds()
    except (ValueError, TypeError):  # a card from elsewhere, whose time is written in another way
        return "?"
    for limit, unit, name in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{max(seconds, 0) // unit:.0f} {name}"
    return f"{seconds // 86_400:.0f} d"


def _labels(heads: dict[str, list[Any] | None]) -> str:
    parts = []
    for labels in heads.values():
        if labels:
            more = "/…" if len(labels) > 4 else ""
            parts.append("/".join(map(str, labels[:4])) + more)
    return ", ".join(parts)


def _metric(name: str, score: dict[str, Any]) -> str:
    text = f"{name} {score['value']:.3f}"
    if score.get("low") is not None and score.get("high") is not None:
        text += f" [{score['low']:.3f}, {score['high']:.3f}]"
    return text


def _head(head: dict[str, Any]) -> str:
    labels = ", ".join(map(str, head.get("labels") or []))
    return f"{head.get('task', '')} ({labels})" if labels else str(head.get("task", ""))


def _data(one: dict[str, Any]) -> str:
    parts = [one.get("name"), str(one.get("fingerprint") or "")[:12], one.get("licence")]
    return "  ".join(str(part) for part in parts if part)
