"""What do wider, deeper, better-trained networks and more devices buy when an image classifier is trained?"""

from cifar_exp.system.supported import refuse_others

TYPE_CHECKING = False  # not from typing: the current folder may have a file of that name, see system/import_path.py
if TYPE_CHECKING:
    from typing import Any

    from cifar_exp.cli.api import train

__all__ = ["train"]

refuse_others()  # before anything else of the package is imported


def __getattr__(name: str) -> "Any":  # importing a part of the package must not import all of it
    if name == "train":
        from cifar_exp.cli.api import train

        return train
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
