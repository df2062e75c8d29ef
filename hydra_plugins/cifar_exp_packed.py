"""Makes the launcher for jobs side by side known to Hydra."""

from dataclasses import dataclass

from hydra.core.config_store import ConfigStore

from cifar_exp.sweeps.packed_launcher import PackedLauncher as _PackedLauncher


class PackedLauncher(_PackedLauncher):
    """See :class:`cifar_exp.sweeps.packed_launcher.PackedLauncher`."""


@dataclass
class PackedLauncherConf:
    """The settings of the launcher, as ``hydra/launcher=packed``.

    Attributes:
        n_jobs: the largest number of jobs at a time; None: as many as there are devices for.
    """

    _target_: str = "hydra_plugins.cifar_exp_packed.PackedLauncher"
    n_jobs: int | None = None


ConfigStore.instance().store(group="hydra/launcher", name="packed", node=PackedLauncherConf, provider="cifar_exp")
