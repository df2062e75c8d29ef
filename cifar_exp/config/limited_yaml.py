"""Read untrusted YAML, with limits on its size, its depth, and its size after alias expansion.

The safe loader refuses tags that name Python objects. But a kilobyte of nested aliases can expand
to more values than fit in memory.
"""

import io
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import yaml
from omegaconf import OmegaConf

from cifar_exp.system import foreign_files

MOST_BYTES = 2**18  # the resolved configuration of a run has some 4,000
MOST_VALUES = 20_000  # the resolved configuration of a run has some 150
MOST_LEVELS = 40
MOST_CHARACTERS = 20_000  # of one value
MOST_INTERPOLATIONS = 50  # in one value; OmegaConf takes seconds to parse thousands of them
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Text(io.StringIO):
    """A text with its file name, for messages about its syntax."""

    def __init__(self, text: str, name: str) -> None:
        super().__init__(text)
        self.name = name


class TooLargeError(yaml.YAMLError):
    """The YAML is too large, too deep, or its aliases expand to too much."""


def load_file(path: Path) -> Any:
    """The content of a YAML file as an OmegaConf container.

    Raises:
        OSError, ValueError, YAMLError, OmegaConfBaseException: it cannot be read, or is refused.
    """
    return _loaded(OmegaConf.load, foreign_files.read_text(path, MOST_BYTES), str(path))


def limited(load: Callable[..., Any]) -> Callable[..., Any]:
    """``OmegaConf.load`` with the limits, for Hydra, which loads the files of ``--config-dir`` with it."""

    def loaded(file: str | Path | IO[Any]) -> Any:
        if not isinstance(file, str | Path):
            text = file.read(MOST_BYTES + 1)
            return _loaded(
                load, text if isinstance(text, str) else text.decode("utf-8"), getattr(file, "name", "<file>")
            )
        with Path(file).open(encoding="utf-8") as opened:
            return loaded(opened)

    return loaded


def _loaded(load: Callable[..., Any], text: str, name: str) -> Any:
    check_limits(text, name)
    try:
        return load(_Text(text, name))
    except RecursionError as error:  # brackets within an interpolation
        raise TooLargeError("it is nested too deeply") from error


def check_limits(text: str, name: str) -> None:
    """Check a YAML text against the limits, in time proportional to its length.

    Raises:
        TooLargeError: it exceeds a limit.
        YAMLError: it is not valid YAML.
    """
    if len(text) > MOST_BYTES:
        raise TooLargeError(f"it has more than {MOST_BYTES:,} characters")
    sizes: dict[str, int] = {}  # values that an anchor stands for, aliases unfolded
    levels: list[tuple[str | None, int]] = []  # the open collections: anchor, values before it
    values = 0
    for event in yaml.parse(_Text(text, name), Loader=_LOADER):
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise TooLargeError(f"the alias *{event.anchor} is undefined or refers to itself")
            values += sizes[event.anchor]
        elif isinstance(event, yaml.CollectionStartEvent):
            levels.append((event.anchor, values))
            values += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = levels.pop()
            if anchor is not None:
                sizes[anchor] = values - before
        elif isinstance(event, yaml.ScalarEvent):
            values += 1
            if event.anchor is not None:
                sizes[event.anchor] = 1
            if len(event.value) > MOST_CHARACTERS or event.value.count("${") > MOST_INTERPOLATIONS:
                raise TooLargeError(f"its value {event.value[:20]!r}... is too long")
        if len(levels) > MOST_LEVELS:
            raise TooLargeError(f"it is nested more than {MOST_LEVELS} levels deep")
        if values > MOST_VALUES:
            raise TooLargeError(f"it has more than {MOST_VALUES:,} values after expanding aliases")
