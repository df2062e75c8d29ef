"""Digests of the images and parameters that ranks compare: sha256 of each image with its label."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cifar_exp.data.sources import ForwardingSource

DIGEST_BYTES = 32  # of sha256

Parameters = dict[str, Tensor]  # by name, on the host


def digests(images: Tensor, labels: Tensor) -> Tensor:
    """sha256 of each image's values and its label: (B, 3, H, W) of any type, (B,) int64 -> (B, 32) uint8."""
    pixels = images.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    found = []
    for image, label in zip(pixels, labels.cpu().numpy(), strict=True):
        digest = hashlib.sha256(image)
        digest.update(label.tobytes())
        found.append(digest.digest())
    return torch.frombuffer(bytearray(b"".join(found)), dtype=torch.uint8).view(-1, DIGEST_BYTES)


def parameter_digest(parameters: Parameters) -> str:
    """sha256 in hex of all values, in order."""
    digest = hashlib.sha256()
    for value in parameters.values():
        digest.update(value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def joined(parts: Sequence[Tensor]) -> Tensor:
    """(B, 32) each -> (all, 32)."""
    return torch.cat([torch.empty(0, DIGEST_BYTES, dtype=torch.uint8), *parts])


@dataclass(frozen=True)
class HashingSource(ForwardingSource):
    """A source that hashes every batch it delivers.

    Attributes:
        taken: digests of each batch, (B, 32) uint8.
    """

    taken: list[Tensor] = field(default_factory=list)

    def pick(self, draw: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        images, labels = self.source.pick(draw)
        self.taken.append(digests(images, labels))
        return images, labels
