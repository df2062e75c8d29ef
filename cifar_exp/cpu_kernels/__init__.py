"""Fused layers and Winograd convolutions for CPU ranks. Other folders import `cpu_kernels.fuse` and nothing else."""
