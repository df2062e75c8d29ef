"""The display during a run: a bar on a terminal, a live line in a notebook, one line per epoch elsewhere."""

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from cifar_exp.display import display
from cifar_exp.display.curves import PageFacts
from cifar_exp.display.display import Display, LiveLine, suitable
from cifar_exp.errors import FREE_SPACE, StorageError
from cifar_exp.records.journal import Entry, JournalWriter
from cifar_exp.system.bugs import BugError
from cifar_exp.system.surroundings import in_notebook
from cifar_exp.tracking.recorder import Recording

FACTS = PageFacts("net", "starting", epochs=2, steps_per_epoch=50, lr_drops=[], details={})
EPOCH = {
    **{"train/loss": 1.5, "train/accuracy": 0.25, "val/loss": 1.25, "val/accuracy": 0.5},
    **{"lr": 0.1, "images_per_second": 1234.0, "time/epoch_seconds": 3.0},
}


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(display, "in_notebook", lambda: True)


def shown_of_two_epochs(folder: Path, console: Console) -> str:
    """All that is written of a run of 100 steps."""
    display = Display(folder, FACTS, "auto", console, started=0.0)
    display.open()
    for step in range(1, 101):
        point = {"step/loss": 1.0, "step/accuracy": 0.5, "step/images_per_second": 1000.0}
        display.write([Entry(step, (step + 49) // 50, step * 0.1, point)])
        if step % 50 == 0:
            display.write([Entry(step, step // 50, step * 0.1, EPOCH)])
    display.write([Entry(100, 2, 11.0, {"test/accuracy": 0.5})])
    display.close("FINISHED")
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.usefixtures("notebook")
def test_a_notebook_shows_one_live_line_and_a_short_line_an_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cifar_exp.display.display.LIVE_PAUSE", 0.0)
    shown = shown_of_two_epochs(tmp_path, Console(file=io.StringIO(), force_terminal=True))
    assert "\x1b" not in shown, "no codes that move the cursor"
    lines = shown.split("\n")
    assert len(lines) == 3, "one for each epoch, and nothing is left of the live one"
    for number, line in enumerate(lines[:2], 1):
        states = line.split("\r")
        assert states[25].startswith(f"epoch {number}/2  loss 1.000  accuracy 0.500  1,000 images/s")
        assert (
            states[-1].rstrip() == f"epoch {number}/2  loss 1.500  accuracy 0.250  val accuracy 0.500  1,234 images/s"
        )
        assert all(len(state) <= 80 for state in states)
    assert lines[2].strip() == ""


@pytest.mark.usefixtures("notebook")
def test_a_live_line_is_written_once_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A notebook stores everything that was ever written: the output of a long run would fill it."""
    now = iter(range(10**6))
    monkeypatch.setattr("time.monotonic", lambda: next(now) * 0.01)
    console = Console(file=io.StringIO())
    line = LiveLine(console)
    for number in range(390):  # a hundredth of a second each
        line.show(str(number))
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().count("\r") == 4
    assert not list(tmp_path.iterdir())


def test_shorter_live_line_erases_a_longer_one() -> None:
    console = Console(file=io.StringIO())
    line = LiveLine(console)
    line.show("a long state")
    line.replace("short")
    line.clear()
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue() == "\ra long state\rshort       \n"


@pytest.mark.parametrize(
    ("kind", "terminal", "variables"),
    [("bar", True, {"TERM": "xterm"}), ("lines", True, {"TERM": "dumb"}), ("lines", False, {"TERM": "xterm"})],
)
def test_a_bar_is_for_terminals_that_can_move_the_cursor(kind: str, terminal: bool, variables: dict[str, str]) -> None:
    in_notebook.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("JPY_PARENT_PID", "MPLBACKEND"):
            patch.delenv(name, raising=False)
        assert suitable(Console(file=io.StringIO(), force_terminal=terminal, _environ=variables)) == kind
    in_notebook.cache_clear()


def test_without_a_terminal_there_is_one_line_an_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(display, "in_notebook", lambda: False)
    shown = shown_of_two_epochs(tmp_path, Console(file=io.StringIO(), soft_wrap=True))
    assert re.fullmatch(r"(epoch \d/2 .*\n){2}", shown)


class Broken(Display):
    """Fails at the end, as a figure does."""

    def __init__(self, folder: Path, error: Exception) -> None:
        super().__init__(folder, FACTS, "quiet", Console(quiet=True), started=0.0)
        self._error = error

    def close(self, status: object) -> None:  # noqa: ARG002
        raise self._error


@pytest.mark.parametrize(
    ("error", "kind", "advice"),
    [
        (OSError(28, "No space left on device"), StorageError, FREE_SPACE),
        (StorageError(f"page cannot be written. {FREE_SPACE}"), StorageError, FREE_SPACE),
        (
            ValueError("no such backend"),
            BugError,
            "this is a bug, not a mistake in what was typed: ValueError: no such backend",
        ),
    ],
)
def test_only_storage_errors_are_reported_as_such(
    error: Exception, kind: type[Exception], advice: str, tmp_path: Path
) -> None:
    writer = JournalWriter(tmp_path)
    writer.write(Entry(1, 1, 1.0, {"x": 1.0}))
    writer.close()
    with pytest.raises(kind) as raised, Recording(tmp_path, 0.0, None) as recording:
        recording.start(Broken(tmp_path, error))
    assert str(raised.value).count(advice) == 1
    assert "training finished and nothing is lost" in str(raised.value)
    if kind is BugError:
        assert raised.value.exit_code == 1  # type: ignore[attr-defined]
        (kept,) = re.findall(r"Its traceback is in (\S+)", str(raised.value))
        assert "raise self._error" in Path(kept).read_text()
        Path(kept).unlink()
    else:
        assert "traceback" not in str(raised.value)
