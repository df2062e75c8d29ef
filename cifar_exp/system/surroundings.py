"""Set up the environment that libraries need: home, user name, cache folders and matplotlib's backend.

Containers and clusters may run programs as a user without a name or a home. Notebooks set a matplotlib backend that
other programs do not have. Libraries read these when they are imported, so a command calls
:func:`set_up_environment` first. Child processes inherit the environment.
"""

import getpass
import multiprocessing.util
import os
import shutil
import stat
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

from cifar_exp.errors import StorageError
from cifar_exp.system import host
from cifar_exp.system.standard_streams import open_closed_streams, print_anywhere

VARIABLE = "CIFAR_EXP_CACHE_DIR"
NAME = "cifar-exp"
SOCKET_BASE = 76  # bytes: a socket's path may have 107, and multiprocessing adds 31
SHORT_BASES = ("/tmp", "/var/tmp", host.SHARED_MEMORY)
# Environment variable of the library -> name of its cache folder. A value that the user has set is kept.
CACHES = {
    "NUMBA_CACHE_DIR": "numba",  # numba's default is beside the source files
    "MPLCONFIGDIR": "matplotlib",
    "TORCHINDUCTOR_CACHE_DIR": "torchinductor",
    "TRITON_CACHE_DIR": "triton",
    "PYTORCH_KERNEL_CACHE_PATH": "torch-kernels",
    "CUDA_CACHE_PATH": "cuda",
}


def set_up_environment() -> None:
    """Set up the environment of this process and its children.

    Raises:
        StorageError: no cache folder is writable, or the path of the temporary folder is too long for sockets.
    """
    open_closed_streams()
    print_anywhere()
    _shorten_sockets()
    in_notebook()  # caches the answer before the next line changes MPLBACKEND
    os.environ["MPLBACKEND"] = "agg"  # draws to files; importing matplotlib fails if the backend does not exist
    place = cache_folder()
    for variable, name in CACHES.items():
        os.environ.setdefault(variable, str(place / name))
    if not _home():
        os.environ["HOME"] = str(_made(place / "home"))
    try:
        getpass.getuser()
    except (KeyError, OSError):  # OSError since Python 3.13
        os.environ["LOGNAME"] = f"uid-{_user()}"


@cache
def in_notebook() -> bool:
    """Whether a notebook cell started this process, by the variables of Jupyter's server or its kernel."""
    return "JPY_PARENT_PID" in os.environ or "inline" in os.environ.get("MPLBACKEND", "")


def cache_folder() -> Path:
    """The folder for all caches. It is created if missing. Write access to it allows running code as this user.

    It is ``$CIFAR_EXP_CACHE_DIR``, else ``cifar-exp`` in ``$XDG_CACHE_HOME`` or ``~/.cache``, else a private folder in
    the temporary folder.

    Raises:
        StorageError: the folder cannot be created, or other users may write to the one in the temporary folder.
    """
    if given := os.environ.get(VARIABLE):
        return _writable(Path(given).expanduser().absolute())
    home, named = _home(), os.environ.get("XDG_CACHE_HOME", "")
    bases = [Path(named)] if Path(named).is_absolute() else []  # the XDG specification says to ignore relative paths
    for base in [*bases, *([home / ".cache"] if home else [])]:
        try:
            return _writable(base / NAME)
        except StorageError:
            continue
    return _temporary()


def make_socket_folder(base: str | None = None) -> None:
    """Create the folder of multiprocessing's sockets unless it exists. It is removed when this process ends.

    Python would also create it, but would show a traceback at the end if something else removed it.

    Args:
        base: the folder to make it in; None for the temporary folder.

    Raises:
        OSError: ``base`` cannot be written.
    """
    config = multiprocessing.current_process()._config  # type: ignore[attr-defined]
    if "tempdir" not in config:
        config["tempdir"] = tempfile.mkdtemp(prefix="pymp-", dir=base)
        multiprocessing.util.Finalize(None, shutil.rmtree, args=(config["tempdir"], True), exitpriority=-100)


def _shorten_sockets() -> None:
    """Use another folder for multiprocessing's sockets if the path of the temporary folder is too long for them.

    Python 3.14 does the same. Child processes use that folder, too.

    Raises:
        StorageError: no other folder is writable.
    """
    if len(os.fsencode(_temporary_base())) <= SOCKET_BASE:
        return
    for base in SHORT_BASES:
        with suppress(OSError):
            make_socket_folder(base)
            return
    raise StorageError(
        f"TMPDIR={_temporary_base()}: its name may have at most {SOCKET_BASE} characters, since sockets are created "
        f"there. Set TMPDIR=<a folder with a shorter name>"
    )


def _temporary_base() -> Path:
    try:
        return Path(tempfile.gettempdir())
    except FileNotFoundError as error:
        raise StorageError(f"TMPDIR: {error.strerror or error}. Set TMPDIR=<a folder that you may write to>") from error


def _temporary() -> Path:
    folder = _temporary_base() / f"{NAME}-cache-{_user()}"
    found = _writable(folder).lstat()
    others = stat.S_IMODE(found.st_mode) & (stat.S_IWGRP | stat.S_IWOTH)
    if not stat.S_ISDIR(found.st_mode) or (hasattr(os, "geteuid") and found.st_uid != os.geteuid()) or others:
        raise StorageError(
            f"{folder}: this folder for caches must be yours alone, but others may write there. Set "
            f"{VARIABLE}=<a folder of yours>"
        )
    return folder


def _writable(folder: Path) -> Path:
    try:
        _made(folder)
        with tempfile.TemporaryFile(dir=folder):  # root passes mode checks even on a read-only disk
            return folder
    except OSError as error:
        raise StorageError(
            f"{folder}: no caches can be written there: {error.strerror or error}. Set {VARIABLE}=<a folder that you "
            f"may write to>"
        ) from error


def _made(folder: Path) -> Path:
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def _home() -> Path | None:
    """The home folder; None if the user has no passwd entry or the folder does not exist."""
    try:
        home = Path.home()
    except RuntimeError:
        return None
    return home if home.is_absolute() and home.is_dir() else None


def _user() -> str:
    return str(os.geteuid()) if hasattr(os, "geteuid") else "user"
