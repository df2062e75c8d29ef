"""Find a run by its folder, its MLflow id, or as `latest`."""

from contextlib import suppress
from pathlib import Path

from cifar_exp.errors import ConfigError
from cifar_exp.records import checkpoint
from cifar_exp.records.journal import RUN_ID_FILE
from cifar_exp.records.run_folder import OUTPUTS, RUN_FILE


def _named(name: str) -> Path:
    """The folder of a run, by its path or MLflow run id."""
    with suppress(OSError):  # a name that no file can have
        if (Path(name) / RUN_FILE).exists():
            return Path(name)
    for path in OUTPUTS.rglob(RUN_ID_FILE):
        if path.read_text().strip() == name and (path.parent / RUN_FILE).exists():
            return path.parent
    raise ConfigError(
        f"resume={name}: there is no such run. Type never, auto, the folder of a run under {OUTPUTS}/, or an MLflow "
        f"run id"
    )


def find_run(name: str) -> Path:
    """The folder of a run: ``latest`` with a saved network, a folder, or an MLflow run id.

    Raises:
        ConfigError: where there is no such run.
    """
    if name == "latest":
        saved = sorted(OUTPUTS.rglob(f"{checkpoint.FOLDER}/*.json"), key=lambda path: path.stat().st_mtime)
        if not saved:
            raise ConfigError(f"latest: no run under {OUTPUTS}/ holds a network yet. Type cifar-exp first")
        return saved[-1].parents[1]
    if (Path(name) / checkpoint.FOLDER).is_dir():
        return Path(name)
    for path in OUTPUTS.rglob(RUN_ID_FILE):
        if path.read_text().strip() == name:
            return path.parent
    raise ConfigError(
        f"{name}: there is no such run under {OUTPUTS}/. Give a run's folder, an MLflow run id, or latest"
    )
