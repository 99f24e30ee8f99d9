"""Hands the runs of a sweep to a Hydra launcher: Ray, submitit (Slurm) or any installed one."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig

from cfm_train.config import sentences, source
from cfm_train.config.compose import hydra_session, is_hydras, plain
from cfm_train.config.quoting import encode
from cfm_train.config.validate import validate
from cfm_train.errors import UserError
from cfm_train.tracking.record import read_record

if TYPE_CHECKING:
    from cfm_train.launch.sweep import Planned


def launch(runs: Sequence[Planned], folder: Path) -> None:
    """Runs all of them through the launcher that their overrides name, and notes how each ended.

    Args:
        runs: the runs that are missing; their `status` and `error` are set.
        folder: where the launcher keeps its own files.

    Raises:
        UserError: there is no such launcher, or one of its settings is wrong.
    """
    quoted = str(folder).replace("\\", "\\\\").replace("'", "\\'")
    own = [f"hydra.sweep.dir='{quoted}'", "hydra.sweep.subdir=${hydra:job.num}"]
    with hydra_session(), sentences.translated():
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        settings = [one for one in runs[0].overrides if is_hydras(one)]
        config = hydra.compose_config(
            config_name="config",
            overrides=[*settings, *own],
            run_mode=RunMode.MULTIRUN,
            with_log_configuration=False,
        )
        context = HydraContext(config_loader=hydra.config_loader, callbacks=Callbacks(config))
        launcher = Plugins.instance().instantiate_launcher(
            hydra_context=context, task_function=run_one, config=config
        )
        jobs = [_job(run) for run in runs]
    try:
        results = list(launcher.launch(jobs, initial_job_idx=0))
    except Exception as error:  # whatever breaks in an engine: what was finished by then is kept
        lost = JobReturn(status=JobStatus.FAILED)
        lost.return_value = error
        results = [lost] * len(runs)
    if "ray" in sys.modules:  # its workers' last lines come before ours
        sys.modules["ray"].shutdown()
    for run, result in zip(runs, results, strict=True):
        run.status, run.error = _read(run, result)


def _job(run: Planned) -> list[str]:
    """A run's overrides without Hydra's own, and the group that it stands in with the others."""
    ours = [one for one in run.overrides if not is_hydras(one)]
    return [*ours, f"++tracking.group={encode(run.config['tracking']['group'])}"]


def _read(run: Planned, result: JobReturn) -> tuple[str, str | None]:
    """How a launched run ended; a lost one counts where its record says that it is done."""
    if result.status == JobStatus.COMPLETED:
        status, error = result.return_value
        return status, error
    with contextlib.suppress(UserError):
        if read_record(run.folder)["status"] == "done":
            return "done", None
    try:
        cause: object = result.return_value  # raises what broke the run
    except Exception as error:
        cause = error
    first = (str(cause).strip() or "no message").splitlines()[0]
    return "failed", f"the launcher lost the run ({type(cause).__name__}: {first})"


def run_one(config: DictConfig) -> tuple[str, str | None]:
    """What the launcher calls, in whichever process or machine: one run to its end."""
    from cfm_train.launch.sweep import outcome

    source.register()  # a fresh process does not know our recipes yet
    chosen: Any = HydraConfig.get().runtime.choices
    return outcome(validate(plain(config, chosen)))
