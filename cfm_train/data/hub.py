"""Rows of a data set on the Hugging Face Hub, through the ``datasets`` package."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cfm_train.data.files import Raw
from cfm_train.errors import UserError

#: Seconds after which the Hub counts as out of reach.
PATIENCE = 3.0


def read_hub(section: Mapping[str, Any], split: str) -> Iterator[Raw]:
    """Reads one split of ``data.hub``, from the network or from the cache of ``datasets``.

    Class labels that the data set names come out as their names, since two copies of a data set
    need not count them in the same order; as numbers where ``hub_labels`` says what those mean.

    Args:
        section: a data section; ``hub_splits`` says what its splits are called there.
        split: train, validation or test.

    Raises:
        UserError: the data set cannot be had, with ``data.root`` as the way without a network.
    """
    name = section["hub_splits"][split]
    if not name:
        return
    hub, subset, revision = section["hub"], section["subset"], section["revision"]
    online = _reachable()
    if not online and not _cached(hub):
        raise _absent(section, "there is no network and no copy in the cache")
    try:
        import datasets

        datasets.disable_progress_bars()
        if not online:  # straight to the cache, without half a minute of trying
            datasets.config.HF_HUB_OFFLINE = True
        rows = datasets.load_dataset(hub, subset, split=name, revision=revision)
    except Exception as error:
        # datasets lets through the errors of half a dozen libraries (HTTP, file systems, its own):
        # whichever it is, this source is not to be had, and the person's way out is the same.
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise _absent(section, lines[0].rstrip(".")) from error
    features = {} if section["hub_labels"] else _named(rows.features, datasets)
    for number, row in enumerate(rows, start=1):
        for key, names in features.items():
            row[key] = _name(row[key], names)
        yield Raw(f"{hub}[{name}]:{number}", row)


def _named(features: Mapping[str, Any], datasets: Any) -> dict[str, list[str]]:
    """Columns of class labels, or of lists of them, with the names of the classes."""
    named = {}
    for key, feature in features.items():
        feature = getattr(feature, "feature", feature)  # of a list: what its items are
        if isinstance(feature, datasets.ClassLabel):
            named[key] = feature.names
    return named


def _name(value: Any, names: list[str]) -> Any:
    if isinstance(value, list):
        return [_name(item, names) for item in value]
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else value


def _absent(section: Mapping[str, Any], reason: str) -> UserError:
    name = section["name"]
    return UserError(
        f"data.hub: cannot load '{section['hub']}' from the Hub ({reason}); name a folder that "
        f"holds {name}.train.jsonl and {name}.test.jsonl instead: data.root=FOLDER."
    )


def _reachable() -> bool:
    """Whether the Hub answers; behind a proxy that can only be found out by asking it for real."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    if any(os.environ.get(key) for key in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    endpoint = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    port = endpoint.port or (80 if endpoint.scheme == "http" else 443)
    try:
        with socket.create_connection((endpoint.hostname or "", port), timeout=PATIENCE):
            return True
    except OSError:
        return False


def _cached(hub: str) -> bool:
    """Whether a copy may be on this machine: a folder, or one that ``datasets`` made before."""
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface").expanduser()
    cache = Path(os.environ.get("HF_DATASETS_CACHE") or home / "datasets").expanduser()
    owner = hub.split("/")[0].lower()
    entries = [entry.name.lower() for entry in cache.iterdir()] if cache.is_dir() else []
    return Path(hub).is_dir() or any(name.startswith((f"{owner}___", hub)) for name in entries)
