"""The differences between CPUs, NVIDIA GPUs (CUDA) and Apple GPUs (MPS) for training.

The code for MPS follows PyTorch's documentation and source. It has not been run on such a machine.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from cifar_exp.errors import MachineError
from cifar_exp.system import host

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def device_of(accelerator: str, local_rank: int) -> torch.device:
    """The device that a rank trains on.

    Args:
        accelerator: ``cpu``, ``gpu`` or ``mps``.
        local_rank: the number of the rank on this machine, from 0.
    """
    return torch.device("cuda", local_rank) if accelerator == "gpu" else torch.device(accelerator)


def _is_mps(device: torch.device) -> bool:
    return device.type == "mps"


def _is_cuda(device: torch.device) -> bool:
    return device.type == "cuda" and not _is_mps(device)


def exact_device(device: torch.device) -> torch.device:
    """The device for float64 sums over ranks. It is the CPU for MPS, which has no float64 and no gloo support."""
    return torch.device("cpu") if _is_mps(device) else device


def exact(values: Tensor) -> Tensor:
    """``values`` as float64 on :func:`exact_device`; the shape stays."""
    return values.to(exact_device(values.device)).double()


def supports_async_copies(device: torch.device) -> bool:
    """Whether copies from host to device may be asynchronous.

    On MPS host memory is not pinned, so it could be overwritten before the copy has read it.
    """
    return _is_cuda(device)


def layout(device: torch.device) -> torch.memory_format:
    """The memory format of the weights: channels-last, except on MPS, whose convolutions do not gain from it."""
    return torch.contiguous_format if _is_mps(device) else torch.channels_last


def free_bytes(device: torch.device) -> float:
    """Free memory of the device in bytes. Infinite for CPUs, where images are memory-mapped from disk."""
    if _is_cuda(device):
        return float(torch.cuda.mem_get_info(device)[0])
    if _is_mps(device):  # memory is shared with the CPU: the recommended maximum minus this process's share
        return float(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    return float("inf")


def random_state(device: torch.device) -> dict[str, Any]:
    """The RNG states of this process: ``random`` for the CPU and ``device_random`` for a GPU."""
    state = {"random": torch.get_rng_state()}
    return state if device.type == "cpu" else state | {"device_random": _module(device).get_rng_state()}


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Restore the RNG states of :func:`random_state`. Without a state for the device, its RNG is left as it is."""
    torch.set_rng_state(state["random"])
    if device.type != "cpu" and "device_random" in state:
        _module(device).set_rng_state(state["device_random"])


def _module(device: torch.device) -> Any:
    return torch.mps if _is_mps(device) else torch.cuda


def resolve_precision(choice: str, device: torch.device) -> torch.dtype:
    """The dtype for mixed precision. ``auto`` is bfloat16 if the hardware supports it natively, else float32.

    Args:
        choice: ``auto``, ``fp32``, ``bf16`` or ``fp16``.
        device: the device that the rank trains on.
    """
    if choice == "auto":
        choice = "bf16" if _multiplies_bfloat16(device) else "fp32"
    return PRECISIONS[choice]


def _multiplies_bfloat16(device: torch.device) -> bool:
    if _is_mps(device):  # MPS has the type, but its speed has not been measured
        return False
    if _is_cuda(device):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return host.multiplies_bfloat16()


def check_precision(choice: str, accelerator: str) -> None:
    """Check that the accelerator supports the precision, before any rank starts.

    Args:
        choice: ``auto``, ``fp32``, ``bf16`` or ``fp16``.
        accelerator: ``cpu``, ``gpu`` or ``mps``.

    Raises:
        MachineError: bfloat16 on MPS before macOS 14.
    """
    if accelerator == "mps" and choice == "bf16" and not torch.backends.mps.is_macos_or_newer(14, 0):
        raise MachineError(
            "train.precision=bf16: MPS supports bfloat16 from macOS 14 on, and this version is older. "
            "Set train.precision=fp16, or train.precision=fp32"
        )


@contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch computes with one thread in this context, or in the function that it decorates.

    For two images more threads only wait for each other, and for cores that other processes use.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
