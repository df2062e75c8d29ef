"""Hydra's own suites for launchers and sweepers, run against the sweeper of this project.

They compose small configurations of Hydra's, which have none of this project's settings.
"""

import subprocess
from pathlib import Path
from typing import Any

import pytest
from hydra.core.plugins import Plugins
from hydra.test_utils.launcher_common_tests import BatchedSweeperTestSuite, IntegrationTestSuite, LauncherTestSuite

from tests.helpers.commands import ForkedCommand

OURS = ("hydra/sweeper=study", "hydra.job.chdir=true")  # as Hydra 1.1 did, which the suites expect


@pytest.fixture(scope="module", autouse=True)
def _plugins() -> None:
    """The suites restore the state of Hydra as it was before each test: with the plugins, which are loaded once."""
    Plugins.instance()


@pytest.mark.parametrize(("launcher_name", "overrides"), [("basic", [*OURS])])
class TestOneBatch(LauncherTestSuite):
    """All jobs in one batch."""


@pytest.mark.parametrize(("launcher_name", "overrides"), [("basic", [*OURS, "hydra.sweeper.max_batch_size=2"])])
class TestBatches(BatchedSweeperTestSuite):
    """Two jobs a batch."""


@pytest.mark.parametrize(
    ("task_launcher_cfg", "extra_flags"), [({"defaults": [{"override hydra/sweeper": "study"}]}, ["-m"])]
)
class TestProgram(IntegrationTestSuite):
    """Another program that chose the sweeper."""

    @pytest.fixture(autouse=True)
    def forked(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The suite starts each program with a new interpreter, which would import Hydra for seconds."""

        def check_call(command: list[str], **_: Any) -> None:
            program = ForkedCommand("tests.helpers.python_program", tuple(command[1:]), Path.cwd())
            output, errors = program.communicate(100)
            assert program.returncode == 0, output + errors

        monkeypatch.setattr(subprocess, "check_call", check_call)
