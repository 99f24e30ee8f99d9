"""One W&B run: offline unless a key is set, silent, in its run folder, and whole after a SIGKILL.

Rules:

- ``metrics.jsonl`` is the truth, W&B is a copy of it. W&B buffers rows, so a SIGKILL loses some; a
  resumed run takes up the same id (written before the first step) and first logs every row of
  ``metrics.jsonl`` that W&B does not hold yet. A step that is run again is not logged twice.
- An offline run that is resumed is a second ``offline-run-*`` folder with the same id; together
  they hold each row once, and ``wandb sync`` merges them.
- When W&B fails, training goes on: a warning says so and the record keeps the reason (``error``).
  Where rows cannot be logged any more nothing further is sent, and a resume makes up for what was
  missed; a failed table, artifact or summary costs only itself. An online run that cannot reach the
  server becomes an offline one.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from cfm_train.tracking.atomic import replace_file
from cfm_train.tracking.metrics_file import MetricsFile
from cfm_train.tracking.wandb_setting import Mode, inside, leave_service, resolve_mode, settings

_LOG = logging.getLogger(__name__)


class WandbRun:
    """A W&B run in ``<folder>/wandb``; starts, or resumes, as soon as it is made.

    Args:
        mode: see ``resolve_mode``; ``disabled`` does nothing, imports nothing and writes nothing.
        project: W&B project.
        group: W&B group (the sweep), or ``None``.
        job_type: W&B job type: the operation.
        tags: W&B tags.
        config: the resolved config of the run.
        folder: the run folder; its ``metrics.jsonl``, cut back to the checkpoint, is replayed.

    Attributes:
        id: the run's id, the same after every resume; ``None`` where disabled.
        mode: the mode it runs in.
        error: why W&B was given up, or ``None``.
    """

    def __init__(
        self,
        mode: str,
        project: str,
        group: str | None,
        job_type: str,
        tags: Sequence[str],
        config: Mapping[str, Any],
        folder: str | Path,
    ) -> None:
        self.mode: Mode = resolve_mode(mode)
        self.project, self.group, self.folder = project, group, Path(folder)
        self.id: str | None = None
        self.error: str | None = None
        self._run: Any = None
        self._step = 0
        self._first = 0  # steps below are at the server
        self._held: dict[int, set[str]] = {}  # what earlier offline folders hold, by step
        if self.mode == "disabled":
            return
        with self._guarded("start", fatal=True):
            self.id = self._take_id()
            self._held = self._read_held()
            self._run = self._start(job_type, tags, config)
        self._replay()

    def log(self, step: int, values: Mapping[str, float | int | str | bool | None]) -> None:
        """Logs one row; what W&B already holds of it is left out.

        Args:
            step: the optimiser step; never less than the one before.
            values: flat scalars.

        Raises:
            ValueError: ``step`` goes back, which W&B would drop without a word.
        """
        if step < self._step:
            raise ValueError(f"step {step} comes after step {self._step}; W&B rows go forward only")
        self._step = step
        held = self._held.get(step, ())
        new = {key: value for key, value in values.items() if key not in held}
        if step >= self._first and new:
            self._send(new)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Logs a table at the current step.

        Args:
            name: key of the table.
            columns: names of its columns.
            rows: one list of scalars per row.
        """
        if self._run is not None:
            with self._guarded(f"log the table {name}"):
                import wandb

                table = wandb.Table(columns=list(columns), data=[list(row) for row in rows])
                self._send({name: table})

    def chart(
        self,
        name: str,
        kind: Literal["bar", "line", "scatter"],
        columns: Sequence[str],
        rows: Sequence[Sequence[Any]],
        *,
        x: str,
        y: str,
        title: str,
    ) -> None:
        """Logs a chart over a table at the current step; W&B draws it, so it can be edited there.

        Args:
            name: key of the chart; its table is ``<name>_table``.
            kind: what it is.
            columns: names of the table's columns.
            rows: one list of scalars per row.
            x: the column across (a bar's label).
            y: the column upwards (a bar's length).
            title: heading of the chart.
        """
        if self._run is not None:
            with self._guarded(f"log the chart {name}"):
                import wandb

                table = wandb.Table(columns=list(columns), data=[list(row) for row in rows])
                draw: dict[str, Any] = {"bar": wandb.plot.bar, "line": wandb.plot.line,
                        "scatter": wandb.plot.scatter}  # fmt: skip
                self._send({name: draw[kind](table, x, y, title=title)})

    def artifact(
        self, name: str, type: str, folder: str | Path, metadata: Mapping[str, Any]
    ) -> None:
        """Logs a folder as an artifact; its files are copied into the run folder.

        Args:
            name: name of the artifact.
            type: its type, such as ``brick``.
            folder: the files.
            metadata: JSON-like facts about it.
        """
        if self._run is not None:
            with self._guarded(f"log the artifact {name}"):
                import wandb

                artifact = wandb.Artifact(name, type=type, metadata=dict(metadata))
                artifact.add_dir(str(folder))
                self._run.log_artifact(artifact)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Sets figures of the run's summary."""
        if self._run is not None:
            with self._guarded("write the summary"):
                self._run.summary.update(dict(values))

    def finish(self, exit_code: int = 0) -> None:
        """Ends the run and writes out what is buffered; a second call does nothing.

        Args:
            exit_code: 0, or what the run failed with: W&B shows it as failed then.
        """
        if self._run is not None:
            with self._guarded("finish", fatal=True):
                self._run.finish(exit_code=exit_code)
        self._run = None

    def as_record(self) -> dict[str, str | None]:
        """The ``wandb`` part of the record."""
        facts = {"mode": self.mode, "id": self.id, "project": self.project, "group": self.group}
        return {**facts, "error": self.error} if self.error else facts

    def _take_id(self) -> str:
        """The run's id: read, or made and on the disk before anything is logged under it."""
        file = self.folder / "wandb" / "run_id"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            replace_file(file, uuid.uuid4().hex[:12].encode())
        return file.read_text().strip()

    def _start(self, job_type: str, tags: Sequence[str], config: Mapping[str, Any]) -> Any:
        import wandb

        leave_service()

        def init(mode: Mode) -> Any:
            return wandb.init(
                project=self.project,
                group=self.group,
                name=self.folder.name,
                job_type=job_type,
                tags=list(tags),
                config=dict(config),
                dir=str(self.folder),
                id=self.id,
                mode=mode,
                resume="allow" if mode == "online" else None,
                reinit="create_new",  # two runs in one process stay apart
                settings=settings(),
            )

        if self.mode == "online":
            try:
                run = init("online")
                self._first = run.step
                return run
            except wandb.Error as error:
                _LOG.warning("W&B cannot be reached (%s); this run is logged offline.", error)
                self.mode = "offline"
                wandb.teardown()  # the service still holds the id of the run that did not start
        return init("offline")

    def _read_held(self) -> dict[int, set[str]]:
        """The scalars that earlier offline folders of this run hold, read with W&B's own tool."""
        held: dict[int, set[str]] = {}
        for log in sorted((self.folder / "wandb").glob(f"offline-run-*-{self.id}/*.wandb")):
            command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(log)]
            printed = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True
            ).stdout
            for line in printed.splitlines():
                item = json.loads(line).get("history", {}).get("item", {})
                held.setdefault(int(item.get("_step", 0)), set()).update(item)
        return held

    def _replay(self) -> None:
        """Logs the rows of ``metrics.jsonl`` that W&B lost."""
        for row in MetricsFile(self.folder / "metrics.jsonl").rows():
            self.log(row["step"], {key: value for key, value in row.items() if key != "step"})

    def _send(self, values: Mapping[str, Any]) -> None:
        if self._run is not None:
            with self._guarded("log", fatal=True):
                self._run.log(dict(values), step=max(self._step, self._run.step))

    @contextmanager
    def _guarded(self, what: str, *, fatal: bool = False) -> Iterator[None]:
        """Turns a failure of W&B into a warning, and into an inactive run where it is fatal."""
        try:
            with inside(self.folder):
                yield
        except Exception as error:  # whatever W&B throws
            self.error = f"could not {what}: {type(error).__name__} {error}".strip()
            self._run = None if fatal else self._run
            _LOG.warning(
                "W&B %s. Training goes on; metrics.jsonl and the record are complete.", self.error
            )
