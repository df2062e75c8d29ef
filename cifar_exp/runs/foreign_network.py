"""Build the network of an untrusted run folder, without downloads and within the memory that its checkpoint claims."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cifar_exp.config.targets import ALLOWED, allowed, matches
from cifar_exp.errors import ConfigError, StorageError
from cifar_exp.runs.components import model_factory
from cifar_exp.runs.user_code import refusing
from cifar_exp.system.memory_limit import available, is_out_of_memory, memory_limited
from cifar_exp.system.printable import printable

_RESTORE = "Restore the run's config.yaml, or choose another run"


def network_of(
    section: Mapping[str, Any], state: Mapping[str, Tensor], num_classes: int, trusted: Sequence[str]
) -> nn.Module:
    """The network of a run with its weights, in evaluation mode.

    Args:
        section: the section ``model`` of its configuration.
        state: the state dict in its checkpoint.
        num_classes: its number of classes.
        trusted: modules outside the allow-list whose code may run.

    Raises:
        ConfigError: the network is not allowed, or cannot be built.
        StorageError: the checkpoint belongs to another network.
    """
    target = str(section.get("_target_"))
    is_own = matches(target, allowed("model", trusted)[len(ALLOWED["model"]) :])
    size = sum(value.untyped_storage().nbytes() for value in state.values() if isinstance(value, Tensor))
    with (
        refusing(f"model: {printable(target)} cannot be built", trusted, _RESTORE),
        nullcontext() if is_own else _within(2 * size, "the network that config.yaml describes"),
        nullcontext() if is_own else _without_downloads(target),
        nullcontext() if is_own else _FewOperations(len(state)),
    ):
        model = model_factory(section, trusted)(num_classes=num_classes)  # nested targets are built first
    try:
        model.load_state_dict(state)
    except (RuntimeError, AttributeError, KeyError, TypeError) as error:
        why = printable(" ".join(str(error).split())[:300])
        raise StorageError(
            f"the checkpoint does not fit the network that config.yaml describes: {why}. {_RESTORE}"
        ) from error
    return model.eval()


@contextmanager
def within_available_memory() -> Iterator[None]:
    """Inside this context a network that needs more than the available memory raises a ConfigError."""
    with _within(available(), "the network"):
        yield


@contextmanager
def _within(size: float, what: str) -> Iterator[None]:
    try:
        with memory_limited(size):
            yield
    except (MemoryError, RuntimeError, ConfigError) as error:
        if not is_out_of_memory(error):
            raise
        raise ConfigError(
            f"model: {what} needs more memory than its checkpoint or this machine has. {_RESTORE}"
        ) from None


class _FewOperations(TorchDispatchMode):
    """Inside this context more tensor operations than ``tensors`` need for their creation raise a ConfigError.

    Memory limits a network, too, but a million tiny layers take minutes before they fill it.
    """

    def __init__(self, tensors: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tensors, self._left = tensors, 10_000 + 100 * tensors

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._left -= 1
        if self._left < 0:
            raise ConfigError(
                f"model: the network that config.yaml describes has far more layers than its checkpoint, which has "
                f"{self._tensors:,} tensors. {_RESTORE}"
            )
        return func(*args, **(kwargs or {}))


@contextmanager
def _without_downloads(target: str) -> Iterator[None]:
    """Inside this context torchvision fetches no weights: the checkpoint has them."""
    from torchvision.models import WeightsEnum

    fetch = WeightsEnum.get_state_dict

    def refused(weights: Any, *_: Any, **__: Any) -> None:
        raise ConfigError(
            f"model._target_={printable(target)}: it would download {printable(weights)}, and prediction with a "
            f"foreign run downloads nothing. If you trust it, set 'trusted_modules=[torchvision]'"
        )

    WeightsEnum.get_state_dict = refused
    try:
        yield
    finally:
        WeightsEnum.get_state_dict = fetch
