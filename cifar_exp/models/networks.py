"""Functions that build networks from ``width``, ``depth`` and ``num_classes``. They take images (N, 3, H, W) float."""

from collections import OrderedDict
from typing import Annotated

from annotated_types import Ge
from torch import Tensor, nn
from torch.nn import functional as F

Count = Annotated[int, Ge(1)]


def convnet(*, num_classes: int, width: Count, depth: Count) -> nn.Sequential:
    """The reference network: three blocks of ``depth`` x (3x3 convolution, batch norm, ReLU).

    The blocks have ``width``, 2 ``width`` and 4 ``width`` channels. 2x2 max-pooling follows the first two blocks.
    Global average pooling (over 8x8 pixels for 32x32 images) and a linear classifier follow the third. Weights are
    Glorot uniform and biases zero, as in MATLAB. 677,610 parameters at width 32, depth 4, 10 classes.

    Source: MathWorks example "Train Network Using Automatic Multi-GPU Support".
    """
    layers: list[nn.Module] = []
    channels = 3
    for block, out_channels in enumerate((width, 2 * width, 4 * width)):
        for _ in range(depth):
            layers += [nn.Conv2d(channels, out_channels, 3, padding="same"), nn.BatchNorm2d(out_channels), nn.ReLU()]
            channels = out_channels
        if block < 2:
            layers.append(nn.MaxPool2d(2))
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes)]
    network = nn.Sequential(*layers)
    network.apply(_glorot)
    return network


def _glorot(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def resnet(*, num_classes: int, width: Count, depth: Count) -> nn.Sequential:
    """Residual network for small images: three stages of ``depth`` blocks with w, 2w and 4w channels.

    ``depth`` 3, 5, 9 at width 16 are ResNet-20, -32 and -56 of He et al. 2016 (arXiv:1512.03385, section 4.2), with
    projections instead of zero-padded shortcuts (option B there).
    """
    stages: list[tuple[str, nn.Module]] = [
        ("stem", nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()))
    ]
    channels = width
    for stage, out_channels in enumerate((width, 2 * width, 4 * width)):
        blocks = []
        for block in range(depth):
            stride = 2 if stage > 0 and block == 0 else 1
            blocks.append(ResidualBlock(channels, out_channels, stride))
            channels = out_channels
        stages.append((f"stage{stage + 1}", nn.Sequential(*blocks)))
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))
    network = nn.Sequential(OrderedDict([*stages, ("head", head)]))
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return network


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, inputs: Tensor) -> Tensor:
        """``inputs``: (N, in_channels, H, W) -> (N, out_channels, H / stride, W / stride)."""
        hidden = F.relu(self.norm1(self.conv1(inputs)))
        outputs: Tensor = F.relu(self.norm2(self.conv2(hidden)) + self.shortcut(inputs))
        return outputs
