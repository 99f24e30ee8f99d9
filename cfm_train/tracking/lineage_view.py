"""The lineage graph of records: backbones, the bricks over them, and what was made from those."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cfm_train.tracking.seed_groups import READERS

Json = dict[str, Any]

#: Operations whose artifact is a backbone itself: what their record calls the backbone is what they
#: made.
MAKERS = frozenset({"pretrain", "merge_models", "stitch_layers"})


def lineage(records: Sequence[Mapping[str, Any]], folder: Path) -> Json:
    """Nodes with a column and a place in it, and the edges between them.

    Args:
        records: valid records.
        folder: where the page will lie; links to cards are relative to it.

    Returns:
        ``nodes`` (id, name, version, kind, operation, card, column, place) and ``edges`` (from, to,
        weight). ``kind`` is ``backbone``, ``brick``, ``configuration`` (what stands in a comparison
        and not in the library), or ``outside`` for a parent without a record.
    """
    nodes: dict[str, Json] = {}
    edges: dict[tuple[str, str], float | None] = {}
    made = _made(records)
    for record in records:
        brick, backbone = record["brick"], record["backbone"]
        if brick is None or record["operation"] in READERS:
            continue
        own = f"{brick['name']}@{brick['version']}"
        card = link(Path(brick["path"]) / "brick.json", folder)
        nodes[own] = _node(own, brick, "brick", record["operation"], card)
        for parent in brick["parents"]:
            key = f"{parent['name']}@{parent['version']}"
            nodes.setdefault(key, _node(key, parent, "outside", None, None))
            edges[key, own] = parent.get("weight")
        if record["operation"] in MAKERS:
            continue
        if backbone is not None and not brick["parents"]:
            key = made.get(backbone["fingerprint"], f"backbone {backbone['fingerprint']}")
            version = backbone["fingerprint"][:8]
            named = {"name": backbone["id"], "version": version}
            nodes.setdefault(key, _node(key, named, "backbone", None, None))
            edges[key, own] = None
    compared = next((r for r in records if r.get("comparison")), None)
    if compared is not None:
        _add_comparison(compared, nodes, edges, folder)
    _place(nodes, list(edges))
    return {
        "nodes": list(nodes.values()),
        "edges": [{"from": a, "to": b, "weight": weight} for (a, b), weight in edges.items()],
    }


def _made(records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Fingerprint -> the artifact, of backbones that runs among these records made."""
    return {
        record["backbone"]["fingerprint"]: f"{brick['name']}@{brick['version']}"
        for record in records
        if record["operation"] in MAKERS and (brick := record["brick"]) is not None
    }


def _add_comparison(
    record: Mapping[str, Any],
    nodes: dict[str, Json],
    edges: dict[tuple[str, str], float | None],
    folder: Path,
) -> None:
    """Adds what a comparison's rows were made from: bricks without a record, configurations."""
    graph, backbone = record["comparison"]["lineage"], record["backbone"]
    for node in graph["nodes"]:
        card = node["path"] and link(Path(node["path"]) / "brick.json", folder)
        known = nodes.get(node["id"])
        if known is None or known["kind"] == "outside":
            nodes[node["id"]] = _node(node["id"], node, node["kind"], node["operation"], card)
        nodes[node["id"]]["data"] = node["data"]
    for edge in graph["edges"]:
        edges.setdefault((edge["a"], edge["b"]), edge["weight"])
    made = {b for _, b in edges}
    loose = [node["id"] for node in graph["nodes"] if node["id"] not in made]
    if backbone is not None and loose:
        key = f"backbone {backbone['fingerprint']}"
        named = {"name": backbone["id"], "version": backbone["fingerprint"][:8]}
        nodes.setdefault(key, _node(key, named, "backbone", None, None))
        edges |= {(key, own): None for own in loose}


def link(target: Path, folder: Path) -> str:
    """A link from the page to a file, relative so that both can be moved together."""
    return Path(os.path.relpath(target.absolute(), folder.absolute())).as_posix()


def _node(
    key: str, named: Mapping[str, Any], kind: str, operation: str | None, card: str | None
) -> Json:
    return {
        "id": key,
        "name": named["name"],
        "version": named["version"],
        "kind": kind,
        "operation": operation,
        "card": card,
    }


def _place(nodes: Mapping[str, Json], edges: Sequence[tuple[str, str]]) -> None:
    """Sets each node's column (longest way from a root) and its place in it (near its parents).

    Columns come in at most as many rounds as there are nodes, so that records which name each other
    as parents, which no run of ours writes, end the search instead of hanging it.
    """
    for node in nodes.values():
        node["column"] = 0
    for _ in nodes:
        for parent, child in edges:
            deeper = nodes[parent]["column"] + 1
            nodes[child]["column"] = min(max(nodes[child]["column"], deeper), len(nodes))
    for node in nodes.values():  # a parent without a record stands right before its first child
        children = [nodes[b]["column"] for a, b in edges if a == node["id"]]
        if node["kind"] == "outside" and children:
            node["column"] = max(0, min(children) - 1)
    places: dict[str, float] = {}
    for column in sorted({node["column"] for node in nodes.values()}):
        members = [node for node in nodes.values() if node["column"] == column]
        wish = {}
        for at, node in enumerate(members):
            above = [places[a] for a, b in edges if b == node["id"] and a in places]
            wish[node["id"]] = (sum(above) / len(above) if above else at / len(members), at)
        for at, node in enumerate(sorted(members, key=lambda node: wish[node["id"]])):
            node["place"] = at
            places[node["id"]] = (at + 0.5) / len(members)
