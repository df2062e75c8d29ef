"""All cases, in the order of the table. Importing a module registers its cases."""

from tests.faults import (
    attacks,
    images,
    interruptions,
    mlflow_stores,
    overrides,
    saving,
    schedulers,
    starts,
    storage,
    sweeps,
)
from tests.faults.registry import CASES

__all__ = [
    "CASES",
    "attacks",
    "images",
    "interruptions",
    "mlflow_stores",
    "overrides",
    "saving",
    "schedulers",
    "starts",
    "storage",
    "sweeps",
]
