"""Makes the sweeper that searches known to Hydra."""

from dataclasses import dataclass
from typing import Any

from hydra.core.config_store import ConfigStore

from cifar_exp.sweeps.search_sweeper import SearchSweeper as _SearchSweeper


class SearchSweeper(_SearchSweeper):
    """See :class:`cifar_exp.sweeps.search_sweeper.SearchSweeper`."""


@dataclass
class SearchSweeperConf:
    """The settings of the sweeper, as ``hydra/sweeper=search``.

    Attributes:
        n_trials: trials of the study, over all processes that work on it.
        n_jobs: trials at a time, with ``hydra/launcher=packed``.
        storage: address of a database for the study, such as ``postgresql://...``; None: a file in the sweep's folder.
        study: name of the study in the storage.
        sampler: ``tpe`` (tree-structured Parzen estimator) or ``random``.
        pruner: ``median`` or ``none``.
        startup_trials: trials before the sampler learns from earlier ones and before the pruner stops any.
        warmup_epochs: epochs of each trial before it may be pruned.
        seed: of the sampler.
        params: searched settings of a preset: name -> values, as on the command line.
    """

    _target_: str = "hydra_plugins.cifar_exp_search.SearchSweeper"
    n_trials: int = 20
    n_jobs: int = 1
    storage: str | None = None
    study: str = "search"
    sampler: str = "tpe"
    pruner: str = "median"
    startup_trials: int = 5
    warmup_epochs: int = 1
    seed: int = 0
    params: dict[str, Any] | None = None


ConfigStore.instance().store(group="hydra/sweeper", name="search", node=SearchSweeperConf, provider="cifar_exp")
