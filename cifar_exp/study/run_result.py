"""The results of one finished run that a study uses."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cifar_exp.study.time_breakdown import PREFIXES

Sample = tuple[int, float, float]  # step, seconds since the start of the run, value
# The smallest and the largest value of a metric that a run can have. Ratios of such values, and the intervals of these,
# are finite numbers.
LIMITS = {
    "devices": (1, 2**20),
    "global_batch_size": (1, 2**40),
    "steady_images_per_second": (1e-3, 1e9),
    "time/train_seconds": (1e-6, 1e9),
    "test/accuracy": (0, 1),
    "time/total_seconds": (0, 1e9),
    "val/accuracy": (0, 1),
    "step/images_per_second": (1e-3, 1e9),
}
OTHERS = (-1e30, 1e30)  # of times, bytes and shares
MEASURED = (*PREFIXES, "machine/")


@dataclass(frozen=True)
class RunResult:
    """The results of one finished run.

    Attributes:
        devices: number of ranks that trained.
        global_batch_size: images per step over all ranks.
        images_per_second: steady-state throughput over all ranks.
        train_seconds: time spent training, evaluation excluded.
        test_accuracy: 0 to 1.
        total_seconds: of the whole run, with start-up, compilation and evaluation; None if unknown.
        steady_seconds: of its training steps at steady-state throughput; None if unknown.
        block_rates: images/s of each block of ``train.log_every`` steps but the first, which is warm-up.
        progress: seconds since the start and validation accuracy, after each epoch.
        disturbances: sentences with a placeholder for an amount, and the amounts.
        steps: training steps; None if unknown.
        times: the time metrics.
    """

    devices: int
    global_batch_size: int
    images_per_second: float
    train_seconds: float
    test_accuracy: float
    total_seconds: float | None = None
    steady_seconds: float | None = None
    block_rates: Sequence[float] = ()
    progress: Sequence[tuple[float, float]] = ()
    disturbances: Mapping[str, float] = field(default_factory=dict)
    steps: int | None = None
    times: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        metrics: Mapping[str, float],
        series: Mapping[str, Sequence[Sample]] | None = None,
        disturbances: Mapping[str, float] | None = None,
    ) -> "RunResult":
        """Build it from the last values of a finished run's metrics, and from all values of some of them.

        Raises:
            KeyError: a metric is missing.
            ValueError: a value is one that no run can have. The run may be somebody else's.
        """
        _check(metrics, series or {})
        blocks = (series or {}).get("step/images_per_second", ())
        epochs = (series or {}).get("val/accuracy", ())
        images = epochs[-1][0] * metrics["global_batch_size"] if epochs else None
        return cls(
            devices=int(metrics["devices"]),
            global_batch_size=int(metrics["global_batch_size"]),
            images_per_second=metrics["steady_images_per_second"],
            train_seconds=metrics["time/train_seconds"],
            test_accuracy=metrics["test/accuracy"],
            total_seconds=metrics.get("time/total_seconds"),
            steady_seconds=images / metrics["steady_images_per_second"] if images else None,
            block_rates=tuple(rate for _, _, rate in blocks[1:]),
            progress=tuple((seconds, accuracy) for _, seconds, accuracy in epochs),
            disturbances=disturbances or {},
            steps=epochs[-1][0] if epochs else None,
            times={name: value for name, value in metrics.items() if name.startswith(PREFIXES)},
        )

    def seconds_to(self, accuracy: float) -> float | None:
        """Seconds from the start to the first validation with at least ``accuracy``; None if it was not reached."""
        return next((seconds for seconds, reached in self.progress if reached >= accuracy), None)


def _check(metrics: Mapping[str, float], series: Mapping[str, Sequence[Sample]]) -> None:
    """Check that each value that a study uses is one that a run can have.

    Raises:
        ValueError: a value is not finite or outside its limits.
    """
    used = [(name, value) for name, value in metrics.items() if name in LIMITS or name.startswith(MEASURED)]
    used += [(name, value) for name, samples in series.items() for _, _, value in samples]
    for name, value in used:
        low, high = LIMITS.get(name, OTHERS)
        if not low <= value <= high:
            raise ValueError(f"{name}={value:g} is not between {low:g} and {high:g}")
