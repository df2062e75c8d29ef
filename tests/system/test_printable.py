"""Names that other people chose cannot move the cursor, recolour the terminal, or forge a line of the log."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table

from cifar_exp.cli.predict import _classify
from cifar_exp.config.messages import shown
from cifar_exp.display.curves import PageFacts
from cifar_exp.display.page import page_html
from cifar_exp.study import finished_runs, report_page
from cifar_exp.study.run_result import RunResult
from cifar_exp.system.printable import print_notice, printable, printable_text
from cifar_exp.system.redaction import MaskingFormatter
from cifar_exp.system.terminal import Terminal

EVIL = "a\x1b[2J\r\nb\x07[/x] :smile: \u202e\udcff.png"
ON_ONE_LINE = r"a\x1b[2J\r\nb\x07[/x] :smile: \u202e\xff.png"
IN_A_TEXT = "a\\x1b[2J\\r\nb\\x07[/x] :smile: \\u202e\\xff.png"


def test_only_control_characters_are_escaped() -> None:
    assert printable(EVIL) == ON_ONE_LINE
    assert printable_text(EVIL) == IN_A_TEXT
    assert printable("\x9b31m\x85\u2028\t\x7f") == r"\x9b31m\x85\u2028\t\x7f"
    for harmless in ("żaba 猫.png", "no\N{NO-BREAK SPACE}break", r"C:\x1b", "👩‍🔬", "می‌خواهم"):
        assert printable(harmless) == harmless
    assert printable(Path("a/b\n")) == r"a/b\n"


@given(st.text())
def test_nothing_unprintable_is_left_and_escaping_twice_changes_nothing(name: str) -> None:
    escaped = printable(name)
    assert not any(ord(character) < 32 or 127 <= ord(character) < 160 for character in escaped)
    assert len(escaped.splitlines()) <= 1
    assert printable(escaped) == escaped
    escaped.encode()  # no lone surrogate


def test_the_terminal_shows_them_in_lines_and_tables(capsys: pytest.CaptureFixture[str]) -> None:
    console = Terminal(soft_wrap=True, width=200)
    console.print(EVIL, highlight=False)
    table = Table(title=EVIL)
    table.add_column(EVIL)
    table.add_row(EVIL)
    console.print(table)
    print_notice(EVIL)
    output, errors = capsys.readouterr()
    assert output.startswith(f"{IN_A_TEXT}\n")
    assert output.count(r"a\x1b[2J\r") == 4
    assert output.count(":smile:") == 4
    assert "\x1b" not in output
    assert errors == f"cifar-exp: {IN_A_TEXT}\n"


def test_the_log_shows_them() -> None:
    record = logging.LogRecord("x", logging.INFO, "x.py", 1, "%s", (EVIL,), None)
    assert MaskingFormatter("%(message)s").format(record) == IN_A_TEXT


def test_pages_show_them() -> None:
    facts = PageFacts(EVIL, "running", 2, 3, [], {"folder": EVIL})
    page = page_html([], facts, 1.0)
    assert page.count(r"a\x1b[2J\r") == 3
    assert "\x1b" not in page


def test_reports_show_them(tmp_path: Path) -> None:
    (tmp_path / "figure.png").write_bytes(b"")
    sections: list[report_page.Section] = [(EVIL, [["figure"], [EVIL]], [EVIL])]
    page = report_page.report_html(EVIL, tmp_path / "figure.png", sections, [EVIL])
    assert page.count(r"a\x1b[2J\r") == 7
    assert "\x1b" not in page
    assert "<style>" in page


def test_group_names_of_a_foreign_sweep_are_printable(monkeypatch: pytest.MonkeyPatch) -> None:
    result = RunResult(1, 256, 1000.0, 50.0, 0.5)
    monkeypatch.setattr(finished_runs, "RunResult", SimpleNamespace(of=lambda *_: result))
    runs = [
        finished_runs.FinishedRun({"overrides": f"seed=1 model.name={name}"}, {"test/accuracy": 0.5})
        for name in ("plain", EVIL)
    ]
    assert finished_runs.results_by_group(runs) == {"plain": [result], ON_ONE_LINE: [result]}


def test_values_of_settings_are_shown_on_one_line() -> None:
    assert shown(EVIL) == ON_ONE_LINE


def test_prediction_prints_a_line_an_image_whatever_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    classifier: Any = SimpleNamespace(
        read=lambda _path: torch.zeros(3, 2, 2, dtype=torch.uint8),
        label=lambda images: [("cat\n\x1b[m", 0.5)] * len(images),
    )
    assert _classify(classifier, [Path(EVIL)], as_json=False) == []
    assert capsys.readouterr().out == ON_ONE_LINE + "  cat\\n\\x1b[m  50.0%\n"
    assert _classify(classifier, [Path(EVIL)], as_json=True) == []
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line) == {"image": EVIL, "label": "cat\n\x1b[m", "probability": 0.5}
