"""Flags that Hydra itself answers: ``--cfg hydra``, ``--info``, ``--hydra-help``, completion."""

from __future__ import annotations

import contextlib
import io
import sys

import hydra

from cfm_train import paths
from cfm_train.config import source
from cfm_train.config.compose import VERSION_BASE, prepare
from cfm_train.config.quoting import decode
from cfm_train.launch.flags import Command


def delegate(command: Command) -> int:
    """Lets Hydra answer.

    Args:
        command: flags and overrides; without a recipe Hydra shows the bare root config.

    Returns:
        Hydra's exit code, 2 where it found something wrong.
    """
    source.register()
    flags = [part for name, value in command.flags.items() for part in (name, value) if part]
    named = any(override.startswith("recipe=") for override in command.overrides)
    sweep = "--multirun" in command.flags
    overrides = prepare(command.overrides, sweep=sweep) if named else command.overrides
    before, shown = sys.argv, io.StringIO()
    # What was hidden from Hydra's grammar is shown as it was typed. Completion reads it elsewhere.
    hidden = contextlib.redirect_stdout(shown) if named else contextlib.nullcontext()
    try:
        sys.argv = [before[0], *flags, *overrides]
        with hidden:
            hydra.main(str(paths.ROOT / "conf"), "config", VERSION_BASE)(lambda config: None)()
    except SystemExit as ended:
        return 2 if ended.code else 0
    finally:
        sys.argv = before
        sys.stdout.write(decode(shown.getvalue()))
    return 0
