"""oneDNN computes the other layers; it could silently fall back to a slow reference implementation."""

import subprocess
import sys

import pytest
import torch

from cifar_exp.system.accelerator import resolve_precision
from cifar_exp.system.host import own_cores
from tests.conftest import environment

STEP = """
import torch
from torch.nn import functional as F
from cifar_exp.models.networks import convnet
from tests.helpers.defaults import with_defaults
from cifar_exp.models.build import seeded
from cifar_exp.training.evaluation import autocast

torch.set_num_threads(1)
model = seeded(with_defaults(convnet), 10, 0).to(memory_format=torch.channels_last)
images = torch.randn(8, 3, 32, 32).to(memory_format=torch.channels_last)
with autocast(torch.device("cpu"), {precision}):
    loss = F.cross_entropy(model(images).float(), torch.arange(8))
loss.backward()
"""
NATIVE = resolve_precision("auto", torch.device("cpu"))


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
@pytest.mark.parametrize("precision", sorted({torch.float32, NATIVE}, key=str), ids=str)
def test_no_convolution_of_the_step_runs_on_a_reference_kernel(precision: torch.dtype) -> None:
    done = subprocess.run(
        [sys.executable, "-c", STEP.format(precision=precision)],
        env=environment() | {"ONEDNN_VERBOSE": "1", "OMP_NUM_THREADS": str(len(own_cores()))},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    fields = [line.split(",") for line in done.stdout.splitlines() if line.startswith("onednn_verbose")]
    convolutions = [line for line in fields if "exec" in line and "convolution" in line]
    kinds = [line[line.index("convolution") + 2] for line in convolutions]
    # Twelve layers; the first needs no gradient of its input.
    assert kinds.count("forward_training") == 12
    assert kinds.count("backward_weights") == 12
    assert kinds.count("backward_data") == 11
    kernels = {line[line.index("convolution") + 1] for line in convolutions}
    assert not {kernel for kernel in kernels if "ref" in kernel}, kernels
