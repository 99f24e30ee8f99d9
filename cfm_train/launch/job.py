"""One run, from overrides to its record: check everything, then make a folder, then run.

    config, inputs ─► config hash ─► <outputs>/runs/<recipe>/<name>-<hash>/ ─► run ─► record

A folder with a finished record is not run again; one without is resumed by its operation.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import shutil
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cfm_train.config.compose import as_yaml, compose
from cfm_train.config.hashing import code_version, config_hash
from cfm_train.config.validate import validate
from cfm_train.errors import UserError
from cfm_train.launch.clock import Clock

#: What must be free before a run starts; an operation that needs more checks that itself.
FREE_BYTES = 64 * 2**20

#: Packages whose versions decide figures, and so stand in every record.
PACKAGES = ("cfm_train", "torch", "transformers", "pytorch-lightning", "peft", "numpy")


#: What torchrun, Lightning and Slurm tell a process about its place among those of one run.
RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")


class RunFailed(Exception):
    """A run broke off after it had begun: a failed record, and the traceback in its log."""


@dataclass(frozen=True)
class Job:
    """A run that passed every check.

    Attributes:
        config: the composed, validated config.
        inputs: what the operation's ``check`` returned.
        hash: hash of everything that decides the result.
        folder: where the run lives; not yet made.
    """

    config: dict[str, Any]
    inputs: Any
    hash: str
    folder: Path

    @property
    def record_path(self) -> Path:
        """The record's file."""
        return self.folder / "record.json"

    @property
    def dashboard_path(self) -> Path:
        """The dashboard's file."""
        return self.folder / "dashboard.html"

    def finished(self) -> dict[str, Any] | None:
        """The record of this run where an earlier start finished it."""
        if not self.record_path.is_file() or getattr(operation_of(self.config), "AGAIN", False):
            return None
        from cfm_train.tracking.record import read_record

        with contextlib.suppress(UserError):  # a record that cannot be read is written anew
            record = dict(read_record(self.record_path))
            if record["status"] == "done":
                return record
        return None

    def start(self) -> dict[str, Any]:
        """Runs the job, or gives the record of the finished run.

        Returns:
            the record, as it stands in ``record.json``.

        Raises:
            UserError: the run was refused before it had done anything; no folder is left.
            RunFailed: it broke off later; the folder holds a failed record and a log.
        """
        if not first_process():  # the first one keeps the folder and writes the record
            return dict(operation_of(self.config).run(self.config, self.inputs, self.folder))
        record = self.finished()
        if record is not None:
            return record
        with _folder(self):
            return self.finished() or _run(self)  # another process may have just finished it


def prepare(overrides: Sequence[str]) -> Job:
    """Composes and checks a run from what a person typed."""
    return checked(validate(compose(overrides)))


def checked(config: dict[str, Any]) -> Job:
    """Checks a validated config against the world: files, columns, library, free disk.

    Raises:
        UserError: something that the run needs is not there; nothing was made.
    """
    operation = operation_of(config)
    inputs = operation.check(config)
    total = config_hash(config, inputs.fingerprints)
    recipe = config["recipe"].replace("/", "-")
    name = re.sub(r"[^\w.+@-]+", "-", config["name"]).strip(".-") or "run"
    folder = Path(config["outputs"]) / "runs" / recipe / f"{name[:80]}-{total[:10]}"
    job = Job(config, inputs, total, folder.absolute())
    if job.finished() is None:
        _check_disk(job.folder, "outputs")
    return job


def rehearse(job: Job) -> None:
    """What ``dry_run`` checks beyond `checked`: that the brick fits the backbone.

    Raises:
        UserError: they do not.
    """
    rehearsal = getattr(operation_of(job.config), "rehearse", None)
    if rehearsal is not None:
        rehearsal(job.config, job.inputs)


def operation_of(config: Mapping[str, Any]) -> Any:
    """The module of the config's operation, with its ``check`` and ``run``."""
    return importlib.import_module(f"cfm_train.operations.{config['operation']}")


def _check_disk(folder: Path, key: str) -> None:
    there = next(parent for parent in [folder, *folder.parents] if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"{key}: cannot write into {there}; choose another folder with {key}=DIR.")
    free = shutil.disk_usage(there).free
    if free < FREE_BYTES:
        raise UserError(
            f"{key}: the disk of {there} is full ({free / 2**20:.0f} MB free, a run needs "
            f"{FREE_BYTES / 2**20:.0f}); make room or choose another folder with {key}=DIR."
        )


def first_process() -> bool:
    """Whether this is the only process of the run, or the first of several."""
    return all(os.environ.get(rank, "0") == "0" for rank in RANKS)


@contextlib.contextmanager
def _folder(job: Job) -> Iterator[None]:
    """Makes the run folder and holds its lock, so that the same run never goes twice at once."""
    from filelock import FileLock, Timeout

    made = [parent for parent in job.folder.parents if not parent.exists()]
    try:
        job.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(job.folder / ".lock")
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"This run is already going in another process ({job.folder}): wait for it, or change "
            "name= or seed=."
        ) from None
    except OSError as error:
        raise UserError(f"outputs: cannot make {job.folder}: {error.strerror}.") from None
    try:
        yield
    finally:
        lock.release()
        if not job.folder.exists():  # refused: what was made for it goes too, where it is empty
            with contextlib.suppress(OSError):
                for parent in made:
                    parent.rmdir()


def _run(job: Job) -> dict[str, Any]:
    """Runs the operation in its folder, and writes the record whatever happens."""
    fresh = not _begun(job.folder)
    with Clock(job.folder, goes_on=not fresh) as clock:
        try:
            (job.folder / "config.yaml").write_text(as_yaml(job.config), encoding="utf-8")
            found = operation_of(job.config).run(job.config, job.inputs, job.folder)
            return _finish(job, found, clock.seconds())
        except UserError as error:
            if fresh and not _begun(job.folder):
                clock.stop()
                shutil.rmtree(job.folder, ignore_errors=True)
                raise
            _fail(job, error, clock.seconds())
            raise RunFailed(str(error)) from error
        except SystemExit as ended:
            if isinstance(ended.__context__, KeyboardInterrupt):  # Lightning makes an exit of it
                raise KeyboardInterrupt from None
            raise
        except Exception as error:
            _fail(job, error, clock.seconds())
            kind = "" if isinstance(error, RunFailed) else f"{type(error).__name__}: "
            raise RunFailed(f"{kind}{_first_line(error)}") from error


def _begun(folder: Path) -> bool:
    """Whether the run has left anything that a later start builds on."""
    metrics, checkpoints = folder / "metrics.jsonl", folder / "checkpoints"
    return (metrics.is_file() and metrics.stat().st_size > 0) or (
        checkpoints.is_dir() and any(checkpoints.iterdir())
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or "no message").splitlines()[0]


def _known(job: Job, seconds: float) -> dict[str, Any]:
    """What stands in every record, whatever the operation."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {"python": sys.version.split()[0], "code": code_version()[:12]}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return {
        "operation": job.config["operation"],
        "recipe": job.config["recipe"],
        "name": job.config["name"],
        "seed": job.config["seed"],
        "config_hash": job.hash,
        "seedless_hash": config_hash(
            {key: value for key, value in job.config.items() if key != "seed"},
            job.inputs.fingerprints,
        ),
        "versions": versions,
        "inputs": dict(job.inputs.fingerprints),
        "cost": {"seconds": seconds},
    }


def _finish(job: Job, found: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """Completes the operation's record with what every run knows, writes it and draws it."""
    from cfm_train.tracking.dashboard import draw
    from cfm_train.tracking.record import new_record, read_record, write_record
    from cfm_train.tracking.terminal import print_run

    known = _known(job, seconds)
    cost = {**known["cost"], **(found.get("cost") or {})}
    # Runs that are drawn on the same page: those that made what this one compares.
    others = [read_record(path) for path in found.get("drawn_with", ())]
    own = {key: value for key, value in found.items() if key != "drawn_with"}
    record = new_record(**{**known, **own, "cost": cost})
    draw([{**record, "folder": str(job.folder)}, *others], job.dashboard_path)
    write_record(record, job.record_path)  # last: its presence means that the run is done
    print_run(record)
    return dict(read_record(job.record_path))


def _fail(job: Job, error: Exception, seconds: float) -> None:
    """Leaves the traceback in the log and a failed record; a full disk may keep both away."""
    from cfm_train.tracking.dashboard import draw
    from cfm_train.tracking.record import new_record, write_record

    with contextlib.suppress(OSError):
        with open(job.folder / "log.txt", "a", encoding="utf-8") as log:
            log.write("".join(traceback.format_exception(error)))
        text = _first_line(error)
        record = new_record(**_known(job, seconds), status="failed", error=text)
        write_record(record, job.record_path)
        draw([record], job.dashboard_path)


def print_again(job: Job) -> None:
    """The figures of a run that an earlier start finished."""
    from cfm_train.tracking.terminal import print_run

    record = job.finished()
    if record is not None:
        print("This run was finished before; these are its figures:")
        print_run(record)
