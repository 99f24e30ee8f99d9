"""How long a run has taken, over all the sessions that a kill or a failure cut it into.

    with Clock(folder, goes_on=True) as clock: …  clock.seconds()

The time so far is kept in the run folder and written again every few seconds, so that a session
that was killed counts up to its last beat. Clocks of the machine (dates, time stamps of files) play
no part: a run may go on elsewhere.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from pathlib import Path
from types import TracebackType

FILE = "seconds.json"

#: Seconds between two writes: what a killed session may lack.
BEAT = 5.0


class Clock:
    """Counts the seconds of a run.

    Args:
        folder: the run folder.
        goes_on: whether this session builds on what earlier ones left; their time counts then.
    """

    def __init__(self, folder: Path, goes_on: bool) -> None:
        self.path = folder / FILE
        self.before = _read(self.path) if goes_on else 0.0
        self._began = time.monotonic()
        self._ended = threading.Event()
        self._beat = threading.Thread(target=self._run, name="clock", daemon=True)

    def seconds(self) -> float:
        """Seconds of wall time, those of earlier sessions included."""
        return self.before + time.monotonic() - self._began

    def stop(self) -> None:
        """Ends the beat: the folder may go."""
        self._ended.set()
        self._beat.join()

    def __enter__(self) -> Clock:
        self._write()
        self._beat.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
        if self.path.parent.is_dir():  # a run that was refused takes its folder away
            self._write()

    def _run(self) -> None:
        while not self._ended.wait(BEAT):
            self._write()

    def _write(self) -> None:
        """Replaces the file; where it cannot be written, the record may lack this session."""
        new = self.path.with_name(f".{FILE}.{os.getpid()}.tmp")
        with contextlib.suppress(OSError):
            new.write_text(json.dumps({"seconds": round(self.seconds(), 3)}) + "\n")
            os.replace(new, self.path)


def _read(path: Path) -> float:
    """The seconds in the file; 0 where there is none or it is damaged."""
    try:
        return max(0.0, float(json.loads(path.read_text())["seconds"]))
    except (OSError, ValueError, KeyError, TypeError):
        return 0.0
