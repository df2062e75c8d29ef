"""The door of this folder: replace a network's layers by fused ones where this machine has kernels for them."""

import torch
from torch import nn


def fuse_layers(model: nn.Module, precision: torch.dtype) -> str:
    """Give ``model`` fused layers, in place; else say why it keeps its own: :mod:`cifar_exp.cpu_kernels.layers`."""
    try:
        from cifar_exp.cpu_kernels.replace import fused  # needs numba, which is an extra

        fused(model, precision)
    except ModuleNotFoundError as error:
        return f"there is {str(error)[:1].lower()}{str(error)[1:]}: pip install 'cifar-exp[cpu]'"
    except Exception as error:  # numba and LLVM have many
        return f"{type(error).__name__}: {error}"
    return ""
