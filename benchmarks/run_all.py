"""Run all benchmarks in turn, each in its own process. They print tables and write ``results/<name>.json``.

If there is a GPU, it is measured to ``results/<name>-gpu.json``, and benchmarks of CPUs do not see it.
"""

import argparse
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import torch

FOLDER = Path(__file__).parent
BENCHMARKS = {
    "overhead": "our loop against a bare one",
    "evaluation": "test pass against training",
    "kernels": "where a step's time goes",
    "compiled": "the compiled step against the eager one",
    "avx2": "fused layers on a processor without AVX512, emulated",
    "data": "our data path against torchvision's",
    "peers": "an epoch against Lightning, accelerate, plain PyTorch",
    "scaling": "two ranks against bare DDP and independent processes",
    "startup": "command to first step against a bare launch",
    "tracking": "a step beside the parent that feeds MLflow, or a server that hangs",
    "memory": "of ranks, and its growth",
    "time_to_accuracy": "the speed recipe against the plain loop",
    "recipes": "the reference recipe and the one for 94 % on a GPU",
}
NEEDS = {"peers": ("lightning", "accelerate")}
FOR_CPUS = ("scaling", "startup", "tracking", "time_to_accuracy")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS), metavar="NAME")
    parser.add_argument("--quick", action="store_true", help="one pair of each: does everything run?")
    options = parser.parse_args()
    outcomes = {name: outcome(name, ["--pairs", "1"] if options.quick else []) for name in options.only}
    print("\n" + "\n".join(f"{name:<18} {what}" for name, what in outcomes.items()))
    return int(any(what.startswith("FAILED") for what in outcomes.values()))


def outcome(name: str, options: list[str]) -> str:
    """Run one benchmark. Returns a short text about its outcome."""
    missing = [package for package in NEEDS.get(name, ()) if find_spec(package) is None]
    if missing:
        return f"left out: {', '.join(missing)} not installed (uv run --group bench)"
    if name == "recipes" and not torch.cuda.is_available():
        return "left out: there is no GPU"
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if name in FOR_CPUS else {})
    print(f"\n=== {name}: {BENCHMARKS[name]}", flush=True)
    began = time.perf_counter()
    code = subprocess.run([sys.executable, FOLDER / f"{name}.py", *options], env=environment, check=False).returncode
    seconds = time.perf_counter() - began
    return f"FAILED with {code} after {seconds:.0f} s" if code else f"done in {seconds:.0f} s"


if __name__ == "__main__":
    sys.exit(main())
