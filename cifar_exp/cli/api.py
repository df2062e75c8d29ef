"""`from cifar_exp import train`: train from a script or a notebook."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from omegaconf import open_dict, read_write

from cifar_exp.cli.hydra_app import composed
from cifar_exp.cli.words import refuse_unusable_names
from cifar_exp.errors import storage_errors
from cifar_exp.launch.host_session import closing_host_zero
from cifar_exp.records.refused_start import REFUSING_ERRORS, Before
from cifar_exp.records.run_folder import make_folder
from cifar_exp.runs.context import Result, RunContext
from cifar_exp.runs.train_composed import train_composed
from cifar_exp.system.redaction import MaskingFormatter
from cifar_exp.system.scheduler import refuse_many_processes

LOG_FILE = "cifar-exp.log"


def train(overrides: Sequence[str] = (), folder: str | Path | None = None) -> Result:
    """Train one run, as the command ``cifar-exp`` does with the same overrides.

    Args:
        overrides: each ``group=choice`` or ``key=value``, as on the command line.
        folder: the run folder; None for a new folder under ``outputs/``.

    Returns:
        The run folder and the last value of each metric.

    Raises:
        CifarExpError: the run failed. The message and ``exit_code`` are those of the command.
    """
    refuse_many_processes()
    refuse_unusable_names((*overrides, folder or ""))
    whole = composed(overrides)
    run_dir = Path(folder) if folder is not None else Path(whole.hydra.run.dir)
    with read_write(whole), open_dict(whole):
        del whole["hydra"]
    with closing_host_zero() as end:
        result = train_composed(whole, RunContext(run_dir, tuple(overrides)), lambda: _folder_with_log(run_dir))
        end(0)
    return result


@contextmanager
def _folder_with_log(run_dir: Path) -> Iterator[None]:
    """Create the run folder, and remove it if the run is refused.

    Inside this context the package's log is written there, as Hydra does for the command.
    """
    before = Before.of(run_dir)
    with storage_errors(run_dir, "Set folder to one that you may write to"):
        make_folder(run_dir)
        handler = logging.FileHandler(run_dir / LOG_FILE, delay=True)
    handler.setFormatter(MaskingFormatter("%(asctime)s %(levelname)s %(message)s"))
    log = logging.getLogger("cifar_exp")
    log.addHandler(handler)
    try:
        yield
    except REFUSING_ERRORS:
        before.restore([LOG_FILE])
        raise
    finally:
        log.removeHandler(handler)
        handler.close()
