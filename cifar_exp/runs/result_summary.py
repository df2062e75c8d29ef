"""Print a run's results in the terminal."""

from collections.abc import Mapping

from rich.console import Console

from cifar_exp.config.schema import EarlyStoppingSettings
from cifar_exp.distributed.rank_times import by_rank, straggler
from cifar_exp.runs.plan_summary import no_better
from cifar_exp.system import load_watch
from cifar_exp.training.throughput import ENOUGH_BLOCKS


def print_outcome(console: Console, metrics: Mapping[str, float], simulated: bool) -> None:
    """Print accuracy, throughput and the time breakdown, then stragglers and disturbances.

    Args:
        console: the terminal.
        metrics: the last value of each metric.
        simulated: whether the devices are CPU ranks.
    """
    split = {
        name.removeprefix("time_split/"): value for name, value in metrics.items() if name.startswith("time_split/")
    }
    label = " (CPU-simulated devices)" if simulated else ""
    console.print(
        f"test accuracy {metrics['test/accuracy']:.4f} on {metrics['test/count']:,.0f} images, "
        f"steady-state throughput {metrics['steady_images_per_second']:,.0f} images/s{label}{_basis(metrics)}, "
        f"{metrics['time/train_seconds']:.1f} s of training, {metrics['time/total_seconds']:.1f} s in all",
        highlight=False,
    )
    console.print(
        "time: " + ", ".join(f"{name} {value:.1f} s" for name, value in split.items() if value >= 0.05),
        highlight=False,
    )
    if late := straggler(by_rank(metrics)):
        console.print(late, highlight=False)
    for text, share in load_watch.disturbances(metrics).items():
        console.print(f"WARNING, measurement disturbed: {text.format(share)}", highlight=False)


def _basis(metrics: Mapping[str, float]) -> str:
    """The number of steps behind the steady-state throughput, and a mark if they are few."""
    if "steady_steps" not in metrics:
        return ""  # a run of an earlier version
    steps, blocks = int(metrics["steady_steps"]), int(metrics["steady_blocks"])
    counted = f"{blocks} block{'s' * (blocks != 1)} of train.log_every"
    rough = f" in {counted}: rough" if blocks < ENOUGH_BLOCKS else ""
    return f" (over {steps:,} steps{rough})"


def selection(metrics: Mapping[str, float], epochs: int, settings: EarlyStoppingSettings) -> list[str]:
    """Lines about early stopping and the best epoch; empty if neither was configured.

    Args:
        metrics: the last value of each metric.
        epochs: the planned number of epochs.
        settings: patience and the metric that selects the best epoch.
    """
    lines = []
    if "stopped_epoch" in metrics:
        ended = f"after epoch {metrics['stopped_epoch']:.0f} of {epochs}"
        lines.append(f"early stopping: training ended {ended}: {no_better(settings)}")
    if "test/accuracy_best" in metrics:
        lines.append(
            f"best {settings.metric} after epoch {metrics['best_epoch']:.0f}: test accuracy "
            f"{metrics['test/accuracy_best']:.4f} with that epoch's network, saved in model.safetensors"
        )
    return lines
