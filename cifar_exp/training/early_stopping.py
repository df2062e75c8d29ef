"""Early stopping: find the best epoch, and detect when training no longer improves."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cifar_exp.config.schema import EarlyStoppingSettings
from cifar_exp.training.metrics import MetricValues


@dataclass
class EarlyStopping:
    """Tracks the validation of each epoch. Metrics are all-reduced, so all ranks make the same decision.

    Attributes:
        settings: metric, ``min_delta`` and patience.
        best: the best value so far.
        best_epoch: the first epoch with that value; 0 before any.
        best_step: the last step of that epoch.
        reference: the value to improve on by more than ``min_delta``.
        waited: consecutive epochs without such an improvement.
    """

    settings: EarlyStoppingSettings
    best: float | None = None
    best_epoch: int = 0
    best_step: int = 0
    reference: float | None = None
    waited: int = 0

    def update(self, validation: MetricValues, epoch: int, step: int) -> None:
        """Take one epoch's validation into account."""
        value = validation.named("val")[self.settings.metric]
        if self._is_better(value, self.best, by=0.0):
            self.best, self.best_epoch, self.best_step = value, epoch, step
        if self._is_better(value, self.reference, by=self.settings.min_delta):
            self.reference, self.waited = value, 0
        else:
            self.waited += 1

    @property
    def is_over(self) -> bool:
        """Whether patience has run out."""
        return self.settings.patience is not None and self.waited >= self.settings.patience

    def state_dict(self) -> dict[str, Any]:
        """The state for :meth:`load_state_dict`, without the settings."""
        return {name: value for name, value in vars(self).items() if name != "settings"}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a state, but keep this object's settings."""
        for name in self.state_dict():
            setattr(self, name, state[name])

    def _is_better(self, value: float, other: float | None, by: float) -> bool:
        if other is None:
            return True
        gain = other - value if self.settings.metric == "val/loss" else value - other
        return gain > by
