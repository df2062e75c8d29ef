"""No test imports another test: shared code is in ``tests/helpers/``."""

import ast
from pathlib import Path

import pytest

from tests.conftest import REPO

MODULES = sorted((REPO / "tests").rglob("*.py"))


def imports_of_tests(source: str) -> set[str]:
    """The modules of ``tests`` that a module imports, and the names that it imports from them, as dotted names."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            origin = f"{'.' * node.level}{node.module or ''}"
            found |= {f"{origin}.{name.name}" for name in node.names}
    return {name for name in found if name.startswith((".", "tests."))}


def is_shared(name: str, folder: str) -> bool:
    """Whether a module in ``folder``, such as ``tests.runs``, may import ``name``."""
    return name.startswith(("tests.conftest.", "tests.helpers.", f"{folder}.")) and ".test_" not in name


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(REPO).as_posix())
def test_a_test_imports_no_other_test(path: Path) -> None:
    folder = ".".join(path.relative_to(REPO).parent.parts)
    assert [name for name in sorted(imports_of_tests(path.read_text())) if not is_shared(name, folder)] == []


@pytest.mark.parametrize(
    "line",
    [
        "from tests.training.test_gpu_step import MEAN",
        "from tests.runs import test_resume",
        "from tests.faults.runs import curve",
        "import tests.platforms.environments",
        "def f():\n    from tests.runs.test_run import x",
        "from . import test_resume",
    ],
)
def test_import_of_another_test_is_detected(line: str) -> None:
    (name,) = imports_of_tests(line)
    assert not is_shared(name, "tests.runs")
