"""One job of a sweep: run it, report its failure, and keep of its result what is read later."""

from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.types import TaskFunction
from omegaconf import DictConfig, OmegaConf

from cifar_exp.errors import Stopped
from cifar_exp.sweeps.sweep_summary import JobRow
from cifar_exp.system.bugs import as_user_error
from cifar_exp.system.printable import print_notice, printable
from cifar_exp.system.redaction import masked, masked_text


def run_and_report(task_function: TaskFunction, composed: DictConfig) -> Any:
    """Print a job's overrides, run it, and print the error if it fails."""
    from hydra.core.hydra_config import HydraConfig

    hydra = HydraConfig.get()
    overrides = masked(OmegaConf.to_container(hydra.overrides.task))  # as they were typed
    if OmegaConf.select(composed, "progress") != "quiet":
        print(f"\n== job {hydra.job.num}: {printable(' '.join(overrides))}", flush=True)
    try:
        return task_function(composed)
    except Exception as error:
        if not Stopped.cause_of(error):
            print_notice(masked_text(f"job {hydra.job.num} failed: {as_user_error(error)}"))
        raise


def forget_config(job: JobReturn) -> None:
    """Keep of a job's configuration only what is read later. Hydra returns two copies of it, 0.14 MB each."""
    assert job.hydra_cfg is not None
    job.cfg = None
    job.hydra_cfg = OmegaConf.create({"hydra": {"runtime": {"output_dir": job.hydra_cfg.hydra.runtime.output_dir}}})


def row_of(number: int, job: JobReturn) -> JobRow:
    """The row of a job in the table at the end."""
    assert job.hydra_cfg is not None
    failure = job._return_value if job.status == JobStatus.FAILED else None  # the property would raise and print
    return JobRow(number, masked(list(job.overrides or [])), Path(job.hydra_cfg.hydra.runtime.output_dir), failure)
