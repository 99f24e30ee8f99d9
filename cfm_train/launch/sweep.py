"""Many runs from one command (``-m``): all are checked first, then those that are missing are run.

Without a launcher they go one after another in this process. With ``hydra/launcher=…`` (Ray, Slurm
through submitit, or any other that is installed) the missing ones are handed to it, all at once. A
run's folder is named by its config hash, so the same sweep started again runs only what is missing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cfm_train.config.compose import compose_prepared, expand, is_hydras
from cfm_train.config.quoting import decode
from cfm_train.config.validate import validate
from cfm_train.errors import UserError
from cfm_train.launch.job import RunFailed, checked
from cfm_train.tracking.record import read_record


@dataclasses.dataclass
class Planned:
    """One run of a sweep.

    Attributes:
        overrides: what composes it, as Hydra takes it.
        label: the overrides in which the runs differ, as typed.
        config: its validated config.
        hash: its config hash.
        folder: its run folder.
        status: ``waiting``, ``done`` or ``failed``; ``kept`` if an earlier start had finished it.
        error: why it failed, one sentence.
    """

    overrides: list[str]
    label: str
    config: dict[str, Any]
    hash: str
    folder: Path
    status: str = "waiting"
    error: str | None = None

    @property
    def typed(self) -> list[str]:
        """The overrides as a person would type them for this run alone."""
        return typed(self.overrides)


def typed(overrides: Sequence[str]) -> list[str]:
    """Prepared overrides as a person types them, without Hydra's own."""
    return [decode(override.lstrip("+")) for override in overrides if not is_hydras(override)]


def sweep(overrides: Sequence[str]) -> int:
    """Runs every combination of the values given.

    Args:
        overrides: what the person typed, without ``-m``.

    Returns:
        0, or 1 if a run failed (the others are run all the same).

    Raises:
        UserError: one of the runs is not valid; none was started and nothing was made.
    """
    runs = plan(expand(overrides))
    if runs[0].config["dry_run"]:
        for run in runs:
            print(f"{run.label or 'the run'}: {run.status}, {run.folder}")
        print(f"dry run: every check passed for {len(runs)} runs")
        return 0
    started = time.monotonic()
    missing = [run for run in runs if run.status == "waiting"]
    if not any(one.lstrip("+").startswith("hydra/launcher=") for one in overrides):
        _one_after_another(runs)
    elif missing:
        from cfm_train.launch.launcher import launch

        launch(missing, _folder(runs) / "launcher")
        for run in missing:
            _complain(run)
    return _close(runs, overrides, time.monotonic() - started)


def plan(jobs: Sequence[Sequence[str]]) -> list[Planned]:
    """Checks every run of a sweep, and drops those that are the same as one before."""
    common = set(jobs[0]).intersection(*jobs[1:]) if len(jobs) > 1 else set()
    labels = [" ".join(typed([one for one in job if one not in common])) for job in jobs]
    configs = []
    for label, overrides in zip(labels, jobs, strict=True):  # all, before any file is read
        with _named(label):
            configs.append(validate(compose_prepared(overrides)))
    planned: dict[str, Planned] = {}
    for label, overrides, config in zip(labels, jobs, configs, strict=True):
        with _named(label):
            job = checked(config)
        status = "kept" if job.finished() else "waiting"
        run = Planned(list(overrides), label, job.config, job.hash, job.folder, status)
        planned.setdefault(job.hash, run)
    runs = list(planned.values())
    group = _folder(runs).name
    for run in runs:  # the runs of a sweep stand together in W&B
        if run.config["tracking"]["group"] is None:
            run.config["tracking"]["group"] = group
    return runs


@contextlib.contextmanager
def _named(label: str) -> Iterator[None]:
    """An error inside says in which of the runs it is."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{label}: {error}" if label else str(error)) from None


def _one_after_another(runs: Sequence[Planned]) -> None:
    for number, run in enumerate(runs, 1):
        kept = " (finished before)" if run.status == "kept" else ""
        print(f"[{number}/{len(runs)}] {run.label}{kept}", flush=True)
        if run.status == "waiting":
            with _command_line(run.typed):
                run.status, run.error = outcome(run.config)
            _complain(run)


def _complain(run: Planned) -> None:
    if run.error:
        print(f"error: {run.label}: {run.error}", file=sys.stderr, flush=True)


def outcome(config: dict[str, Any]) -> tuple[str, str | None]:
    """Runs one job of a sweep to its end: its status, and the sentence if it failed."""
    try:
        job = checked(config)  # again: holding every run's rows from the plan would fill the memory
        return str(job.start()["status"]), None
    except (UserError, RunFailed) as error:
        return "failed", str(error)


@contextlib.contextmanager
def _command_line(overrides: Sequence[str]) -> Iterator[None]:
    """Several processes of one run are started with its own command, not with the sweep's."""
    before = sys.argv
    sys.argv = [before[0], *overrides]
    try:
        yield
    finally:
        sys.argv = before


def _folder(runs: Sequence[Planned]) -> Path:
    """Where the sweep's own files are: named after its runs, so the same sweep finds it again."""
    recipes = {run.config["recipe"].replace("/", "-") for run in runs}
    hashes = "".join(sorted(run.hash for run in runs))
    name = f"{recipes.pop() if len(recipes) == 1 else 'sweep'}-{_short(hashes)}"
    return Path(runs[0].config["outputs"]).absolute() / "sweeps" / name


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def _close(runs: Sequence[Planned], overrides: Sequence[str], seconds: float) -> int:
    """The table of the runs, the dashboard over all of them and the list of their records."""
    from cfm_train.tracking.dashboard import draw

    folder = _folder(runs)
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for run in runs:
        with contextlib.suppress(UserError):  # a run that left no record stands in the list alone
            records.append(read_record(run.folder))
    print_table(runs, {record["config_hash"]: record for record in records})
    failed = [run for run in runs if run.status == "failed"]
    summary = {
        "operation": "sweep",
        "status": "failed" if failed else "done",
        "overrides": list(overrides),
        "seconds": seconds,
        "runs": [
            {
                "overrides": run.typed,
                "status": "failed" if run.status == "failed" else "done",
                "error": run.error,
                "record": str(run.folder / "record.json"),
            }
            for run in runs
        ],
    }
    from cfm_train.tracking.atomic import replace_file

    text = json.dumps(summary, indent=2, ensure_ascii=False) + "\n"
    replace_file(folder / "record.json", text.encode("utf-8", "replace"))
    draw(records, folder / "dashboard.html")
    if failed:
        print(f"error: {len(failed)} of {len(runs)} runs failed", file=sys.stderr)
    print(f"dashboard: {folder / 'dashboard.html'}")
    print(f"record: {folder / 'record.json'}")
    return 1 if failed else 0


def print_table(runs: Sequence[Planned], records: Mapping[str, Mapping[str, Any]]) -> None:
    """One line for each run: what it was, how it ended, and its first figure on the test split."""
    from rich.console import Console
    from rich.table import Table

    from cfm_train.tracking.terminal import interval_text, score_text

    table = Table("run", "status", "figure", "value", "95 % interval", title=None)
    for run in runs:
        metrics = records.get(run.hash, {}).get("metrics", {})
        first = next((key for key in metrics if key.startswith("test/")), next(iter(metrics), None))
        figure, metric = metrics.get(first), (first or "").rpartition("/")[2]
        table.add_row(
            run.label or run.config["name"],
            run.status,
            first or "",
            score_text(figure["value"], metric) if figure else "",
            interval_text(figure, metric) if figure else "",
        )
    Console(markup=False, highlight=False).print(table)
