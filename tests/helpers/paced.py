"""A long run that leaves the CPU to other tests: each training step sleeps first."""

import time
from typing import Any

from torch import nn

from cifar_exp.models.networks import convnet
from tests.conftest import TINY

PAUSE = 0.05  # seconds
PACED = ["train.epochs=100000", "trusted_modules=[tests]", "model._target_=tests.helpers.paced.network"]
ENDLESS = [*(word for word in TINY if not word.startswith("train.epochs")), *PACED]


def network(num_classes: int, **settings: Any) -> nn.Module:
    """``convnet``, slowed down."""
    made = convnet(num_classes=num_classes, **settings)
    made.register_forward_pre_hook(_pause)
    return made


def _pause(model: nn.Module, _inputs: object) -> None:
    if model.training:
        time.sleep(PAUSE)
