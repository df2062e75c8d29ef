"""Makes the sweeper known to Hydra, which takes plugins from the namespace package ``hydra_plugins`` alone."""

from cifar_exp.runs.sweep import StudySweeper as _StudySweeper


class StudySweeper(_StudySweeper):
    """See :class:`cifar_exp.runs.sweep.StudySweeper`."""
