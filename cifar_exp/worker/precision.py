"""The dtype that a device trains in."""

from pathlib import Path

import torch


def resolve_precision(choice: str, device: torch.device) -> torch.dtype:
    """The dtype of ``train.precision``. ``auto``: bfloat16 if the hardware multiplies it natively, else float32."""
    if choice == "auto":
        choice = "bf16" if _has_bf16(device) else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[choice]


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False
    return any(flag in flags for flag in ("avx512_bf16", "amx_bf16", "bf16"))
