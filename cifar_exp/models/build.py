"""Build a network from its factory: initial weights from a seed, or from training images."""

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy


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


def seeded(factory: ModelFactory, num_classes: int, seed: int, image_size: tuple[int, int] | None = None) -> nn.Module:
    """Build the network with initial weights drawn from ``seed``. torch's global generator is not affected.

    ``image_size``: height and width, from which lazy layers get their shapes; None: lazy layers stay uninitialized.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = factory(num_classes=num_classes)
        if image_size and isinstance(model, nn.Module) and _is_lazy(model):
            was_training = model.training
            with torch.no_grad():
                model.eval()(torch.zeros(2, 3, *image_size))
            model.train(was_training)
        return model


def _is_lazy(model: nn.Module) -> bool:
    return any(is_lazy(tensor) for tensor in (*model.parameters(), *model.buffers()))


def arrange(model: nn.Module, memory_format: torch.memory_format) -> nn.Module:
    """Set the memory format of 2-D convolution weights. ``Module.to`` would fail for 3-D convolutions."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dim() == 4:
            tensor.data = tensor.data.to(memory_format=memory_format)
    return model


def initialize_from_images(model: nn.Module, images: Tensor) -> None:
    """Initialize the layers that are :class:`InitializedFromImages`. ``images``: (N, 3, H, W) float32."""
    for module in model.modules():
        if isinstance(module, InitializedFromImages):
            module.initialize_from(images)


class _Layers(nn.Sequential):
    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = super().forward(images)  # type: ignore[no-untyped-call]
        return scores


def compile_in_place(model: nn.Module) -> None:
    """Call ``model.compile()``. Before torch 2.14 it skips an ``nn.Sequential``, whose ``forward`` is PyTorch's own."""
    if type(model) is nn.Sequential:
        model.__class__ = _Layers
    model.compile()
