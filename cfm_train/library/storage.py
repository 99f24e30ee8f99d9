"""Where the bytes of a library lie: a local folder, or any place that fsspec reaches.

Both kinds of place (`local.py`, `objects.py`) keep the same promise in their own way: an artifact
is there whole or not at all, and lines that many writers add are all kept.
"""

from __future__ import annotations

import errno
import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Protocol

from cfm_train.errors import UserError

#: What a file is written from: its bytes, a file to copy, or a function that opens its content.
Content = bytes | Path | Callable[[], IO[bytes]]


class Storage(Protocol):
    """What the library asks of the place where it lives.

    Paths are relative to the library and have forward slashes.

    Attributes:
        url: the place, as a person writes it.
    """

    url: str

    def check_writable(self, needed: int) -> None:
        """Checks, without leaving a trace, that something could be stored.

        Args:
            needed: bytes that must be free.

        Raises:
            OSError: the place may not be written, or is full. An object store answers only to a
                real write and is not asked.
        """

    def read(self, path: str) -> bytes:
        """The whole content of a file; FileNotFoundError where there is none."""

    def open(self, path: str) -> IO[bytes]:
        """A file for reading, seekable; FileNotFoundError where there is none."""

    def exists(self, path: str) -> bool:
        """Whether there is a file or a folder."""

    def entries(self, path: str) -> list[str]:
        """Names inside a folder, sorted; none where there is no folder."""

    def size(self, path: str) -> int:
        """Bytes of a file; FileNotFoundError where there is none."""

    def age(self, path: str) -> float:
        """Seconds since a file, or the newest file of a folder, was written; 0 if nobody knows."""

    def commit(
        self, folder: str, files: Mapping[str, Content], last: str, announce: Callable[[], None]
    ) -> bool:
        """Writes a folder whole or not at all.

        Args:
            folder: the new folder.
            files: the content of each file.
            last: the file whose presence makes the folder whole.
            announce: called once: when everything is written and before anybody can see it, or when
                a whole folder was there already.

        Returns:
            False if a whole folder was there already; it is left as it is.
        """

    def put(self, path: str, content: Content) -> None:
        """Writes one file, new or over an old one; readers see the one or the other."""

    def append(self, path: str, line: bytes, *, unless_last_has: bytes) -> None:
        """Adds one line to a log that many processes add to, whole or not at all.

        Args:
            path: the log.
            line: the line without its newline.
            unless_last_has: nothing is added when the last line holds these bytes.
        """

    def lines(self, path: str) -> list[bytes]:
        """The lines of a log, oldest first; a torn one among them is its reader's to pass over."""

    def remove(self, path: str) -> None:
        """Deletes a file or folder; for others it vanishes at once."""

    def litter(self) -> Iterator[str]:
        """Paths that a killed writer left behind and that no living writer holds."""

    def local(self, path: str) -> Path | None:
        """The path on this machine, or None where the place is elsewhere."""


def open_storage(root: str | Path) -> Storage:
    """The storage behind a path or an fsspec address (``s3://bucket/library``, ``memory://x``).

    Raises:
        UserError: the address has a scheme that is unknown or whose package is not installed.
    """
    text = str(root).removeprefix("file://")
    if "://" in text:
        from cfm_train.library.objects import ObjectStorage  # fsspec: a folder does without

        return ObjectStorage(text)
    from cfm_train.library.local import LocalStorage

    return LocalStorage(Path(text).expanduser())


def opened(content: Content) -> IO[bytes]:
    """Opens what a file is written from.

    Raises:
        UserError: the file to copy does not exist.
    """
    if isinstance(content, bytes):
        return io.BytesIO(content)
    if not isinstance(content, Path):
        return content()
    try:
        return content.open("rb")
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"There is no file {content}.") from None


_ELSEWHERE = "choose another with library=DIR, --library DIR or CFM_LIBRARY"
_REASONS = {
    errno.ENOSPC: "the disk is full: free some space (`python -m cfm_train.library gc` helps)",
    errno.EDQUOT: "the disk quota is used up: free some space",
    errno.EROFS: f"it lies on a read-only file system: {_ELSEWHERE}",
    errno.EACCES: f"you may not read or write there: {_ELSEWHERE}",
    errno.EPERM: f"you may not read or write there: {_ELSEWHERE}",
    errno.ENOTDIR: f"a part of its path is a file, not a folder: {_ELSEWHERE}",
    errno.EEXIST: f"a part of its path is a file, not a folder: {_ELSEWHERE}",
    errno.ENAMETOOLONG: f"its path is too long for the file system: {_ELSEWHERE}",
}


@contextmanager
def explained(root: str, doing: str) -> Iterator[None]:
    """Turns the system's refusals (read-only, disk full, no network, …) into one sentence.

    Args:
        root: the library, as a person writes it.
        doing: what was being done, such as ``storing sst2@1f2c``.
    """
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        reason = _REASONS.get(error.errno or 0, f"the system says '{error}'")
        raise UserError(f"The library {root} failed at {doing}: {reason}.") from error
    except Exception as error:
        # The clients of object stores have exceptions of their own, without a common base class.
        if "://" not in root:
            raise
        raise UserError(
            f"The library {root} failed at {doing}: the store says '{error}'; check its address, "
            "your credentials and the network."
        ) from error
