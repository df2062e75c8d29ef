"""The quick part of the fault suite. All faults: ``uv run python -m tests.faults``."""

import re
from pathlib import Path

import pytest

from tests.conftest import REPO
from tests.faults.cases import CASES
from tests.faults.registry import Case
from tests.faults.scene import Suite
from tests.faults.table import run_case

QUICK = [case for case in CASES if case.quick]


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    """One suite for all cases, so that they share the uninterrupted runs."""
    return Suite(tmp_path_factory.mktemp("faults"), seed=0, repeat=1)


@pytest.mark.parametrize("case", QUICK, ids=lambda case: case.name)
def test_fault_is_handled(case: Case, suite: Suite) -> None:
    for row in run_case(case, suite):
        if not row.times:
            pytest.skip(row.next_start)
        assert not row.problem, row.problem
        assert row.handled == row.times, row.fault


def test_fault_names_are_unique_and_every_case_is_registered() -> None:
    names = [fault for case in CASES for fault in case.faults]
    assert len(names) == len(set(names)) >= 60
    functions = {case.name for case in CASES}
    written = re.findall(r"^@case\(", "".join(p.read_text() for p in Path(REPO, "tests/faults").glob("*.py")), re.M)
    assert len(functions) == len(written)
