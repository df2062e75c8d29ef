"""Show a run in the terminal and on its page, from the journal."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from cifar_exp.display import page, training_figure
from cifar_exp.display.curves import PageFacts
from cifar_exp.records.journal import Entry
from cifar_exp.records.run_folder import Status
from cifar_exp.system.surroundings import in_notebook

Mode = Literal["auto", "bar", "live", "lines", "quiet"]
LIVE_PAUSE = 1.0  # minimum seconds between updates of the live line, because a notebook stores every update
PAGE_PAUSE = 2.0  # minimum seconds between two updates of the page
PAGE_SHARE = 0.002  # maximum share of the time for updating the page


class Display:
    """Shows progress in the terminal or notebook, as a line per epoch, or not at all, and always draws the page."""

    def __init__(self, run_dir: Path, facts: PageFacts, mode: Mode, console: Console, started: float) -> None:
        self._run_dir, self._facts, self._console = run_dir, facts, console
        self._mode = suitable(console) if mode == "auto" else mode
        self._started = started
        self._entries: list[Entry] = []
        self.ended_early = ""  # why; the page says it at the end
        self._latest: dict[str, float] = {}
        self._next_page = 0.0
        self._bar: Progress | None = None
        self._line = LiveLine(console) if self._mode == "live" else None
        self._task = TaskID(0)

    def open(self) -> None:
        """Draw the empty page and bar."""
        self._draw_page("starting")
        self._next_page = time.monotonic() + PAGE_PAUSE  # not counted: it includes the import of Jinja2
        if self._mode == "bar":
            columns = (BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._task = self._bar.add_task("starting", total=self._facts.epochs * self._facts.steps_per_epoch)
            self._bar.start()

    def write(self, entries: Sequence[Entry]) -> None:
        """Show what is new."""
        self._entries += entries
        for entry in entries:
            self._latest |= entry.metrics
            if "val/accuracy" in entry.metrics:
                self._print_epoch(entry)
        if self._bar:
            self._bar.update(self._task, completed=entries[-1].step, description=self._state(entries[-1].epoch))
        if self._line and "step/loss" in entries[-1].metrics:
            self._line.show(self._state(entries[-1].epoch))
        if time.monotonic() >= self._next_page:
            self._draw_page("running")

    def _print_epoch(self, entry: Entry) -> None:
        if self._line:
            self._line.replace(short_epoch_line(entry, self._facts.epochs))
        elif self._mode in ("bar", "lines"):
            self._console.print(epoch_line(entry, self._facts.epochs), highlight=False)

    def close(self, status: Status) -> None:
        """Draw the final page and the figure."""
        if self._line:
            self._line.clear()
        if self._bar:
            self._bar.stop()
        ended = {"FINISHED": "finished", "FAILED": "failed", "KILLED": "stopped"}[status]
        self._facts = replace(self._facts, status=ended)
        if "stopped_epoch" in self._latest:  # nothing waits for the epochs that were left out
            done, planned = int(self._latest["stopped_epoch"]), self._facts.epochs
            stopped = {"epochs": f"{done} of {planned}: early stopping"}
            self._facts = replace(self._facts, epochs=done, details={**self._facts.details, **stopped})
            self.ended_early = "early stopping"
        if status == "FINISHED":
            self._facts = replace(self._facts, ended_early=self.ended_early)
        self._draw_page(ended)
        if self._entries:
            training_figure.draw_training(self._entries, self._facts, self._run_dir / "training.png")

    def is_final(self, error: Exception) -> bool:  # noqa: ARG002
        """Always true: a failed call is not repeated."""
        return True

    def _state(self, epoch: int) -> str:
        loss, accuracy = self._latest.get("step/loss"), self._latest.get("step/accuracy")
        if loss is None or accuracy is None:
            return f"epoch {epoch}/{self._facts.epochs}"
        rate = self._latest.get("step/images_per_second", 0.0)
        return f"epoch {epoch}/{self._facts.epochs}  loss {loss:.3f}  accuracy {accuracy:.3f}  {rate:,.0f} images/s"

    def _draw_page(self, status: str) -> None:
        began = time.monotonic()
        facts = PageFacts(**{**vars(self._facts), "status": status})
        page.write_progress_page(self._run_dir, self._entries, facts, time.monotonic() - self._started)
        cost = time.monotonic() - began
        self._next_page = began + max(PAGE_PAUSE, cost / PAGE_SHARE)


class LiveLine:
    """A line that is overwritten after a carriage return.

    Notebooks support no cursor codes, and without them rich needs ipywidgets, which this package does not require.
    """

    def __init__(self, console: Console) -> None:
        self._console, self._width, self._next = console, 0, 0.0

    def show(self, text: str) -> None:
        """Overwrite the line with ``text``, at most once per `LIVE_PAUSE`."""
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + LIVE_PAUSE
            self._write(f"\r{text:<{self._width}}")
            self._width = len(text)

    def replace(self, text: str) -> None:
        """Replace the line by ``text``, which stays; later output is written below it."""
        self._write(f"\r{text:<{self._width}}\n" if self._width else f"{text}\n")
        self._width = 0

    def clear(self) -> None:
        """Erase the line."""
        if self._width:
            self._write(f"\r{'':<{self._width}}\r")
            self._width = 0

    def _write(self, text: str) -> None:
        self._console.file.write(text)
        self._console.file.flush()


def suitable(console: Console) -> Literal["bar", "live", "lines"]:
    """The mode for progress=auto: live in a notebook, bar on a terminal, else lines."""
    if in_notebook():
        return "live"
    return "bar" if console.is_terminal and not console.is_dumb_terminal else "lines"


def short_epoch_line(entry: Entry, epochs: int) -> str:
    """One epoch in 80 characters: a notebook cell wraps longer lines."""
    metrics = entry.metrics
    return (
        f"epoch {entry.epoch:>{len(str(epochs))}}/{epochs}  loss {metrics['train/loss']:.3f}  "
        f"accuracy {metrics['train/accuracy']:.3f}  val accuracy {metrics['val/accuracy']:.3f}  "
        f"{metrics['images_per_second']:,.0f} images/s"
    )


def epoch_line(entry: Entry, epochs: int) -> str:
    """The line for one epoch."""
    metrics = entry.metrics
    return (
        f"epoch {entry.epoch:>{len(str(epochs))}}/{epochs}  loss {metrics['train/loss']:.4f}  "
        f"accuracy {metrics['train/accuracy']:.4f}  val loss {metrics['val/loss']:.4f}  "
        f"val accuracy {metrics['val/accuracy']:.4f}  lr {metrics['lr']:.4g}  "
        f"{metrics['images_per_second']:,.0f} images/s  {metrics['time/epoch_seconds']:.1f} s"
    )
