"""All cases, in the order of the table. Importing a module registers its cases."""

from tests.faults import deaths, harm, images, overrides, records, saving, schedulers, starts, storage, sweeps
from tests.faults.registry import CASES

__all__ = [
    "CASES",
    "deaths",
    "harm",
    "images",
    "overrides",
    "records",
    "saving",
    "schedulers",
    "starts",
    "storage",
    "sweeps",
]
