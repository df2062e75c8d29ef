"""All documents and settings have the same first commands and the same list of supported Pythons."""

import re
import tomllib

import yaml

from tests.conftest import REPO

NOX = (REPO / "noxfile.py").read_text()
WORKFLOW = (REPO / ".github" / "workflows" / "test.yml").read_text()
README = (REPO / "README.md").read_text()
INSTALL = (REPO / "docs" / "install.md").read_text()


def first_block(text: str) -> list[str]:
    """Lines of the first block of commands, comments taken off."""
    found = re.search(r"```sh\n(.*?)```", text, re.DOTALL)
    assert found
    return [line.partition(" #")[0].strip() for line in found[1].splitlines()]


def test_the_first_two_commands_need_no_pip_of_the_distribution() -> None:
    """PEP 668: what a distribution's own pip refuses is done in an environment."""
    commands = first_block(README.partition("## Start")[2])
    assert len(commands) == 2
    made, entered, installed = (part.strip() for part in commands[0].split("&&"))
    assert (made, entered, installed) == ("python3 -m venv .venv", ". .venv/bin/activate", "pip install uv")
    assert commands == first_block(INSTALL)


def test_uv_survives_a_synchronization_of_the_environment_that_it_lies_in() -> None:
    project = tomllib.loads((REPO / "pyproject.toml").read_text())
    assert any(name.startswith(("nox[uv]", "uv>")) for name in project["dependency-groups"]["dev"])


def test_every_supported_python_is_in_the_matrix() -> None:
    found = re.search(r"^PYTHONS = \((.*)\)$", NOX, re.MULTILINE)
    assert found
    pythons = re.findall(r'"([\d.]+)"', found[1])
    assert pythons == ["3.11", "3.12", "3.13", "3.14"]
    hosted = re.search(r"^ +python: \[(.*)\]$", WORKFLOW, re.MULTILINE)
    assert hosted
    assert re.findall(r'"([\d.]+)"', hosted[1]) == pythons
    for text in (README, INSTALL):
        assert f"{pythons[0]} to {pythons[-1]}" in text


def test_workflow_covers_each_supported_system_and_the_refusal_of_windows() -> None:
    jobs = yaml.safe_load(WORKFLOW)["jobs"]
    assert jobs["tests"]["strategy"]["matrix"]["system"] == ["ubuntu-24.04", "ubuntu-24.04-arm", "macos-latest"]
    assert jobs["windows"]["runs-on"] == "windows-latest"
    assert 'test "$code" = 2' in jobs["windows"]["steps"][-1]["run"]
    assert all(system in README for system in ("Linux", "macOS", "WSL2"))


def test_the_workflow_calls_sessions_that_exist() -> None:
    named = re.findall(r"session: ([a-z0-9-]+?)(?:-3\.\d+)?[,}]", WORKFLOW)
    sessions = {name.replace("_", "-") for name in re.findall(r"^def (\w+)\(session: ", NOX, re.MULTILINE)}
    assert len(named) >= 6
    assert set(named) <= sessions
    assert {"lowest", "newest", "hydra-rc", "wheel", "environments", "arm", "avx2", "macos"} <= sessions
    assert ".ci/run" in WORKFLOW


def test_the_emulated_processor_is_the_same_in_the_session_and_in_the_benchmark() -> None:
    settings = dict(re.findall(r'^ +"([A-Z0-9_]+)": "(.*)",$', NOX, re.MULTILINE))
    measured = dict(re.findall(r'^ +"([A-Z0-9_]+)": "(.*)",$', (REPO / "benchmarks/avx2.py").read_text(), re.MULTILINE))
    assert settings.items() <= measured.items()
    assert settings["ONEDNN_MAX_CPU_ISA"] == "AVX2"
