"""Training in plain PyTorch: the loop, its step, evaluation, optimizers, schedules and metrics."""
