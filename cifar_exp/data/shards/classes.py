"""The classes of labels that are numbers."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from cifar_exp.data.presence import SplitName
from cifar_exp.data.shards.places import Place, StoredFile
from cifar_exp.data.shards.samples import ShardIndex
from cifar_exp.errors import DataError
from cifar_exp.system.printable import printable

NAMES_FILE = "classnames.txt"
_MAX_NAMES = 2**24  # bytes of it
_ADVICE = f"Write the shard again, or list all classes in <root>/{NAMES_FILE}, one name a line"


def stated_names(place: Place, file: StoredFile | None) -> tuple[str, ...] | None:
    """The lines of ``classnames.txt``; None if there is no such file.

    Raises:
        DataError: it is too large, not UTF-8, or names a class twice.
    """
    if file is None:
        return None
    where = f"data.root={place.address}: {NAMES_FILE}"
    if file.size > _MAX_NAMES:
        raise DataError(f"{where} has {file.size:,} bytes, more than {_MAX_NAMES:,}")
    try:
        names = tuple(place.content(file).decode("utf-8-sig").rstrip().splitlines())
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not in UTF-8. Save it as UTF-8") from error
    names = tuple(name.strip() for name in names)
    if len(set(names)) < len(names) or "" in names:
        raise DataError(f"{where} must have another name on each line. Correct it, or remove it")
    return names


def class_names(
    place: Place, indices: Mapping[SplitName, Sequence[tuple[str, ShardIndex]]], stated: tuple[str, ...] | None
) -> tuple[str, ...]:
    """The name of each label.

    Args:
        place: for messages.
        indices: the shards of each split, with their names.
        stated: names from :func:`stated_names`. Without them every label from 0 to the largest must occur in training.

    Raises:
        DataError: a label is negative, too large or never occurs in training.
    """
    used = np.unique(np.concatenate([np.unique(index.places["label"]) for _, index in indices["train"]]))
    if stated is None:
        _check_all_occur(place, used)
    count = len(used) if stated is None else len(stated)
    for shards in indices.values():
        for name, index in shards:
            wrong = index.places["label"][(index.places["label"] < 0) | (index.places["label"] >= count)]
            if len(wrong):
                known = NAMES_FILE if stated else "the training images"
                raise DataError(
                    f"data.root={place.address}: the shard {printable(name)} has the label {wrong[0]:,}, but "
                    f"{known} have the labels 0 to {count - 1:,} ({len(wrong):,} images of this shard). {_ADVICE}."
                )
    return stated or tuple(map(str, range(count)))


def _check_all_occur(place: Place, used: NDArray[np.int64]) -> None:
    """Raise a DataError where the labels of the training images are not 0, 1, ... without a gap."""
    wrong = used[used != np.arange(len(used))]
    if used[0] < 0:
        problem = f"has the label {used[0]:,}; labels are whole numbers from 0"
    elif len(wrong):
        missing = int(np.flatnonzero(used != np.arange(len(used)))[0])
        problem = f"has images of the label {wrong[0]:,} and none of the label {missing:,}"
    else:
        return
    raise DataError(f"data.root={place.address}: train/ {problem}. {_ADVICE}.")
