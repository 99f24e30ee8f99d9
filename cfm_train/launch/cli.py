"""The command line: which of the few things it can do a person asked for, and with what exit code.

0 done    1 a run failed    2 wrong input, nothing was made    130 interrupted
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cfm_train.errors import UserError
from cfm_train.launch.flags import Command, parse

if TYPE_CHECKING:
    from cfm_train.launch.job import Job


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: what stands after the program's name; the process's own by default.

    Returns:
        the exit code.
    """
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # the cause of an error, not Hydra's wrapper
    try:
        code = _dispatch(parse(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()  # here, where a reader that has left can still be told from an error
        return code
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command takes the run up again.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output, such as head, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _dispatch(command: Command) -> int:
    flags = command.flags
    if "--help" in flags or not (flags or command.overrides):
        return _help(command)
    if "--version" in flags:
        return _version()
    if flags.get("--cfg", "job") != "job" or flags.keys() & {
        "--info",
        "--hydra-help",
        "--shell-completion",
    }:
        from cfm_train.launch.hydra_flags import delegate

        return delegate(command)
    if "--cfg" in flags:
        return _show(command)
    if "--multirun" in flags:
        from cfm_train.launch.sweep import sweep

        return sweep(command.overrides)
    return _single(command.overrides)


def _version() -> int:
    from importlib.metadata import PackageNotFoundError, version

    try:
        print(f"cfm_train {version('cfm_train')}")
    except PackageNotFoundError:
        print("cfm_train, from a checkout that is not installed")
    return 0


def _help(command: Command) -> int:
    """The whole page, or with a recipe the purpose and the keys of that one."""
    from cfm_train.config.catalogue import recipes
    from cfm_train.launch.help import recipe_text, text

    named = next((o[7:] for o in command.overrides if o.startswith("recipe=")), None)
    if named not in recipes():
        print(text())
        return 0
    print(recipe_text(recipes()[named]))
    return _show(command)


def _show(command: Command) -> int:
    """Prints the composed run, as ``--cfg job`` does; of a sweep every one."""
    from cfm_train.config.compose import as_yaml, compose_prepared, expand, prepare
    from cfm_train.config.validate import validate

    sweep = "--multirun" in command.flags
    jobs = expand(command.overrides) if sweep else [prepare(command.overrides)]
    texts = [as_yaml(validate(compose_prepared(job), missing_allowed=True)) for job in jobs]
    print("\n---\n".join(text.rstrip() for text in texts))
    return 0


def _single(overrides: list[str]) -> int:
    from cfm_train.config.compose import is_hydras
    from cfm_train.launch.job import RunFailed, prepare, print_again, rehearse

    launchers = [one for one in overrides if is_hydras(one)]
    if launchers:
        raise UserError(f"{launchers[0]} counts in a sweep only: add -m, or leave it out.")
    job = prepare(overrides)
    if job.config["dry_run"]:
        rehearse(job)
        print(f"dry run: every check passed; the run would be kept in {job.folder}")
        return 0
    kept = job.finished() is not None
    try:
        job.start()
    except RunFailed as error:
        print(f"error: {error} (traceback: {job.folder / 'log.txt'})", file=sys.stderr)
        _close(job)
        return 1
    if kept:
        print_again(job)
    _close(job)
    return 0


def _close(job: Job) -> None:
    """The end of standard output: where the dashboard and the record are."""
    from cfm_train.launch.job import first_process

    if not first_process():
        return
    print(f"dashboard: {job.dashboard_path}")
    print(f"record: {job.record_path}")
