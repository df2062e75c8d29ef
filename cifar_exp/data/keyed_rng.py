"""Random generators seeded by a key. Draws from one never affect another."""

import hashlib

import torch


def keyed_generator(*key: int | str) -> torch.Generator:
    """A CPU generator seeded by the whole key, for example ``(seed, "order", epoch)``: the same on every rank."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
