"""The progress bar: all its figures stand in a terminal of 80 columns, in full in a wider one."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import struct
import sys
import termios
from types import SimpleNamespace
from typing import Any

import pytest

from cfm_train.training.callbacks import Progress


@pytest.mark.parametrize(("columns", "limit"), [(80, "17% FLOP"), (120, "17% of the FLOP limit")])
def test_figures_fit_the_terminal(
    columns: int, limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The longest that figures commonly get: thousands of steps, five digits of tokens."""
    reader, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    monkeypatch.setattr(sys, "stderr", os.fdopen(terminal, "w"))
    nothing: Any = None
    bar = Progress(1200, peak_flops=1e9)
    trainer: Any = SimpleNamespace(global_step=998)
    bar.on_train_start(trainer, nothing)
    figures = {"seconds": 0.5, "rows": 97, "tokens": 5021, "flops": 0.085e9}
    bar.on_train_batch_end(nothing, nothing, figures | {"train/loss": 0.5}, nothing, 0)
    bar.on_train_end(nothing, nothing)
    sys.stderr.close()
    said = b""
    with contextlib.suppress(OSError):  # how a terminal ends
        while part := os.read(reader, 65536):  # what was written comes in pieces
            said += part
    os.close(reader)
    last = said.decode().rstrip().rpartition("\r")[2]
    assert len(last) <= columns
    assert last.startswith("999/1200|")
    for figure in ("loss 0.500", "194 samples/s", "10042 tokens/s", limit, " GiB"):
        assert figure in last
