"""Describe the machine of a run, as part of its result. Facts that cannot be read are left out."""

from collections.abc import Mapping
from contextlib import suppress

import psutil

from cifar_exp.system import host
from cifar_exp.system.cpu_quota import usable_cores
from cifar_exp.system.gpu import GIB, gpu_description


def description(accelerator: str, count: int) -> dict[str, str]:
    """The machine as tags: processor, usable cores, memory; GPUs, their limits and links.

    Args:
        accelerator: ``cpu``, ``gpu`` or ``mps``.
        count: number of training GPUs.
    """
    tags = {
        "machine.processor": host.processor(),
        "machine.cores": str(usable_cores()),
        "machine.memory_gib": str(round(psutil.virtual_memory().total / GIB)),
    }
    frequency = _clock_limit()
    if frequency:
        tags["machine.cpu_mhz_max"] = f"{frequency:.0f}"
    if accelerator == "mps":  # part of the processor, and shares its memory
        return tags | {"machine.gpus": tags["machine.processor"]}
    return tags | (gpu_description(count) if accelerator == "gpu" else {})


def in_one_line(tags: Mapping[str, str]) -> str:
    """The machine in one line, from tags of :func:`description`; empty without such tags."""
    facts = {name.removeprefix("machine."): value for name, value in tags.items() if name.startswith("machine.")}
    if "processor" not in facts:
        return ""
    first = f"{facts.pop('processor')}, {facts.pop('cores', '?')} cores, {facts.pop('memory_gib', '?')} GiB"
    return "; ".join([first, *(f"{name.replace('_', ' ')} {value}" for name, value in facts.items())])


def _clock_limit() -> float | None:
    with suppress(Exception):  # psutil passes on errors of the system
        frequency = psutil.cpu_freq()
        return float(frequency.max) or None
    return None
