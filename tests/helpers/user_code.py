"""Examples of users' networks, optimizers and schedules: some work, some cannot."""

from typing import Any

import torch
from torch import Tensor, nn


class Base(nn.Module):
    def __init__(self, num_classes: int, width: int = 4) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head: nn.Module = nn.Linear(width, num_classes)
        self.extra = nn.Linear(width, width)

    def forward(self, images: Tensor) -> Any:
        return self.head(self._hidden(images))

    def _hidden(self, images: Tensor) -> Tensor:
        hidden: Tensor = self.trunk(images)
        return hidden + self.extra(hidden)


class Unused(Base):
    def _hidden(self, images: Tensor) -> Tensor:
        hidden: Tensor = self.trunk(images)
        return hidden


class Sometimes(Base):
    """Its extra layer is used only for bright images, like a layer that is skipped at random."""

    def _hidden(self, images: Tensor) -> Tensor:
        hidden: Tensor = self.trunk(images)
        return hidden + self.extra(hidden) if images.mean() > 0 else hidden


class Lazy(Base):
    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.head = nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.LazyLinear(num_classes))


class OnlyTwo(Base):
    """Two images, whatever it gets."""

    def forward(self, images: Tensor) -> Any:
        return self.head(self._hidden(images)).view(2, -1)


class EvenOnly(Base):
    """It looks at pairs of images."""

    def forward(self, images: Tensor) -> Any:
        return super().forward(images.reshape(2, -1, *images.shape[1:]).flatten(0, 1))


class Ghost(Base):
    """In training it splits a batch in eight parts, as ghost batch norms do."""

    def forward(self, images: Tensor) -> Any:
        return super().forward(images.reshape(8, -1, *images.shape[1:]).flatten(0, 1) if self.training else images)


class Grows(Base):
    """A buffer of all that it has seen."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.register_buffer("seen", torch.zeros(1, 4))

    def _hidden(self, images: Tensor) -> Tensor:
        hidden = super()._hidden(images)
        if self.training:
            self.seen = torch.cat([self.seen, hidden.detach().float().mean(0, keepdim=True)])
        return hidden


class Adds(Base):
    """A parameter that appears in the first step."""

    def forward(self, images: Tensor) -> Any:
        if self.training and not hasattr(self, "late"):
            self.late = nn.Parameter(torch.zeros(1))
        return super().forward(images)


class SparseGradients(Base):
    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.table = nn.Embedding(8, 4, sparse=True)

    def _hidden(self, images: Tensor) -> Tensor:
        return super()._hidden(images) + self.table(torch.zeros(len(images), dtype=torch.long))


class NeverUsedLazy(Base):
    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.other = nn.LazyLinear(2)


class Volume(nn.Module):
    """A 3-D convolution, whose weights have five dimensions."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv3d(1, 2, 3), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(2, num_classes)
        )

    def forward(self, images: Tensor) -> Any:
        return self.layers(images[:, None])


class Noted(Base):
    def get_extra_state(self) -> Any:
        return {"made": "today"}

    def set_extra_state(self, state: Any) -> None:
        self.note = state


class Secret(Noted):
    def get_extra_state(self) -> Any:
        return Base


class Pair(Base):
    def forward(self, images: Tensor) -> Any:
        return super().forward(images), images


class Narrow(Base):
    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes - 1)


class Map(Base):
    def forward(self, images: Tensor) -> Any:
        return super().forward(images)[..., None, None]


class Labels(Base):
    def forward(self, images: Tensor) -> Any:
        return super().forward(images).long()


class Detached(Base):
    def forward(self, images: Tensor) -> Any:
        return super().forward(images).detach()


class NotANumber(Base):
    def forward(self, images: Tensor) -> Any:
        return super().forward(images) / 0 * 0


class Frozen(Base):
    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.requires_grad_(False)


class Complex(Base):
    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.phase = nn.Parameter(torch.zeros(2, dtype=torch.complex64))


class FailsInTraining(Base):
    def forward(self, images: Tensor) -> Any:
        assert not self.training, "not while it trains"
        return super().forward(images)


class FailsInEvaluation(Base):
    def forward(self, images: Tensor) -> Any:
        if not self.training:
            raise KeyError("statistics")
        return super().forward(images)


class Squeezes(Base):
    def forward(self, images: Tensor) -> Any:
        return super().forward(images).squeeze()


class Remembers(Base):
    """The second backward pass would go through the first one's graph."""

    last: Any = 0

    def forward(self, images: Tensor) -> Any:
        logits = super().forward(images)
        if self.training:
            self.last = logits = logits + self.last
        return logits


class InPlace(Base):
    def forward(self, images: Tensor) -> Any:
        weights = self.extra.weight.exp()
        hidden = self.trunk(images) @ weights
        weights.mul_(2)
        return self.head(hidden)


class OnGpu(Base):
    def forward(self, images: Tensor) -> Any:
        return super().forward(images.to("cuda:7"))


class Viewed(nn.Module):
    """Images and weights are channels-last, so a view of a feature map fails."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4 * 14 * 14, num_classes)

    def forward(self, images: Tensor) -> Any:
        hidden = self.conv(images)
        return self.head(hidden.view(len(hidden), -1))


def exits(num_classes: int) -> nn.Module:
    raise SystemExit(f"no network for {num_classes} classes")


def nothing(num_classes: int) -> None:
    assert num_classes


def asserts(num_classes: int) -> nn.Module:
    assert num_classes == 1000, "weights are for 1000 classes"
    return nn.Identity()


def identity(num_classes: int) -> nn.Module:
    assert num_classes
    return nn.Identity()


class NeedsClosure(torch.optim.SGD):
    def step(self, closure: Any) -> None:  # type: ignore[override]
        closure()


class Sgd(torch.optim.SGD):
    """Its first argument has a name of its own."""

    def __init__(self, weights: Any, lr: float) -> None:
        super().__init__(weights, lr)


class Picky(torch.optim.SGD):
    def __init__(self, params: Any, lr: float) -> None:
        assert lr > 1, "lr must be above 1"
        super().__init__(params, lr)


class Keeps(torch.optim.SGD):
    """Its state has an object that a checkpoint cannot store."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # noqa: ARG002
        self.state[self.param_groups[0]["params"][0]]["owner"] = Base


def halves(epochs: int, step: int, steps_per_epoch: int) -> float:
    """A schedule with its arguments in another order."""
    return 0.5 ** (step // steps_per_epoch) + 0 * epochs


def negative(step: int, steps_per_epoch: int, epochs: int) -> float:
    return float(steps_per_epoch * epochs - 2 - step)


def not_a_number(step: int, steps_per_epoch: int, epochs: int) -> float:
    return float("nan") if step == 1 else 1.0 + 0 * steps_per_epoch * epochs


def text(step: int, steps_per_epoch: int, epochs: int) -> str:
    return f"{step} of {steps_per_epoch * epochs}"


def divides(step: int, steps_per_epoch: int, epochs: int) -> float:
    return epochs / (step * steps_per_epoch)


class Scheduler:
    def __init__(self, gamma: float = 1.0) -> None:
        self.gamma = gamma


def of_the_epoch(epoch: int) -> float:
    return 1.0 / epoch
