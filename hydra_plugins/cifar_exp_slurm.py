"""Makes the Slurm launcher known to Hydra. Its settings are in ``conf/hydra/launcher/slurm.yaml``."""

from cifar_exp.sweeps.slurm_launcher import SlurmLauncher as _SlurmLauncher


class SlurmLauncher(_SlurmLauncher):
    """See :class:`cifar_exp.sweeps.slurm_launcher.SlurmLauncher`."""
