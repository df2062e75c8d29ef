"""The life of one rank: process set-up, building, warm-up steps, checkpoints, final metrics."""
