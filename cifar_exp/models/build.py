"""Build a network from its factory: initial weights from a seed, or from training images."""

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn


class ModelFactory(Protocol):
    """A `_target_` of ``conf/model`` with its settings bound."""

    def __call__(self, *, num_classes: int) -> nn.Module: ...


@runtime_checkable
class InitializedFromImages(Protocol):
    """A layer that computes its initial values from training images, once before training."""

    def initialize_from(self, images: Tensor) -> None:
        """``images``: (N, 3, H, W) float32, the network's input."""
        ...


def parameter_count(model: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def seeded(factory: ModelFactory, num_classes: int, seed: int) -> nn.Module:
    """Build the network with initial weights drawn from ``seed``, without an effect on torch's own generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return factory(num_classes=num_classes)


def initialize_from_images(model: nn.Module, images: Tensor) -> None:
    """Initialize the layers that are :class:`InitializedFromImages`. ``images``: (N, 3, H, W) float32."""
    for module in model.modules():
        if isinstance(module, InitializedFromImages):
            module.initialize_from(images)
