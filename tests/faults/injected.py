"""`_target_`s for the suite's runs that inject faults inside a process.

An environment variable has the plan. The configuration does not, so that a resumed run has the same settings and the
same config hash:

``{"point": ..., "rank": 0, "number": 3, "do": ...}`` and, for all ranks, ``{"pace": seconds per step}``.

Points: ``train`` and ``evaluation``, the number-th such forward pass; ``load``, before the images are generated;
``fsync``, ``replace`` and ``unlink``, the number-th such call for a file that matches ``file`` during a save.
"""

import ctypes
import itertools
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

PLAN = "CIFAR_EXP_FAULT_PLAN"
ANNOUNCED = "announced"  # file, created in the current folder at the planned point
HURRY = "hurry"  # file: once it exists, steps are no longer slowed down
PAUSE = 3.0  # seconds that a process waits at the point
SAVING = ("fsync", "replace", "unlink")

Act = Callable[[Any], Any]  # takes the value at the point; may return a replacement


def model(*, num_classes: int, width: int = 4, depth: int = 1) -> Any:
    """The reference network with the planned fault."""
    from torch import nn

    from cifar_exp.models.networks import convnet

    network = convnet(num_classes=num_classes, width=width, depth=depth)
    plan = _plan()
    rank = os.environ.get("RANK")
    if rank is None:  # the parent only inspects the network
        return network
    if pace := plan.get("pace"):

        def slow(module: nn.Module, _images: Any) -> None:
            if module.training and not Path(HURRY).exists():
                time.sleep(pace)

        network.register_forward_pre_hook(slow)
    if plan.get("rank", 0) != int(rank):
        return network
    if plan.get("point") in SAVING:
        _during_saves(plan)
    elif plan.get("point") in ("train", "evaluation"):
        counted, act = itertools.count(1), _action(plan)

        def strike(module: nn.Module, _images: Any, logits: Any) -> Any:
            wanted = module.training == (plan["point"] == "train")
            return act(logits) if wanted and next(counted) == plan["number"] else None

        network.register_forward_hook(strike)
    return network


def synthetic(root: str, **settings: Any) -> Any:
    """The synthetic images, after the planned fault."""
    from cifar_exp.data import synthetic

    plan = _plan()
    if plan.get("point") == "load":
        _action(plan)(None)
    return synthetic.synthetic(root, **settings)


def _plan() -> dict[str, Any]:
    plan: dict[str, Any] = json.loads(os.environ.get(PLAN, "{}"))
    return plan


def _action(plan: dict[str, Any]) -> Act:
    return {
        "kill": lambda _: os.kill(os.getpid(), signal.SIGKILL),
        "exit": lambda _: os._exit(0),
        "segfault": lambda _: ctypes.string_at(0),
        "abort": lambda _: os.abort(),
        "raise": _raise,
        "memory": lambda _: bytearray(1 << 62),
        "nan": lambda logits: logits * float("nan"),
        "inf": lambda logits: logits + float("inf"),
        "hang": lambda _: time.sleep(10_000),
        "announce": _announce,
        "cut": _cut_and_kill,
    }[plan["do"]]


def _raise(_: Any) -> None:
    raise RuntimeError("the flux capacitor is empty")


def _announce(_: Any) -> None:
    Path(ANNOUNCED).touch()
    time.sleep(PAUSE)


def _cut_and_kill(descriptor: int) -> None:
    """Leave half of the file, as a kill during the write would."""
    os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
    os.kill(os.getpid(), signal.SIGKILL)


def _during_saves(plan: dict[str, Any]) -> None:
    """Patch ``os`` so that the saving thread acts before the planned call."""
    call, counted, act = plan["point"], itertools.count(1), _action(plan)
    original = getattr(os, call)

    def patched(what: Any, *others: Any, **named: Any) -> Any:
        path = Path(f"/proc/self/fd/{what}").readlink() if call == "fsync" else Path(what)
        saving = threading.current_thread().name.startswith("checkpoint")
        if saving and path.exists() and fnmatch(path.name, plan["file"]) and next(counted) == plan["number"]:
            act(what)
        return original(what, *others, **named)

    setattr(os, call, patched)
