"""The notebook runs from the first cell to the last in a real kernel, and is stored without outputs."""

import json
import shutil
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests.conftest import REPO

NOTEBOOK = REPO / "examples" / "quickstart.ipynb"
TINY = "data.train_count=96 data.test_count=64 train.batch_size=16 train.epochs=2 model.width=4 model.depth=1"


def test_notebook_has_no_outputs_and_no_machine_paths() -> None:
    text = NOTEBOOK.read_text(encoding="utf-8")
    for cell in json.loads(text)["cells"]:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
    assert not any(part in text for part in (*(f"/{name}/" for name in ("home", "root", "Users", "tmp")), "C:\\"))


@pytest.mark.timeout(600)
def test_notebook_runs_from_the_first_cell_to_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "examples").mkdir()
    shutil.copy(NOTEBOOK, tmp_path / "examples")
    monkeypatch.setenv("QUICKSTART_SETTINGS", TINY)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.delenv("PYTEST_CURRENT_TEST")  # a kernel that sees it leaves what its commands print to pytest
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cells = [cell for cell in notebook.cells if "%pip" not in cell.source]  # it is installed already
    assert len(cells) == len(notebook.cells) - 1
    notebook.cells = cells
    NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(tmp_path / "examples")}}).execute()

    code = {cell.source.partition("\n")[0]: cell.outputs for cell in cells if cell.cell_type == "code"}
    training, sweep, figure, _, labels = list(code.values())[1:]
    page = text_of(training, "text/html")
    assert "badge finished" in page, "the page as it is at the end"
    output = streamed(training)
    assert "epoch 2/2" in output
    assert "\x1b[" not in "".join(line for line in output.splitlines() if "epoch" in line)
    assert "Speedup" in streamed(sweep)
    assert text_of(figure, "image/png")
    assert streamed(labels).count("%") == 10
    assert len([output for output in labels if output.output_type == "display_data"]) == 10


def streamed(outputs: list[Any]) -> str:
    return "".join(output.text for output in outputs if output.output_type == "stream")


def text_of(outputs: list[Any], kind: str) -> str:
    """The last output of that kind."""
    return [str(output.data[kind]) for output in outputs if kind in output.get("data", {})][-1]
