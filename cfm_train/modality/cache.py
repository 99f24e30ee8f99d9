"""Features of frozen encoders on disk: computed once, mapped into memory, shared by all runs.

    <cache>/features/<encoder's fingerprint>-<dtype>/  data.bin      vectors behind each other
                                                       index.jsonl   {"item", "at", "n"} for each
                                                       meta.json     width, dtype, the encoder

An item is known by the SHA-256 of its bytes, the encoder (its preprocessing included) by its
fingerprint, so an entry is never stale. Vectors are appended and their index lines after them: a
caching that is killed goes on behind the last line. How much will be written is forecast before
anything is, from a few items spread over all.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cfm_train.errors import UserError
from cfm_train.tracking.atomic import replace_file

if TYPE_CHECKING:
    from cfm_train.modality.encoders.encoder import Encoder

#: Items that are encoded together.
BATCH = 32
#: Items that the forecast looks at.
PROBES = 8


class FeatureCache:
    """The features of one encoder.

    Args:
        folder: the cache folder; the encoder's own lies in ``features`` below it.
        fingerprint: the encoder's.
        dtype: ``float16`` or ``float32``.
    """

    def __init__(self, folder: Path, fingerprint: str, dtype: str) -> None:
        self.folder = folder / "features" / f"{fingerprint[:32]}-{dtype}"
        self.dtype = np.dtype(dtype)
        self.width = 0
        self.index: dict[str, tuple[int, int]] = {}
        self._data: np.ndarray = np.empty((0, 0), self.dtype)
        self.reload()

    def reload(self) -> None:
        """Reads what is on disk now."""
        try:
            self.width = int(json.loads((self.folder / "meta.json").read_text())["width"])
            lines = (self.folder / "index.jsonl").read_text().splitlines()
            stored = (self.folder / "data.bin").stat().st_size
        except (OSError, ValueError, KeyError):
            return
        one = self.width * self.dtype.itemsize
        self.index, end = {}, 0
        for line in lines:
            try:
                entry = json.loads(line)
            except ValueError:
                break  # the line that a kill cut off
            last = entry["at"] + entry["n"]
            if last * one > stored:
                break
            self.index[entry["item"]] = (entry["at"], entry["n"])
            end = max(end, last)
        if end:
            self._data = np.memmap(
                self.folder / "data.bin", self.dtype, "r", shape=(end, self.width)
            )

    def read(self, item: str) -> np.ndarray:
        """The features of an item by its hash, ``[n, width]``, mapped into memory."""
        at, n = self.index[item]
        return self._data[at : at + n]

    def length(self, item: str) -> int:
        """How many vectors an item has."""
        return self.index[item][1]

    def size(self) -> int:
        """How much the encoder's features take on disk."""
        return int(self._data.nbytes)

    def fill(
        self,
        encoder: Encoder,
        wanted: Mapping[str, tuple[str, str]],
        read: Callable[[str, str], bytes],
        limit_gb: float,
        about: Mapping[str, Any],
    ) -> dict[str, int]:
        """Makes the features that are missing.

        Args:
            encoder: makes them.
            wanted: hash -> (reference, where it is named), for every item.
            read: reads a reference, see `items.Reader.read`.
            limit_gb: most that the encoder's features may take, in GB.
            about: who the encoder is, for ``meta.json``.

        Returns:
            ``made`` and ``found`` (items), and ``bytes``, all that the encoder has on disk.

        Raises:
            UserError: it would take more than the limit, or more than the disk has.
        """
        from filelock import FileLock

        missing = [item for item in wanted if item not in self.index]
        if missing:
            self._check_room(encoder, missing, wanted, read, limit_gb)
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / ".lock"):
                self.reload()  # another process may have made some meanwhile
                left = [item for item in missing if item not in self.index]
                self._write(encoder, left, wanted, read, about)
            self.reload()
        found = len(wanted) - len(missing)
        return {"made": len(missing), "found": found, "bytes": self.size()}

    def forecast(
        self,
        encoder: Encoder,
        missing: Sequence[str],
        wanted: Mapping[str, tuple[str, str]],
        read: Callable[[str, str], bytes],
    ) -> int:
        """Bytes that the missing items would take, from a few of them; writes nothing."""
        step = max(1, len(missing) // PROBES)
        probes = list(missing[::step])[:PROBES]
        vectors = sum(len(f) for f in features_of(encoder, probes, wanted, read))
        mean = vectors / len(probes)
        return round(mean * len(missing)) * encoder.width * self.dtype.itemsize

    def _check_room(
        self,
        encoder: Encoder,
        missing: Sequence[str],
        wanted: Mapping[str, tuple[str, str]],
        read: Callable[[str, str], bytes],
        limit_gb: float,
    ) -> None:
        needed = self.forecast(encoder, missing, wanted, read)
        total = needed + self.size()
        print(
            f"features: {len(missing):,} items to encode, {needed / 1e6:.1f} MB "
            f"({encoder.width} numbers each, {self.dtype})",
            flush=True,
        )
        if total > limit_gb * 1e9:
            raise UserError(
                f"The features would take {total / 1e9:.3g} GB ({len(missing):,} items more), and "
                f"cache.limit_gb is {limit_gb:g}: raise it, or choose encoder.pool=mean, a smaller "
                "encoder.size or data.limit=N."
            )
        there = next(p for p in (self.folder, *self.folder.parents) if p.exists())
        free = shutil.disk_usage(there).free
        if needed > free:
            raise UserError(
                f"The features would take {needed / 1e9:.3g} GB, and {there} has "
                f"{free / 1e9:.3g} GB free: make room, or set the variable CFM_CACHE=DIR."
            )

    def _write(
        self,
        encoder: Encoder,
        missing: Sequence[str],
        wanted: Mapping[str, tuple[str, str]],
        read: Callable[[str, str], bytes],
        about: Mapping[str, Any],
    ) -> None:
        from tqdm import tqdm

        meta = {"width": encoder.width, "dtype": str(self.dtype), "encoder": dict(about)}
        text = json.dumps(meta, indent=2, sort_keys=True) + "\n"
        replace_file(self.folder / "meta.json", text.encode())
        end = max((at + n for at, n in self.index.values()), default=0)
        lines = [
            json.dumps({"item": item, "at": at, "n": n}) for item, (at, n) in self.index.items()
        ]
        # As a whole: a kill must not shorten what other runs have mapped.
        replace_file(self.folder / "index.jsonl", "".join(f"{line}\n" for line in lines).encode())
        with (
            (self.folder / "data.bin").open("ab") as data,
            (self.folder / "index.jsonl").open("a") as index,
            tqdm(
                total=len(missing),
                desc="features",
                unit="item",
                file=sys.stderr,
                mininterval=1.0 if sys.stderr.isatty() else 30.0,
            ) as bar,
        ):
            data.truncate(end * encoder.width * self.dtype.itemsize)
            for start in range(0, len(missing), BATCH):
                part = missing[start : start + BATCH]
                entries = ""
                for item, found in zip(part, features_of(encoder, part, wanted, read), strict=True):
                    data.write(self._stored(found, wanted[item][1]).tobytes())
                    entries += json.dumps({"item": item, "at": end, "n": len(found)}) + "\n"
                    end += len(found)
                data.flush()
                os.fsync(data.fileno())
                index.write(entries)
                index.flush()
                bar.update(len(part))

    def _stored(self, found: np.ndarray, at: str) -> np.ndarray:
        with np.errstate(over="ignore"):
            stored = found.astype(self.dtype)
        if not np.isfinite(stored).all():
            if not np.isfinite(found).all():
                raise UserError(f"{at}: its features are not finite numbers: leave the item out.")
            raise UserError(
                f"{at}: the encoder gives numbers up to {np.abs(found).max():.3g}, and "
                f"{self.dtype} cannot hold them: set cache.dtype=float32."
            )
        return stored


def features_of(
    encoder: Encoder,
    items: Sequence[str],
    wanted: Mapping[str, tuple[str, str]],
    read: Callable[[str, str], bytes],
) -> list[np.ndarray]:
    """Features of some items, float32 ``[n, width]`` each, computed now.

    Args:
        encoder: makes them.
        items: hashes.
        wanted: hash -> (reference, where it is named).
        read: reads a reference.
    """
    loaded = [encoder.load(read(*wanted[item]), wanted[item][1]) for item in items]
    features, mask = encoder.encode(loaded)
    return [f[m].cpu().numpy() for f, m in zip(features, mask, strict=True)]
