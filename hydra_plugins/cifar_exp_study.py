"""Makes the sweeper known to Hydra, which takes plugins from the namespace package ``hydra_plugins`` alone."""

from dataclasses import dataclass
from typing import Any

from hydra.core.config_store import ConfigStore

from cifar_exp.sweeps.sweep import StudySweeper as _StudySweeper


class StudySweeper(_StudySweeper):
    """See :class:`cifar_exp.sweeps.sweep.StudySweeper`."""


@dataclass
class StudySweeperConf:
    """The settings of the sweeper, as ``hydra/sweeper=study``.

    Attributes:
        max_batch_size: jobs that the launcher gets at once; None: all.
        params: overrides of every job, as in Hydra's own sweeper: name -> value or list of values.
    """

    _target_: str = "hydra_plugins.cifar_exp_study.StudySweeper"
    max_batch_size: int | None = None
    params: dict[str, Any] | None = None


ConfigStore.instance().store(group="hydra/sweeper", name="study", node=StudySweeperConf, provider="cifar_exp")
