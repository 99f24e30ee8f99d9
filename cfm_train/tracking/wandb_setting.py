"""Whether W&B runs on this machine, how it is set, and where it may write: the run folder alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from cfm_train.errors import UserError, nearest

Mode = Literal["offline", "online", "disabled"]

_MODES = ("auto", "offline", "online", "disabled")


def resolve_mode(mode: str) -> Mode:
    """What ``tracking.mode`` means on this machine.

    Args:
        mode: ``auto``, ``offline``, ``online`` or ``disabled``; ``auto`` follows ``WANDB_MODE``
            where that is set, else it is online where ``WANDB_API_KEY`` is set, else offline.

    Returns:
        The mode to run in.

    Raises:
        UserError: the mode is unknown, or online without a key.
    """
    if mode not in _MODES:
        raise UserError(f"tracking.mode: there is no mode {mode!r}.{nearest(mode, _MODES)}")
    key = bool(os.environ.get("WANDB_API_KEY"))
    if mode == "online" and not key:
        raise UserError(
            "tracking.mode: online needs WANDB_API_KEY in the environment; set it, or use offline."
        )
    if mode == "auto":
        mode = os.environ.get("WANDB_MODE") or ("online" if key else "offline")
        if mode not in _MODES[1:]:
            raise UserError(
                f"WANDB_MODE: there is no mode {mode!r} here.{nearest(mode, _MODES[1:])}"
            )
    return mode  # type: ignore[return-value]


def settings() -> Any:
    """The ``wandb.Settings`` of every run: silent, and a run folder that is whole by itself."""
    import wandb

    return wandb.Settings(
        silent=True,
        console="off",  # the terminal is the run's own; W&B would put pipes around it
        save_code=False,
        disable_git=True,
        symlink=False,  # a run folder can be copied
        init_timeout=float(os.environ.get("WANDB_INIT_TIMEOUT", 20)),
        x_save_requirements=False,  # the record holds the versions
        x_transaction_log_flush_interval=1.0,  # a SIGKILL loses a second, not fifteen
    )


def leave_service() -> None:
    """Forgets a W&B service that was inherited from the process that started this one.

    A service outlives the processes that it serves: it would still hold the run of one that was
    killed, and refuse its id to the process that takes the run up again. A service of this
    process's own carries its number (``<version>-<pid>-…``) and is kept.
    """
    if f"-{os.getpid()}-" not in os.environ.get("WANDB_SERVICE", ""):
        os.environ.pop("WANDB_SERVICE", None)


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Points all that W&B writes into ``<folder>/wandb``, and keeps it silent, for one call."""
    place = str(folder / "wandb")
    wanted = dict.fromkeys(
        ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_ARTIFACT_DIR"), place
    )
    wanted |= {"WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}
    before = {name: os.environ.get(name) for name in wanted}  # a person's own, put back below
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
