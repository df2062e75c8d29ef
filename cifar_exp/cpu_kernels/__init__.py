"""Fused layers and Winograd convolutions for CPU ranks. Import `fuse` and nothing else."""
