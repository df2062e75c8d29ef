"""The base class of layers that replace a network's batch norms: fused layers, and layers synchronized over ranks."""

from typing import Self

from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm


class ReplacedBatchNorm(_BatchNorm):
    """A batch norm that shares the parameters and buffers of the layer that it replaces."""

    @classmethod
    def of(cls, layer: _BatchNorm) -> Self:
        """The replacement for ``layer``."""
        made = cls(layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats)
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            setattr(made, name, getattr(layer, name))
        return made.train(layer.training)

    def _check_input_dim(self, input: Tensor) -> None:
        """Accept the inputs of ``BatchNorm1d``, ``2d`` and ``3d``."""

    def count_batch(self) -> float:
        """Increment ``num_batches_tracked``. Returns the momentum of this update of the running statistics."""
        if self.num_batches_tracked is None:
            return self.momentum or 0.0  # PyTorch does the same
        self.num_batches_tracked += 1
        return 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
