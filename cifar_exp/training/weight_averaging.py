"""The running mean of a network's weights, which is what is evaluated where ``train.weight_averaging`` asks for it."""

import torch
from torch import Tensor, nn
from torch.nn import Module
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class RunningMean(AveragedModel):
    """Weights and floating-point buffers are running means of the network's, counters are its own.

    torch's own update copies a number to the device and walks both networks at each step: the host waits on a GPU.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        """``decay``: share of the mean that stays in a step, 0 to 1. The first update takes the network as it is."""
        super().__init__(network, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
        self.decay = decay
        self._means, self._values = (_by_kind(model) for model in (self.module, network))

    @torch.no_grad()
    def update_parameters(self, model: Module) -> None:
        """Go towards ``model``, which is the network that this is the mean of."""
        if not self.n_averaged:
            super().update_parameters(model)
            return
        (means, counters), (values, counts) = self._means, self._values
        torch._foreach_lerp_(means, values, 1 - self.decay)
        if counters:
            torch._foreach_copy_(counters, counts)
        self.n_averaged += 1


def _by_kind(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters and buffers that are floating-point, and those that are not; training changes them in place."""
    tensors = [*model.parameters(), *model.buffers()]
    return [it for it in tensors if it.is_floating_point()], [it for it in tensors if not it.is_floating_point()]
