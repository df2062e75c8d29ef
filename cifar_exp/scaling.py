"""From measured runs to speedup over device counts: pure arithmetic, no store and no plots."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

NOT_GROUPING = ("devices.count", "seed")  # the axis of the study, and its repeats


@dataclass(frozen=True)
class RunResult:
    """What one finished run contributes to a scaling study.

    Attributes:
        devices: number of ranks that trained.
        global_batch_size: images a step over all ranks.
        images_per_second: steady-state training rate over all ranks.
        train_seconds: time spent training, evaluation excluded.
        test_accuracy: 0 to 1.
    """

    devices: int
    global_batch_size: int
    images_per_second: float
    train_seconds: float
    test_accuracy: float

    @classmethod
    def of(cls, metrics: Mapping[str, float]) -> "RunResult":
        """From the last values of a finished run's metrics."""
        return cls(
            devices=int(metrics["devices"]),
            global_batch_size=int(metrics["global_batch_size"]),
            images_per_second=metrics["steady_images_per_second"],
            train_seconds=metrics["time/train_seconds"],
            test_accuracy=metrics["test/accuracy"],
        )


@dataclass(frozen=True)
class SpeedupRow:
    """Medians over the repeats at one device count, beside the smallest count of the group.

    Attributes:
        devices: number of ranks.
        repeats: runs behind the medians.
        global_batch_size: images a step over all ranks.
        images_per_second: median steady-state rate.
        speedup: rate over that of the smallest count in the group.
        efficiency: speedup over the ratio of the device counts.
        train_seconds: median training time.
        time_ratio: training time of the smallest count over this one's.
        test_accuracy: median, 0 to 1.
    """

    devices: int
    repeats: int
    global_batch_size: int
    images_per_second: float
    speedup: float
    efficiency: float
    train_seconds: float
    time_ratio: float
    test_accuracy: float


def speedup_rows(results: Sequence[RunResult]) -> list[SpeedupRow]:
    """One row a device count, in ascending order, against the smallest count in ``results``."""
    counts = sorted({result.devices for result in results})
    rows: list[SpeedupRow] = []
    for count in counts:
        repeats = [result for result in results if result.devices == count]
        rate = median(result.images_per_second for result in repeats)
        seconds = median(result.train_seconds for result in repeats)
        first = rows[0] if rows else None
        speedup = rate / first.images_per_second if first else 1.0
        rows.append(
            SpeedupRow(
                devices=count,
                repeats=len(repeats),
                global_batch_size=repeats[0].global_batch_size,
                images_per_second=rate,
                speedup=speedup,
                efficiency=speedup * counts[0] / count,
                train_seconds=seconds,
                time_ratio=first.train_seconds / seconds if first else 1.0,
                test_accuracy=median(result.test_accuracy for result in repeats),
            )
        )
    return rows


def grouped(overrides: Sequence[Sequence[str]]) -> list[str]:
    """The group of each job of a sweep: the values that tell it apart, but for its device count and its seed.

    Args:
        overrides: the overrides of each job, as in ``["train.scaling=strong", "devices.count=2", "seed=0"]``.

    Returns:
        A name for each job, such as ``strong``; empty where nothing else differs.
    """
    rest = [
        [override for override in job if override.split("=")[0].lstrip("+") not in NOT_GROUPING] for job in overrides
    ]
    common = set.intersection(*(set(job) for job in rest)) if rest else set()
    return [" ".join(override.partition("=")[2] for override in job if override not in common) for job in rest]
