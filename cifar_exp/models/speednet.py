"""A network that trains in few epochs: a fixed whitening layer, few convolutions, early pooling.

The architecture is that of airbench94 (Jordan 2024, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU",
arXiv:2404.00498).
"""

from typing import Annotated

import torch
from annotated_types import Gt, Le
from torch import Tensor, nn

from cifar_exp.models.networks import Count
from cifar_exp.system.accelerator import exact

PATCH_SIDE = 2  # pixels: kernel size of the first layer
# Times the mean variance, added to each variance: keeps directions of tiny variance from being amplified (airbench).
SMALLEST_VARIANCE = 5e-4


class Whitening(nn.Conv2d):
    """Decorrelates patches. The outputs are a patch's principal components, scaled to unit variance, and their
    negatives.

    The weights are computed from training images and not trained. Learning them would use up many of the few steps
    (Page 2019, "How to Train Your ResNet", part 8).
    """

    def __init__(self, side: int = PATCH_SIDE) -> None:
        super().__init__(3, 2 * 3 * side**2, side, bias=False)
        self.weight.requires_grad_(False)

    def initialize_from(self, images: Tensor) -> None:
        """Compute the weights. ``images``: (N, 3, H, W) float32, normalized training images."""
        patches = exact(patches_of(images, self.kernel_size[0]))
        variances, axes = torch.linalg.eigh(patches.T @ patches / len(patches))
        scales = (variances + SMALLEST_VARIANCE * variances.mean()).rsqrt()
        components = (axes * scales).T.reshape(-1, *self.weight.shape[1:])
        with torch.no_grad():
            self.weight.copy_(
                torch.cat([components, -components]).to(self.weight.dtype)
            )  # both signs, since a nonlinearity follows


class GlobalMaxPool(nn.Module):
    """Global max-pooling: (N, C, H, W) -> (N, C, 1).

    It replaces ``nn.AdaptiveMaxPool2d``, whose gradient is not deterministic on a GPU (``train.deterministic=true``).
    """

    def forward(self, images: Tensor) -> Tensor:
        """``images``: (N, C, H, W) -> (N, C, 1)."""
        return images.flatten(2).max(2, keepdim=True).values


def patches_of(images: Tensor, side: int) -> Tensor:
    """All ``side`` x ``side`` patches: (N, 3, H, W) -> (N * places, 3 * side * side), laid out as kernels are."""
    patches = images.unfold(2, side, 1).unfold(3, side, 1)
    return patches.permute(0, 2, 3, 1, 4, 5).reshape(-1, images.shape[1] * side**2)


def speednet(
    *,
    num_classes: int,
    widths: tuple[Count, Count, Count],
    depth: Count,
    whitening: bool,
    batch_norm_momentum: Annotated[float, Gt(0), Le(1)],
    logit_scale: Annotated[float, Gt(0)],
) -> nn.Sequential:
    """Whitening of 2x2 patches, three blocks of ``depth`` x (3x3 convolution, batch norm, GELU), the classifier.

    2x2 max-pooling follows the first convolution of each block. Global max-pooling follows the last block, so images
    may have any size from 16 pixels. Convolutions start as the identity on their first channels. Batch norm has a bias
    but no weight. The classifier has no bias.

    Args:
        num_classes: number of labels.
        widths: channels of the three blocks.
        depth: convolutions per block.
        whitening: whether the first layer is a fixed whitening layer; otherwise it is trained like the others.
        batch_norm_momentum: weight of a batch in the running statistics; 0.1 is too slow for 200 steps.
        logit_scale: standard deviation of the classifier's initial weights.
    """
    first = Whitening() if whitening else nn.Conv2d(3, 6 * PATCH_SIDE**2, PATCH_SIDE, bias=False)
    layers: list[nn.Module] = [first, nn.GELU()]
    channels = first.out_channels
    for width in widths:
        for place in range(depth):
            convolution = nn.Conv2d(channels, width, 3, padding=1, bias=False)
            nn.init.dirac_(convolution.weight[:channels])  # the other filters stay random
            pooling = [nn.MaxPool2d(2)] if place == 0 else []
            norm = nn.BatchNorm2d(width, momentum=batch_norm_momentum)
            norm.weight.requires_grad_(False)
            layers += [convolution, *pooling, norm, nn.GELU()]
            channels = width
    classifier = nn.Linear(channels, num_classes, bias=False)
    nn.init.normal_(classifier.weight, std=logit_scale)
    return nn.Sequential(*layers, GlobalMaxPool(), nn.Flatten(), classifier)
