"""A command works in an environment without a home folder, user name, writable cache folder or matplotlib backend."""

import multiprocessing
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from cifar_exp.errors import StorageError
from cifar_exp.system import surroundings
from cifar_exp.system.surroundings import CACHES, VARIABLE, cache_folder, in_notebook, set_up_environment
from tests.conftest import REPO

ALL = [*CACHES, VARIABLE, "HOME", "XDG_CACHE_HOME", "TMPDIR", "LOGNAME", "MPLBACKEND", "JPY_PARENT_PID"]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home, and an empty temporary folder beside it; no variable that the caller has set."""
    for name in ALL:
        monkeypatch.setenv(name, "")  # restored at the end, whatever becomes of it
        monkeypatch.delenv(name)
    for name in ("home", "tmp"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    in_notebook.cache_clear()
    return tmp_path / "home"


def test_caches_lie_in_one_folder_that_a_variable_moves(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_folder() == home / ".cache" / "cifar-exp"
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "xdg"))
    assert cache_folder() == home / "xdg" / "cifar-exp"
    monkeypatch.setenv(VARIABLE, str(home / "mine"))
    monkeypatch.setenv("NUMBA_CACHE_DIR", "kept")
    set_up_environment()
    assert os.environ["MPLCONFIGDIR"] == str(home / "mine" / "matplotlib")
    assert os.environ["NUMBA_CACHE_DIR"] == "kept", "what the user has set"


def test_a_folder_for_caches_that_cannot_be_written_is_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "file").write_text("")
    monkeypatch.setenv(VARIABLE, str(home / "file" / "below"))
    with pytest.raises(StorageError, match=r"file/below: no caches .* Set CIFAR_EXP_CACHE_DIR=<a folder"):
        set_up_environment()


@pytest.mark.parametrize("named", [None, "/nonexistent"])
def test_missing_home_is_replaced_by_a_private_temporary_folder(
    named: str | None, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(_: object) -> Path:
        raise RuntimeError("Could not determine home directory.")

    if named:
        monkeypatch.setenv("HOME", named)
    else:
        monkeypatch.setattr("pathlib.Path.home", classmethod(nothing))
    set_up_environment()
    place = home.parent / "tmp" / f"cifar-exp-cache-{os.geteuid()}"
    assert Path(os.environ["HOME"]) == place / "home"
    assert stat.S_IMODE(place.stat().st_mode) == 0o700


def test_a_temporary_folder_that_others_may_write_is_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other users could run their code, since compiled code is cached there."""
    monkeypatch.setenv("HOME", "/nonexistent")
    place = home.parent / "tmp" / f"cifar-exp-cache-{os.geteuid()}"
    place.mkdir()
    place.chmod(0o777)
    with pytest.raises(StorageError, match="must be yours alone"):
        cache_folder()
    place.rmdir()
    (home.parent / "elsewhere").mkdir()
    place.symlink_to(home.parent / "elsewhere")
    with pytest.raises(StorageError, match="must be yours alone"):
        cache_folder()


@pytest.mark.parametrize("error", [KeyError("uid not found"), OSError("No username set in the environment")])
def test_missing_user_name_is_replaced(error: Exception, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ARG001
    def nobody() -> str:
        raise error

    monkeypatch.setattr("getpass.getuser", nobody)
    set_up_environment()
    assert os.environ["LOGNAME"] == f"uid-{os.geteuid()}"


def test_a_notebook_is_known_by_its_server_or_by_its_kernels_variable(
    home: Path,  # noqa: ARG001
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert not in_notebook()
    for name, value in (("JPY_PARENT_PID", "1"), ("MPLBACKEND", "module://matplotlib_inline.backend_inline")):
        in_notebook.cache_clear()
        monkeypatch.setenv(name, value)
        assert in_notebook()
        monkeypatch.delenv(name)
    set_up_environment()
    assert os.environ["MPLBACKEND"] == "agg"
    assert in_notebook(), "although matplotlib has another backend"
    in_notebook.cache_clear()


def test_figures_are_drawn_where_pyplot_draws_elsewhere(tmp_path: Path) -> None:
    """Through matplotlib's objects: no module of the package uses pyplot's, or chooses a backend."""
    for path in sorted((REPO / "cifar_exp").rglob("*.py")):
        found = re.findall(r"import pyplot|matplotlib\.pyplot|matplotlib\.use\(|switch_backend", path.read_text())
        assert not found, path
    code = (
        "import sys, pathlib, matplotlib; matplotlib.rcParams['backend'] = 'svg';"
        "from cifar_exp.display import training_figure as figures;"
        "facts = figures.PageFacts('', 'finished', 1, 1, [], {}); "
        "figures.draw_training([], facts, pathlib.Path(sys.argv[1]));"
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "figure.png")], check=True, timeout=120)
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_sockets_lie_where_their_names_are_short_enough(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("multiprocessing.process._current_process._config", {})
    set_up_environment()
    assert "tempdir" not in multiprocessing.current_process()._config  # type: ignore[attr-defined]
    long = home / ("long" * 37)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    set_up_environment()
    folder = multiprocessing.current_process()._config["tempdir"]  # type: ignore[attr-defined]
    assert len(folder) < surroundings.SOCKET_BASE
    Path(folder).rmdir()
    multiprocessing.current_process()._config.clear()  # type: ignore[attr-defined]
    monkeypatch.setattr(surroundings, "SHORT_BASES", ("/nonexistent",))
    with pytest.raises(StorageError, match=r"its name may have at most 76 characters.* Set TMPDIR=<a folder"):
        set_up_environment()


def test_unencodable_characters_are_printed_escaped() -> None:
    code = "from cifar_exp.system.standard_streams import print_anywhere; print_anywhere(); print('a\\u2026b')"
    ascii_alone = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], env=ascii_alone, check=True, capture_output=True, timeout=60)
    assert done.stdout == b"a?b\n"
