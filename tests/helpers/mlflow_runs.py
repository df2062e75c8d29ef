"""The runs in the MLflow store under the current folder."""

from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Run


def client() -> MlflowClient:
    """A client of the default store of runs in the current folder."""
    return MlflowClient(f"sqlite:///{Path('outputs/mlflow.db').resolve()}")


def all_runs(store: MlflowClient) -> list[Run]:
    experiments = [experiment.experiment_id for experiment in store.search_experiments()]
    return list(store.search_runs(experiments))
