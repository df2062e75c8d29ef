"""What libraries take from the environment: a home, a user's name, places for caches, how figures are drawn.

Containers and clusters run programs as a user without a name and without a home; notebooks name a way of drawing that
other programs lack. Libraries ask for these when they are imported, so a command settles them first. The processes that
it starts inherit them.
"""

import getpass
import multiprocessing.util
import os
import shutil
import stat
import sys
import tempfile
from contextlib import suppress
from functools import cache
from io import TextIOWrapper
from pathlib import Path

from cifar_exp.errors import StorageError
from cifar_exp.system import host

VARIABLE = "CIFAR_EXP_CACHE_DIR"
NAME = "cifar-exp"
SOCKET_BASE = 76  # characters: a socket's path may have 107, and multiprocessing adds 31
SHORT_BASES = ("/tmp", "/var/tmp", host.SHARED_MEMORY)
# By the variable that the library reads: the name of its folder. One that the user has set stays.
CACHES = {
    "NUMBA_CACHE_DIR": "numba",  # left to itself, numba writes beside the source files
    "MPLCONFIGDIR": "matplotlib",
    "TORCHINDUCTOR_CACHE_DIR": "torchinductor",
    "TRITON_CACHE_DIR": "triton",
    "PYTORCH_KERNEL_CACHE_PATH": "torch-kernels",
    "CUDA_CACHE_PATH": "cuda",
}


def settle() -> None:
    """Give this process, and those that it starts, what libraries ask for.

    Raises:
        StorageError: there is no place for caches.
    """
    print_anywhere()
    _shorten_sockets()
    in_notebook()  # the next line hides it
    os.environ["MPLBACKEND"] = "agg"  # to files; matplotlib cannot be imported where the named one is missing
    place = cache_folder()
    for variable, name in CACHES.items():
        os.environ.setdefault(variable, str(place / name))
    if not _home():
        os.environ["HOME"] = str(_made(place / "home"))
    try:
        getpass.getuser()
    except (KeyError, OSError):  # from Python 3.13 on the latter
        os.environ["LOGNAME"] = f"uid-{_user()}"


@cache
def in_notebook() -> bool:
    """Whether a cell of a notebook has started this process: as Jupyter's servers tell, or else its kernels."""
    return "JPY_PARENT_PID" in os.environ or "inline" in os.environ.get("MPLBACKEND", "")


def cache_folder() -> Path:
    """The folder for all caches, made if missing; whoever may write there may run code as this user.

    It is ``$CIFAR_EXP_CACHE_DIR``, else ``cifar-exp`` below ``$XDG_CACHE_HOME`` or ``~/.cache``, else a private folder
    below the temporary one.

    Raises:
        StorageError: it cannot be made, or the temporary one belongs to somebody else.
    """
    if given := os.environ.get(VARIABLE):
        return _writable(Path(given).expanduser().absolute())
    home, named = _home(), os.environ.get("XDG_CACHE_HOME", "")
    bases = [Path(named)] if Path(named).is_absolute() else []  # the XDG specification has relative ones ignored
    for base in [*bases, *([home / ".cache"] if home else [])]:
        try:
            return _writable(base / NAME)
        except StorageError:
            continue
    return _temporary()


def print_anywhere() -> None:
    """From now on what the other end has no letters for is printed as question marks, as under an ASCII locale."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")


def _shorten_sockets() -> None:
    """Put the sockets of multiprocessing elsewhere where the temporary folder's name leaves them no room.

    As Python does from 3.14 on. The folder goes with this process; the processes that it starts are told of it.
    """
    config = multiprocessing.current_process()._config  # type: ignore[attr-defined]
    if len(os.fsencode(_temporary_base())) <= SOCKET_BASE or "tempdir" in config:
        return
    for base in SHORT_BASES:
        with suppress(OSError):
            config["tempdir"] = tempfile.mkdtemp(prefix="pymp-", dir=base)
            multiprocessing.util.Finalize(None, shutil.rmtree, args=(config["tempdir"], True), exitpriority=-100)
            return
    raise StorageError(
        f"TMPDIR={_temporary_base()}: its name may have {SOCKET_BASE} characters, for sockets lie there. Set "
        f"TMPDIR=<a folder with a shorter name>"
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
            f"{folder}: this folder for caches must be yours alone, and others may write there. Set "
            f"{VARIABLE}=<a folder of yours>"
        )
    return folder


def _writable(folder: Path) -> Path:
    try:
        _made(folder)
        with tempfile.TemporaryFile(dir=folder):  # root may write by the mode alone, but not to a read-only disk
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
    """None where there is none, as for a user id that no passwd entry has, or where the named folder is missing."""
    try:
        home = Path.home()
    except RuntimeError:
        return None
    return home if home.is_absolute() and home.is_dir() else None


def _user() -> str:
    return str(os.geteuid()) if hasattr(os, "geteuid") else "user"
