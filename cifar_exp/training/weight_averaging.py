"""The exponential moving average (EMA) of a network's weights, which ``train.weight_averaging`` evaluates."""

import torch
from torch import Tensor, nn
from torch.nn import Module
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class WeightEma(AveragedModel):
    """EMA of the weights and of the floating-point buffers; other buffers are copied from the network.

    torch's own update copies its step counter to the GPU at each step, so the host waits. It also iterates over the
    tensors of both networks.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        """``decay``: weight of the old average in a step, 0 to 1. The first update copies the network."""
        super().__init__(network, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
        self.decay = decay
        self._averages, self._values = (_split_by_kind(model) for model in (self.module, network))

    @torch.no_grad()
    def update_parameters(self, model: Module) -> None:
        """Move the average towards ``model``, which must be the network of the constructor."""
        if not self.n_averaged:
            super().update_parameters(model)
            return
        (averages, own_counters), (values, counters) = self._averages, self._values
        torch._foreach_lerp_(averages, values, 1 - self.decay)
        if own_counters:
            torch._foreach_copy_(own_counters, counters)
        self.n_averaged += 1


def _split_by_kind(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """The floating-point tensors, and the others. Training changes them in place, so the lists stay valid."""
    tensors = [*model.parameters(), *model.buffers()]
    return [it for it in tensors if it.is_floating_point()], [it for it in tensors if not it.is_floating_point()]
