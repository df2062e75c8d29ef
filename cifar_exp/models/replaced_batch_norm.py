"""The base class of layers that stand in for a network's batch norm."""

from typing import Self

from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm


class ReplacedBatchNorm(_BatchNorm):
    """Batch norm that takes an ordinary one's place and computes the same in another way."""

    @classmethod
    def of(cls, layer: _BatchNorm) -> Self:
        """The same layer, its parameters and buffers shared with ``layer``."""
        made = cls(layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats)
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            setattr(made, name, getattr(layer, name))
        return made.train(layer.training)

    def _check_input_dim(self, input: Tensor) -> None:
        """Takes what ``BatchNorm1d``, ``2d`` and ``3d`` take."""

    def counted(self) -> float:
        """Count a batch; how far the running statistics go towards its own."""
        if self.num_batches_tracked is None:
            return self.momentum or 0.0  # as PyTorch takes it
        self.num_batches_tracked += 1
        return 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
