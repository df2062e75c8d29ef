"""Print a run's plan and its network in the terminal."""

import math
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table
from torch import nn

from cifar_exp.config.schema import EarlyStoppingSettings
from cifar_exp.data.batches import EVALUATION_BATCH, scaled_size, shard
from cifar_exp.data.dataset_files import DatasetFiles
from cifar_exp.launch.devices import DeviceSet
from cifar_exp.models.build import parameter_count
from cifar_exp.runs.model_check import layer_shapes
from cifar_exp.system.bugs import described
from cifar_exp.training.plan import Plan


def describe_plan(
    plan: Plan, devices: DeviceSet, data: DatasetFiles, model: nn.Module, stopping: EarlyStoppingSettings
) -> dict[str, str]:
    """The plan as name -> text, for the terminal and the run's page."""
    rates = ", ".join(
        f"epoch {first}{f'-{last}' if last > first else ''}: {_moving(turns)}"
        for first, last, turns in _shortened(plan.learning_rate_ranges())
    )
    each = f"{plan.accumulate} micro-batches of " if plan.accumulate > 1 else ""
    return {
        "devices": str(devices),
        "batch": f"{each}{plan.per_device_batch_size} per device, {plan.global_batch_size} in all",
        "training images": f"{data.train_count:,} in {len(data.classes)} classes{_held_out(data)}",
        "steps per epoch": f"{plan.steps_per_epoch} ({plan.dropped_images} images dropped)",
        "epochs": f"{plan.epochs} ({plan.steps:,} steps)",
        "learning rate": rates,
        **_image_sizes(plan, data),
        **_validation(plan, data),
        **_early_stopping(stopping),
        "parameters": f"{parameter_count(model):,}",
    }


def print_plan(console: Console, plan: Mapping[str, str]) -> None:
    """Print the plan as a table."""
    table = Table(title="Plan", title_justify="left", show_header=False)
    for name, text in plan.items():
        table.add_row(name, text)
    console.print(table)


def print_layers(console: Console, model: nn.Module, image_size: tuple[int, int]) -> None:
    """Print the network as a table with a row for each layer.

    Args:
        console: the terminal.
        model: the network.
        image_size: height and width in pixels.
    """
    layers = Table("layer", "output shape", title="Network", title_justify="left")
    layers.add_column("parameters", justify="right")
    try:
        shapes = layer_shapes(model, image_size)
    except Exception as error:  # the network works, but torchinfo cannot list its layers
        console.print(f"the layers cannot be listed: {described(error)}", highlight=False)
        return
    for name, shape, count in shapes:
        layers.add_row(name, " x ".join(map(str, shape)), f"{count:,}" if count else "")
    console.print(layers)


def _image_sizes(plan: Plan, data: DatasetFiles) -> dict[str, str]:
    """The row for progressive resizing; none if all epochs use the full size."""
    if set(plan.image_scales) == {1.0}:
        return {}
    sizes = [scaled_size(data.image_size, scale) for scale in plan.image_scales]
    text = ", ".join(f"{height} x {width}" for height, width in sizes)
    return {"image sizes": f"{text} by epoch; the last also in evaluation"}


def _held_out(data: DatasetFiles) -> str:
    return f" ({data.validation_count:,} in the validation split)" if data.validation_count else ""


def _validation(plan: Plan, data: DatasetFiles) -> dict[str, str]:
    if not data.validation_count:
        return {"validation": f"{data.test_count:,} test images after each epoch, {_steps(data.test_count, plan)}"}
    count = data.validation_count
    return {
        "validation": f"{count:,} training images after each epoch, {_steps(count, plan)}",
        "test": f"{data.test_count:,} images at the end, {_steps(data.test_count, plan)}",
    }


def _early_stopping(settings: EarlyStoppingSettings) -> dict[str, str]:
    return {"early stopping": f"after {no_better(settings)}"} if settings.patience else {}


def no_better(settings: EarlyStoppingSettings) -> str:
    """Such as ``3 epochs in a row without a lower val/loss``."""
    epochs = f"{settings.patience} epoch{'s'[: settings.patience != 1]} in a row"
    better = "lower" if settings.metric == "val/loss" else "higher"
    margin = f" (by more than {settings.min_delta:g})" if settings.min_delta else ""
    return f"{epochs} without a {better} {settings.metric}{margin}"


def _steps(count: int, plan: Plan) -> str:
    steps = math.ceil(len(shard(count, plan.world_size - 1, plan.world_size)) / EVALUATION_BATCH)
    return f"{steps} step{'s'[: steps > 1]} of up to {EVALUATION_BATCH} per rank"


def _moving(rates: Sequence[float]) -> str:
    """Such as ``0.05 to 0.04177``; rates with the same text are listed once."""
    texts = [f"{rate:.4g}" for rate in rates]
    return " to ".join(text for place, text in enumerate(texts) if not place or text != texts[place - 1])


def _shortened(ranges: list[tuple[int, int, tuple[float, ...]]]) -> list[tuple[int, int, tuple[float, ...]]]:
    """All ranges if there are up to six; else the first, the middle and the last one."""
    return ranges if len(ranges) <= 6 else [ranges[0], ranges[len(ranges) // 2], ranges[-1]]
