"""What do wider, deeper, better-trained networks and more devices buy when an image classifier is trained?"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cifar_exp.cli.api import train

__all__ = ["train"]


def __getattr__(name: str) -> Any:  # importing a part of the package must not import all of it
    if name == "train":
        from cifar_exp.cli.api import train

        return train
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
