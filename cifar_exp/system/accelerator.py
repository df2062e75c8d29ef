"""What CPUs, NVIDIA's GPUs (CUDA) and Apple's (MPS) differ in while a network is trained on them.

What is said of MPS follows PyTorch's documentation and source: nobody has run it here on such a machine.
"""

from typing import Any

import torch
from torch import Tensor

from cifar_exp.errors import MachineError
from cifar_exp.system import host

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def device_of(accelerator: str, local_rank: int) -> torch.device:
    """Where a rank trains. ``accelerator``: ``cpu``, ``gpu`` or ``mps``."""
    return torch.device("cuda", local_rank) if accelerator == "gpu" else torch.device(accelerator)


def _is_mps(device: torch.device) -> bool:
    return device.type == "mps"


def _is_cuda(device: torch.device) -> bool:
    return device.type == "cuda" and not _is_mps(device)


def exact_device(device: torch.device) -> torch.device:
    """Where float64 is kept and added up over ranks: MPS has no such type, and gloo cannot read its memory."""
    return torch.device("cpu") if _is_mps(device) else device


def exact(values: Tensor) -> Tensor:
    """The same values as float64, where those of their device are kept."""
    return values.to(exact_device(values.device)).double()


def takes_copies_meanwhile(device: torch.device) -> bool:
    """Whether a copy from the host may still be on its way when the host goes on.

    On MPS the host's memory, which is not pinned there, may be used for something else before it was read.
    """
    return _is_cuda(device)


def layout(device: torch.device) -> torch.memory_format:
    """How weights lie: channels-last, but on MPS, whose convolutions gain nothing by that."""
    return torch.contiguous_format if _is_mps(device) else torch.channels_last


def free_bytes(device: torch.device) -> float:
    """Memory that a rank may still take there; infinite on CPUs, where images are mapped from disk."""
    if _is_cuda(device):
        return float(torch.cuda.mem_get_info(device)[0])
    if _is_mps(device):  # shared with the processor: what is recommended, less what this process has
        return float(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    return float("inf")


def random_state(device: torch.device) -> dict[str, Any]:
    """Where the random numbers of this process are, those of its device included."""
    state = {"random": torch.get_rng_state()}
    return state if device.type == "cpu" else state | {"device_random": _module(device).get_rng_state()}


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Go on from where :func:`random_state` was; on a device of another kind, from its own beginning."""
    torch.set_rng_state(state["random"])
    if device.type != "cpu" and "device_random" in state:
        _module(device).set_rng_state(state["device_random"])


def _module(device: torch.device) -> Any:
    return torch.mps if _is_mps(device) else torch.cuda


def resolve_precision(choice: str, device: torch.device) -> torch.dtype:
    """``auto`` is bfloat16 where the hardware multiplies it natively, else float32."""
    if choice == "auto":
        choice = "bf16" if _multiplies_bfloat16(device) else "fp32"
    return PRECISIONS[choice]


def _multiplies_bfloat16(device: torch.device) -> bool:
    if _is_mps(device):  # it has the type, and nobody has measured whether it is faster
        return False
    if _is_cuda(device):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return host.multiplies_bfloat16()


def check_precision(choice: str, accelerator: str) -> None:
    """Refuse a type that the accelerator does not have, before anything is started.

    Raises:
        MachineError: for bfloat16 on MPS before macOS 14.
    """
    if accelerator == "mps" and choice == "bf16" and not torch.backends.mps.is_macos_or_newer(14, 0):
        raise MachineError(
            "train.precision=bf16: MPS computes in bfloat16 from macOS 14 on, and this is an older one. "
            "Set train.precision=fp16, or train.precision=fp32"
        )
