"""The one error class that a person reads: a sentence, no traceback, exit code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something in the input is wrong.

    The message is one sentence that says what is wrong, where (key, file, brick or tensor) and what
    to do about it. The command line prints it and exits with code 2; nothing on disk has changed.
    """


def nearest(name: str, valid: Iterable[str], *, most: int = 8) -> str:
    """Ends an error sentence with the nearest valid name, or with the list of them.

    Args:
        name: what the person wrote.
        valid: the names that would have been right.
        most: how many names the list shows before it is cut.

    Returns:
        ``" Did you mean 'x'?"``, else ``" Valid names: a, b, c."``, else ``""``.
    """
    names = sorted(set(valid))
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f" Did you mean '{close[0]}'?"
    if not names:
        return ""
    shown = ", ".join(names[:most]) + (", …" if len(names) > most else "")
    return f" Valid names: {shown}."
