"""Evaluation of images and of their mirror images."""

import torch
from torch import nn

from cifar_exp.training.evaluation import Mirrored


def test_mirrored_logits_are_the_mean_over_the_image_and_its_mirror_image() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 8, 5))
    images = torch.randn(7, 3, 8, 10)
    mirrored = torch.stack([torch.stack([row.flip(-1) for row in image.unbind(1)], 1) for image in images])
    expected = (network(images) + network(mirrored)) / 2
    torch.testing.assert_close(Mirrored(network)(images), expected)
    torch.testing.assert_close(Mirrored(network)(mirrored), expected)
    assert (network(images) - expected).abs().max() > 0.1
