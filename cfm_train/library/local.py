"""A library in a local folder: an artifact is written aside, flushed, and renamed into its place.

The temporary folder lies in the same library (a rename is atomic only within one file system) and
is locked for as long as its writer lives. The system drops the lock however the writer ends, so
`litter` tells a dead writer's folder from a living one's.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from cfm_train.library.storage import Content, opened

try:
    import fcntl
except ImportError:  # systems without flock go by the age of a folder alone
    fcntl = None  # type: ignore[assignment]

TEMPORARY = ".tmp"
_PIECE = 1 << 20


class LocalStorage:
    """A folder of this machine, or of a file system that is mounted on it (see `Storage`)."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = str(root)

    def check_writable(self, needed: int) -> None:
        """Asks the folder, or the nearest one above it (see `Storage.check_writable`)."""
        root = self.root.absolute()
        there = next(parent for parent in (root, *root.parents) if parent.exists())
        if not there.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(there))
        if not os.access(there, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(there))
        if shutil.disk_usage(there).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(there))

    def read(self, path: str) -> bytes:
        """The whole content of a file."""
        return (self.root / path).read_bytes()

    def open(self, path: str) -> IO[bytes]:
        """A file for reading."""
        return (self.root / path).open("rb")

    def exists(self, path: str) -> bool:
        """Whether there is a file or a folder."""
        return (self.root / path).exists()

    def entries(self, path: str) -> list[str]:
        """Names inside a folder, sorted; none where there is no folder."""
        try:
            return sorted(os.listdir(self.root / path))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def size(self, path: str) -> int:
        """Bytes of a file."""
        return (self.root / path).stat().st_size

    def age(self, path: str) -> float:
        """Seconds since a file, or the newest file of a folder, was written."""
        top = self.root / path
        times = [entry.stat().st_mtime for entry in (top, *top.rglob("*"))]
        return time.time() - max(times)

    def local(self, path: str) -> Path | None:
        """The path itself."""
        return self.root / path

    def commit(
        self, folder: str, files: Mapping[str, Content], last: str, announce: Callable[[], None]
    ) -> bool:
        """Writes a folder whole or not at all (see `Storage.commit`)."""
        target = self.root / folder
        with self._aside(folder.replace("/", "-")) as temporary:
            for name in [*sorted(set(files) - {last}), last]:
                write_durably(temporary / name, files[name])
            flush_folder(temporary)
            target.parent.mkdir(parents=True, exist_ok=True)
            announce()
            while not _renamed(temporary, target):
                if (target / last).exists():
                    return False
                # A folder without its card was not written by this code: out of the way with it.
                with suppress(FileNotFoundError):
                    os.rename(target, self._unique("broken"))
            flush_folder(target.parent)
            flush_folder(self.root)
        return True

    def put(self, path: str, content: Content) -> None:
        """Writes one file in a single step."""
        target = self.root / path
        with self._aside(target.name) as temporary:
            write_durably(temporary / target.name, content)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(temporary / target.name, target)
            flush_folder(target.parent)

    def append(self, path: str, line: bytes, *, unless_last_has: bytes) -> None:
        """Adds one line under a lock (see `Storage.append`)."""
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("a+b", buffering=0) as file:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            content = file.read()
            lines = content.splitlines()
            if content.endswith(b"\n") and unless_last_has in lines[-1]:
                return
            # A line that a full disk or a power cut tore is ended, so that it harms no other.
            torn = bool(content) and not content.endswith(b"\n")
            text = (b"\n" if torn else b"") + line + b"\n"
            try:
                if file.write(text) != len(text):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(file.fileno())
            except OSError:
                file.truncate(len(content))
                raise
        flush_folder(target.parent)

    def lines(self, path: str) -> list[bytes]:
        """The lines of a log, oldest first."""
        try:
            return self.read(path).splitlines()
        except (FileNotFoundError, NotADirectoryError):
            return []

    def remove(self, path: str) -> None:
        """Deletes a file or folder; for others it vanishes at once."""
        with self._aside("removed") as hidden:
            os.rename(self.root / path, hidden / "content")
            flush_folder((self.root / path).parent)

    def litter(self) -> Iterator[str]:
        """What killed writers left in the temporary folder."""
        for name in self.entries(TEMPORARY):
            try:
                lock = _lock(self.root / TEMPORARY / name, wait=False)
            except OSError:  # gone meanwhile, or its writer lives and holds it
                continue
            if lock is not None:
                os.close(lock)
            yield f"{TEMPORARY}/{name}"

    @contextmanager
    def _aside(self, label: str) -> Iterator[Path]:
        """A locked new folder inside the library, gone afterwards unless it was renamed."""
        new = not self.root.exists()
        folder = self._unique(label)
        self._make_aside(folder)
        lock = _lock(folder, wait=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            if lock is not None:
                os.close(lock)
            self._tidy()
            if new:  # a write that failed leaves no empty library behind
                with suppress(OSError):
                    self.root.rmdir()

    def _unique(self, label: str) -> Path:
        return self.root / TEMPORARY / f"{label}-{uuid.uuid4().hex}"

    def _make_aside(self, folder: Path) -> None:
        for _ in range(1000):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                return
            except FileNotFoundError:  # another writer has just cleared the parent away
                continue
        folder.mkdir(parents=True, exist_ok=True)

    def _tidy(self) -> None:
        with suppress(OSError):  # refused, as it should be, while another writer is at work
            (self.root / TEMPORARY).rmdir()


def write_durably(path: Path, content: Content) -> None:
    """Writes a new file and waits until the disk has it."""
    with path.open("xb") as file, opened(content) as source:
        shutil.copyfileobj(source, file, _PIECE)
        file.flush()
        os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Makes the names inside a folder survive a power cut, where the system can do that."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _renamed(source: Path, target: Path) -> bool:
    """Renames a folder; False if the target is there already and is not empty."""
    try:
        os.rename(source, target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise
    return True


def _lock(path: Path, *, wait: bool) -> int | None:
    """Locks a folder for as long as the returned handle is open and the process lives.

    Raises:
        OSError: another process holds it and ``wait`` is False.
    """
    if fcntl is None:
        return None
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(handle)
        raise
    return handle
