"""A library on an object store, or any other file system that fsspec reaches.

Object stores cannot rename and cannot append. So the files of an artifact go straight to their
place and the card comes last: a folder without it is no artifact. A log is a folder of one object
per line.
"""

from __future__ import annotations

import random
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import fsspec

from cfm_train.errors import UserError
from cfm_train.library.card import CARD_FILE
from cfm_train.library.storage import Content, opened

_PIECE = 1 << 20


class ObjectStorage:
    """A place behind an fsspec address such as ``s3://bucket/library`` (see `Storage`)."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        try:
            # Listings must not be cached: other machines write here too.
            self.fs, base = fsspec.core.url_to_fs(self.url, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise UserError(f"The library address '{url}' cannot be used: {error}") from None
        self.base = base.rstrip("/")

    def check_writable(self, needed: int) -> None:
        """Nothing: a store answers only to a real write."""

    def read(self, path: str) -> bytes:
        """The whole content of an object."""
        return bytes(self.fs.cat_file(self._at(path)))

    def open(self, path: str) -> IO[bytes]:
        """An object for reading, seekable."""
        file: Any = self.fs.open(self._at(path), "rb")
        return file

    def exists(self, path: str) -> bool:
        """Whether there is an object or a folder."""
        return bool(self.fs.exists(self._at(path)))

    def entries(self, path: str) -> list[str]:
        """Names inside a folder, sorted; none where there is no folder."""
        try:
            found = self.fs.ls(self._at(path), detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        names = {str(name).rstrip("/").rsplit("/", 1)[-1] for name in found}
        return sorted(names - {""})

    def size(self, path: str) -> int:
        """Bytes of an object."""
        return int(self.fs.size(self._at(path)))

    def age(self, path: str) -> float:
        """Seconds since the newest object of a folder was written, 0 where nobody knows."""
        ages = []
        for name in self.fs.find(self._at(path)) or [self._at(path)]:
            # Some file systems of fsspec keep no times: what has no age is never old enough to be
            # collected. And another writer may delete what was listed.
            with suppress(NotImplementedError, FileNotFoundError):
                written = self.fs.modified(name)
                zone = written if written.tzinfo else written.replace(tzinfo=UTC)
                ages.append((datetime.now(UTC) - zone).total_seconds())
        return min(ages, default=0.0)

    def local(self, path: str) -> Path | None:
        """Nothing: the place is elsewhere."""
        return None

    def commit(
        self, folder: str, files: Mapping[str, Content], last: str, announce: Callable[[], None]
    ) -> bool:
        """Writes the objects of a folder, ``last`` after all others (see `Storage.commit`)."""
        if self.exists(f"{folder}/{last}"):
            announce()
            return False
        announced = False
        while True:
            for name in [*sorted(set(files) - {last}), last]:
                if name == last and not announced:
                    announce()
                    announced = True
                self.put(f"{folder}/{name}", files[name])
            # Two writers of one version may have mixed their files: whoever finds that writes
            # again, until one of them finds the folder all its own.
            if all(self._holds(f"{folder}/{name}", files[name]) for name in files):
                return True
            time.sleep(random.uniform(0.05, 0.5))

    def put(self, path: str, content: Content) -> None:
        """Writes one object; stores show it when it is complete."""
        self.fs.makedirs(self._at(path).rsplit("/", 1)[0], exist_ok=True)
        if isinstance(content, bytes):
            self.fs.pipe_file(self._at(path), content)
            return
        with opened(content) as source, self.fs.open(self._at(path), "wb") as target:
            shutil.copyfileobj(source, target, _PIECE)

    def append(self, path: str, line: bytes, *, unless_last_has: bytes) -> None:
        """Adds one line: an object whose name begins with the time."""
        lines = self.lines(path)
        if lines and unless_last_has in lines[-1]:
            return
        self.put(f"{path}/{time.time_ns():020d}-{uuid.uuid4().hex[:8]}", line)

    def lines(self, path: str) -> list[bytes]:
        """The lines of a log, oldest first."""
        return [self.read(f"{path}/{name}") for name in self.entries(path)]

    def remove(self, path: str) -> None:
        """Deletes an object or a folder, the card first: nobody takes a half for a whole."""
        card = self._at(f"{path}/{CARD_FILE}")
        found = sorted(self.fs.find(self._at(path)), key=lambda name: name != card)
        for name in found:
            with suppress(FileNotFoundError):
                self.fs.rm_file(name)
        # File systems that have folders keep them, empty. A writer may have put the version there
        # again meanwhile, so only what is empty goes; the error is that of a folder that is not, or
        # of a store that has none.
        for folder in sorted(self.fs.find(self._at(path), withdirs=True), reverse=True):
            with suppress(OSError):
                self.fs.rmdir(folder)

    def litter(self) -> Iterator[str]:
        """Nothing aside: a half-written folder lies among the artifacts and is found there."""
        return iter(())

    def _at(self, path: str) -> str:
        return f"{self.base}/{path}" if path else self.base

    def _holds(self, path: str, content: Content) -> bool:
        """Whether an object has the content that was written to it."""
        try:
            with self.open(path) as found, opened(content) as expected:
                while True:
                    piece = expected.read(_PIECE)
                    if found.read(_PIECE) != piece:
                        return False
                    if not piece:
                        return True
        except FileNotFoundError:
            return False
