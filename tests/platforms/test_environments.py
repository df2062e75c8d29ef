"""The list of surroundings that people run this in, with real commands in the quick ones."""

from pathlib import Path

import pytest

from tests.platforms.environments import ENVIRONMENTS, Environment, left_behind, try_in


@pytest.mark.parametrize("environment", [known for known in ENVIRONMENTS if known.quick], ids=lambda known: known.name)
def test_a_sweep_works_in(environment: Environment, tmp_path: Path) -> None:
    """The others are tried by ``python -m tests.platforms.environments``. What takes root is tried by root."""
    outcome = try_in(environment, tmp_path)
    assert not outcome.problem, outcome.problem
    assert outcome.not_run in ("", "takes root")
    assert outcome.not_run or len(outcome.accuracies) == 4, "two jobs, and both numbers of devices of their parent"


def test_leftover_files_are_detected(tmp_path: Path) -> None:
    for name in ("home/.cache/cifar-exp/numba", "work/outputs/a", "work/~", "tmp/x"):
        (tmp_path / name).mkdir(parents=True)
    assert [path.relative_to(tmp_path).as_posix() for path in left_behind(tmp_path, tmp_path / "work")] == [
        "tmp/x",
        "work/~",
    ]
