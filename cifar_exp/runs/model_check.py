"""Check the network in the parent process, before the ranks build it."""

import torch
import torchinfo
from torch import nn

from cifar_exp.config.schema import Config
from cifar_exp.data.batches import scaled_size
from cifar_exp.errors import ConfigError
from cifar_exp.models.build import seeded
from cifar_exp.runs.components import Components
from cifar_exp.training.plan import Plan


def layer_shapes(model: nn.Module, image_size: tuple[int, int]) -> list[tuple[str, tuple[int, ...], int]]:
    """Run the network on two black images and list its layers.

    Args:
        model: the network.
        image_size: height and width in pixels.

    Returns:
        For each layer its type, its output shape without the batch dimension, and its number of parameters.

    Raises:
        ConfigError: the network fails on images of this size.
    """
    batch = torch.zeros(2, 3, *image_size)
    try:
        summary = torchinfo.summary(model, input_data=batch, verbose=0, mode="eval", depth=10)
    except RuntimeError as error:
        shape = " x ".join(map(str, batch.shape))
        raise ConfigError(f"model: it fails on {shape} images: {error.__cause__ or error}") from error
    leaves = [layer for layer in summary.summary_list if layer.is_leaf_layer]
    return [(layer.class_name, tuple(layer.output_size[1:]), layer.num_params) for layer in leaves]


def checked_model(config: Config, components: Components, num_classes: int) -> nn.Module:
    """Build the network.

    Raises:
        ConfigError: the network rejects its settings.
    """
    try:
        return seeded(components.make_model, num_classes, config.seed)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model: {config.model['_target_']} cannot be built: {error}") from error


def check_scales(plan: Plan, model: nn.Module, image_size: tuple[int, int]) -> None:
    """Check that the network accepts the smaller images of progressive resizing.

    Raises:
        ConfigError: the images of some epoch are too small for it.
    """
    for scale in sorted({*plan.image_scales} - {1.0}):
        try:
            layer_shapes(model, scaled_size(image_size, scale))
        except ConfigError as error:
            raise ConfigError(
                f"train.image_scales: at scale {scale:g} the images are too small for this network. Set larger "
                f"scales, as in train.image_scales=[0.5,0.75,1]. {error}"
            ) from error
