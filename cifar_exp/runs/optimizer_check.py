"""Check that an optimizer works with plain steps: backward pass, then ``step()`` without a closure."""

import io
import pickle
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from cifar_exp.config.schema import Config
from cifar_exp.errors import ConfigError
from cifar_exp.runs.user_code import OTHER_OPTIMIZER, refusing
from cifar_exp.training.optimizers import Muon

# Not tried, since building one imports torch's compiler, which takes seconds.
PLAIN = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, Muon)
SPECIAL = {"foreach", "fused", "capturable", "differentiable"}


def check_optimizer(config: Config, make: Any, model: nn.Module, lr: float) -> None:
    """Update the network once, from the gradients that it has.

    Raises:
        ConfigError: the optimizer refuses its settings, the gradients, or a step without a closure.
    """
    path, trusted = config.optimizer["_target_"], config.trusted_modules
    target = make.func if isinstance(make, partial) else make
    settings: Mapping[str, Any] = make.keywords if isinstance(make, partial) else {}
    dense = all(value.grad is None or value.grad.layout == torch.strided for value in model.parameters())
    if target in PLAIN and dense and not SPECIAL & settings.keys():
        return
    with refusing(f"optimizer: {path} cannot be sent to the ranks", trusted, "Define it at the top of its module"):
        pickle.dumps(make)
    with refusing(f"optimizer: {path} cannot be built with these settings", trusted, OTHER_OPTIMIZER):
        optimizer: object = make(model.parameters(), lr=lr)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(f"optimizer: {path} returned no torch.optim.Optimizer. {OTHER_OPTIMIZER}")
    with refusing(f"optimizer: {path} fails in a step", trusted, OTHER_OPTIMIZER):
        optimizer.step()
    with refusing(f"optimizer: the state of {path} cannot be saved and loaded", trusted, OTHER_OPTIMIZER):
        stored = io.BytesIO()
        torch.save(optimizer.state_dict(), stored)
        stored.seek(0)
        optimizer.load_state_dict(torch.load(stored, weights_only=True))
