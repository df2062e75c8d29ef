"""The space of a search, from Hydra's sweep overrides: which settings are searched, and between which values."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep

from cifar_exp.errors import ConfigError

# Settings that a search must not choose, with the reason.
NOT_SEARCHED = {
    "seed": "the best seed is luck, not a better network. Set one seed",
    "devices.count": "more devices are not searched but compared. Set one count, or hydra/sweeper=study",
    "data.validation": "accuracies on different images cannot be compared. Set one share",
}
LOG = "log"


@dataclass(frozen=True)
class Choice:
    """One of a list of values, as text."""

    values: tuple[str, ...]

    def suggest(self, trial: Any, name: str) -> str:
        return str(trial.suggest_categorical(name, self.values))

    def ends(self) -> tuple[str, str]:
        return self.values[0], self.values[-1]


@dataclass(frozen=True)
class Numbers:
    """Numbers from ``low`` to ``high``, both included; whole ones if both are. ``step``: None for any between."""

    low: float
    high: float
    step: float | None = None
    is_log: bool = False

    def suggest(self, trial: Any, name: str) -> str:
        if type(self.low) is int and type(self.high) is int:
            return repr(trial.suggest_int(name, self.low, self.high, step=self.step or 1, log=self.is_log))
        return repr(trial.suggest_float(name, self.low, self.high, step=self.step, log=self.is_log))

    def ends(self) -> tuple[str, str]:
        return repr(self.low), repr(self.high)


@dataclass(frozen=True)
class Space:
    """What a search chooses.

    Attributes:
        fixed: the overrides of every trial.
        searched: the values by name of the setting, as in ``optimizer.lr``.
    """

    fixed: tuple[str, ...]
    searched: dict[str, Choice | Numbers]

    @classmethod
    def of(cls, overrides: Sequence[Override]) -> "Space":
        """The space of these overrides. A later override of a setting replaces an earlier one.

        Raises:
            ConfigError: nothing is searched, or a setting cannot be searched.
        """
        fixed: dict[str, str] = {}
        searched: dict[str, Choice | Numbers] = {}
        for override in overrides:
            key = override.get_key_element()
            fixed.pop(key, None)
            searched.pop(key, None)
            if override.value_type is None:  # ~key: whatever its value is
                fixed[key] = key
            elif override.is_sweep_override():
                if reason := NOT_SEARCHED.get(key.lstrip("+")):
                    raise ConfigError(f"{override.input_line}: {reason}")
                searched[key] = _values(override)
            else:
                fixed[key] = f"{key}={override.get_value_element_as_str()}"
        if not searched:
            raise ConfigError(
                "hydra/sweeper=search: no setting is searched. Set one to several values, such as "
                "'optimizer.lr=tag(log,interval(0.01,1))' or model.width=16,32,64, or experiment=search"
            )
        return cls(tuple(fixed.values()), searched)

    def overrides(self, trial: Any) -> list[str]:
        """The overrides of a trial; those that it lacks are chosen now."""
        return [*self.fixed, *(f"{key}={values.suggest(trial, key)}" for key, values in self.searched.items())]

    def ends(self) -> list[list[str]]:
        """The overrides of two jobs: with the first value of each setting, and with the last."""
        pairs = {key: values.ends() for key, values in self.searched.items()}
        return [[*self.fixed, *(f"{key}={pair[end]}" for key, pair in pairs.items())] for end in (0, 1)]

    def description(self) -> dict[str, str]:
        """The searched settings and their values, to compare with those of another start."""
        return {key: str(values) for key, values in self.searched.items()}


def _values(override: Override) -> Choice | Numbers:
    value: Any = override.value()
    tags = getattr(value, "tags", None) or set()
    if tags - {LOG}:
        raise ConfigError(f"{override.input_line}: the only tag of a search is {LOG}, as in tag(log,interval(0.01,1))")
    is_log = LOG in tags
    if isinstance(value, IntervalSweep):
        return _checked(override, Numbers(value.start or 0, value.end or 0, is_log=is_log))
    if isinstance(value, RangeSweep):
        numbers = sorted(value.range())
        if not numbers:
            raise ConfigError(f"{override.input_line}: the range is empty. Set a stop behind the start")
        step = abs(value.step)
        return _checked(override, Numbers(numbers[0], numbers[-1], step, is_log))
    if is_log or (isinstance(value, ChoiceSweep) and not value.list):
        raise ConfigError(f"{override.input_line}: a list has no scale. Set an interval or a range")
    return Choice(tuple(dict.fromkeys(str(text) for text in override.sweep_string_iterator())))


def _checked(override: Override, numbers: Numbers) -> Numbers:
    line = override.input_line
    if numbers.low > numbers.high:
        raise ConfigError(f"{line}: the interval ends before it starts. Set the smaller number first")
    if numbers.is_log and numbers.low <= 0:
        raise ConfigError(f"{line}: a logarithmic scale begins above 0. Set a larger start, or leave out tag(log,...)")
    if numbers.is_log and numbers.step not in (None, 1):
        raise ConfigError(f"{line}: a logarithmic scale has no step. Set an interval, or leave out tag(log,...)")
    if numbers.is_log and numbers.step is not None and type(numbers.low) is not int:
        raise ConfigError(f"{line}: a logarithmic scale has no step. Set an interval, or leave out tag(log,...)")
    return numbers
