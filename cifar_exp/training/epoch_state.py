"""An unfinished epoch: its sums and times, and the state with which each rank resumes in the middle of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from cifar_exp.config.schema import BatchNorm
from cifar_exp.data.batches import TrainBatches
from cifar_exp.distributed import batch_norm
from cifar_exp.distributed.collectives import all_gather_objects
from cifar_exp.system.accelerator import exact_device, random_state, set_random_state
from cifar_exp.training.metrics import completed, no_sums
from cifar_exp.training.stopwatch import Stopwatch


@dataclass
class EpochState:
    """The progress of the current epoch.

    Attributes:
        sums: (metrics,) float64: the sums of the metrics so far, over all ranks, without the steps since the last
            multiple of ``train.log_every``.
        steps: completed steps of the epoch.
        watch: the epoch's time so far.
        block_seconds: the part of this time up to the last read of the loss.
        saved_ranks: each rank's state from the checkpoint; empty unless the epoch has just been resumed.
    """

    sums: Tensor
    steps: int = 0
    watch: Stopwatch = field(default_factory=Stopwatch)
    block_seconds: float = 0.0
    saved_ranks: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def start(cls, device: torch.device) -> "EpochState":
        """Start an epoch."""
        return cls(no_sums(device))

    @classmethod
    def load(cls, state: Mapping[str, Any], device: torch.device, same_run: bool) -> "EpochState":
        """Load an epoch that :meth:`state_dict` saved. ``same_run``: keep its times, too."""
        seconds = dict(state["seconds"]) if same_run else {}
        block_seconds = state["block_seconds"] if same_run else 0.0
        sums = completed(state["sums"].to(exact_device(device)))
        return cls(sums, state["steps"], Stopwatch(seconds), block_seconds, state["ranks"])

    def state_dict(self, networks: nn.Module, recent_sums: Tensor) -> dict[str, Any]:
        """The state for :meth:`load`. A collective: every rank adds its RNG, buffers and sums.

        Args:
            networks: the networks whose buffers differ between ranks until the next evaluation.
            recent_sums: this rank's sums since the last all-reduce of the metrics.
        """
        own: dict[str, Any] = {
            **random_state(recent_sums.device),
            "buffers": [buffer.cpu() for buffer in networks.buffers()],
            "sums": recent_sums.cpu(),
        }
        return {
            "sums": self.sums,
            "steps": self.steps,
            "seconds": self.watch.seconds,
            "block_seconds": self.block_seconds,
            "ranks": all_gather_objects(own),
        }

    def seed_or_restore_rank(
        self, epoch: int, batches: TrainBatches, networks: nn.Module, recent_sums: Tensor, statistics: BatchNorm
    ) -> None:
        """Restore this rank's RNG, buffers and sums. If the world size changed, rank 0 takes the sums.

        An epoch that was not resumed only gets its RNG seeded.

        Args:
            epoch: which epoch, counted from 1.
            batches: this rank's training batches.
            networks: the networks whose buffers are restored.
            recent_sums: gets this rank's sums since the last all-reduce, in place.
            statistics: the choice of ``train.batch_norm``.
        """
        saved, self.saved_ranks = self.saved_ranks, []
        same_world_size = len(saved) == batches.world_size
        if same_world_size:
            set_random_state(saved[batches.rank], recent_sums.device)
        else:
            torch.manual_seed(batches.dropout_seed(epoch))
        if not saved:
            return
        taken = saved[batches.rank : batches.rank + 1] if same_world_size else saved
        combined = taken[:1] if statistics == "local" else taken
        batch_norm.load_combined(networks, [rank["buffers"] for rank in combined])
        if same_world_size or batches.rank == 0:
            recent_sums.copy_(completed(torch.stack([rank["sums"] for rank in taken]).sum(0)).to(recent_sums.dtype))

    def restart_clock(self) -> None:
        """Reset the times, after they were added to the run's times."""
        self.watch, self.block_seconds = Stopwatch(), 0.0
