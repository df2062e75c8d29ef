"""Sweeps: many runs from one command, one after another or side by side, here or through Slurm; searches."""
