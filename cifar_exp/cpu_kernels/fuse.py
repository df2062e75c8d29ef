"""The only entry to this folder: replace a network's layers by fused ones, if this machine has kernels for them."""

import torch
from torch import nn


def fuse(model: nn.Module, dtype: torch.dtype) -> str | None:
    """Replace layers of ``model`` by fused ones, in place. See :mod:`cifar_exp.cpu_kernels.replace`.

    Args:
        model: on the CPU, channels-last.
        dtype: the dtype of its activations.

    Returns:
        None, or why the model keeps its own layers.
    """
    try:
        from cifar_exp.cpu_kernels.replace import fuse_layers  # needs numba, an optional dependency

        fuse_layers(model, dtype)
    except ModuleNotFoundError as error:
        return f"there is {str(error)[:1].lower()}{str(error)[1:]}: pip install 'cifar-exp[cpu]'"
    except Exception as error:  # numba and LLVM raise exceptions of many types
        return f"{type(error).__name__}: {error}"
    return None


def preload() -> None:
    """Import numba and the kernels in the process that ranks are forked from.

    Raises:
        ImportError: numba is missing. :func:`fuse` reports it in each rank.
    """
    import cifar_exp.cpu_kernels.layers  # noqa: F401
