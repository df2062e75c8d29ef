"""Read the published archive of CIFAR-10 without executing code from it."""

import io
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cifar_exp.data.dataset_files import Arrays
from cifar_exp.errors import DataError

ARCHIVE_FILE = "cifar-10-python.tar.gz"
_FOLDER = "cifar-10-batches-py"
_TRAIN_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
_READ = (*_TRAIN_BATCHES, "test_batch", "batches.meta")
_IGNORED = (_FOLDER, f"{_FOLDER}/readme.html")
_MAX_MEMBER = 64 * 2**20  # bytes; a batch of the release has 31 MB, and a crafted gzip file could expand without limit


def read_archive(path: Path) -> tuple[tuple[str, ...], Arrays]:
    """The class names and the images of an archive of the release's format; nothing is written to disk.

    Raises:
        DataError: a member or a pickle differs from the release.
    """
    members = _read_members(path)
    try:
        classes = tuple(name.decode("ascii") for name in _unpickle(members["batches.meta"], path)[b"label_names"])
        train = [_batch(_unpickle(members[name], path), len(classes)) for name in _TRAIN_BATCHES]
        test = _batch(_unpickle(members["test_batch"], path), len(classes))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path} does not contain CIFAR-10 batches: {error!r}. {_REPLACE}") from error
    images, labels = (np.concatenate(parts) for parts in zip(*train, strict=True))
    return classes, {"train": (images, labels), "test": test}


_REPLACE = f"Delete it and start again, or set data.archive=<file> to an intact copy of {ARCHIVE_FILE}"


def _read_members(path: Path) -> dict[str, bytes]:
    """Content of the needed members, by name without the folder."""
    contents: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                folder, _, name = member.name.rpartition("/")
                if member.name in _IGNORED and (member.isdir() or member.isreg()):
                    continue
                if folder != _FOLDER or name not in _READ or not member.isreg() or member.size > _MAX_MEMBER:
                    kind = (
                        "a link to " + member.linkname if member.islnk() or member.issym() else f"{member.size:,} bytes"
                    )
                    raise DataError(
                        f"{path} contains {member.name!r} ({kind}), which is not in the release. {_REPLACE}"
                    )
                file = archive.extractfile(member)
                assert file is not None  # regular files have content
                contents[name] = file.read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(f"{path} cannot be read as a .tar.gz archive: {error}. {_REPLACE}") from error
    missing = [name for name in _READ if name not in contents]
    if missing:
        raise DataError(f"{path} lacks {', '.join(missing)}. {_REPLACE}")
    return contents


def _batch(batch: dict[bytes, Any], class_count: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images (N, 3, 32, 32) uint8 and labels (N,) int64 of one unpickled batch."""
    data = batch[b"data"]
    if type(data) is not np.ndarray or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3 * 32 * 32:
        raise ValueError("data must be a uint8 array of N x 3072")
    labels = np.array(batch[b"labels"], dtype=np.int64)
    if labels.shape != (len(data),) or labels.min(initial=0) < 0 or labels.max(initial=0) >= class_count:
        raise ValueError(f"labels must be {len(data)} numbers from 0 to {class_count - 1}")
    return data.reshape(-1, 3, 32, 32), labels


_RECONSTRUCT: Any = np.empty(0).__reduce__()[0]  # in numpy.core or numpy._core, depending on numpy's version
_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


class _ArrayUnpickler(pickle.Unpickler):
    """Builds numbers, bytes, lists, dictionaries and numpy arrays; every other name is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise DataError(f"a pickle in it asks for {module}.{name}, which is not allowed")
        return _ALLOWED[module, name]


def _unpickle(content: bytes, path: Path) -> dict[bytes, Any]:
    """The dictionary in a pickle of the release. Python 2 wrote it, so its strings are bytes here."""
    try:
        loaded = _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
    except DataError as error:
        raise DataError(f"{path} is refused: {error}. {_REPLACE}") from error
    except Exception as error:  # a damaged pickle raises nearly anything
        raise DataError(f"{path} has a damaged batch: {error!r}. {_REPLACE}") from error
    if not isinstance(loaded, dict):
        raise DataError(f"{path} contains a batch that is not a dictionary but {type(loaded).__name__}. {_REPLACE}")
    return loaded
