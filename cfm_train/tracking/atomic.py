"""Files that a kill leaves readable: replaced as a whole, or longer by a line."""

from __future__ import annotations

import os
from pathlib import Path


def append_line(path: Path, text: str) -> None:
    """Adds a line, which reaches the operating system before this returns: a SIGKILL tears at most
    the line that is being written, and that one has no newline.

    Args:
        path: the file; made if it is not there.
        text: the line, without its newline.

    Raises:
        OSError: the disk is full or the file cannot be written.
    """
    line = (text + "\n").encode()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        while line:
            line = line[os.write(descriptor, line) :]
    finally:
        os.close(descriptor)


def replace_file(path: Path, content: bytes) -> None:
    """Writes ``content`` beside ``path``, syncs it, and renames it over ``path``: a reader sees the
    old file or the new one, even after a power cut.

    Args:
        path: the file to write; its folder must exist.
        content: all of its bytes.

    Raises:
        OSError: the disk is full or the folder cannot be written; ``path`` is then untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself must survive a power cut
    finally:
        os.close(folder)
