"""MLflow's environment variables are used if the command line sets nothing, and their values are checked."""

import pytest

from cifar_exp.config.mlflow_settings import VARIABLES, checked_address, variables_in, with_environment
from cifar_exp.config.reading import read_config
from cifar_exp.errors import ConfigError
from tests.helpers.configs import composed

SET = {
    "MLFLOW_TRACKING_URI": "http://me:hush@host:5000/",
    "MLFLOW_EXPERIMENT_NAME": "mine",
    "MLFLOW_RUN_NAME": "first",
    "MLFLOW_RUN_ID": "abc",
}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in VARIABLES.values():
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def tracking(*overrides: str) -> dict[str, str | None]:
    section = read_config(composed(*overrides)).tracking
    return {name: section.get(name) for name in VARIABLES}


def test_default_store_is_used_without_environment_variables(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("MLFLOW_TRACKING_URI", " ")  # empty ones are none
    assert tracking() == dict.fromkeys(VARIABLES) | {"experiment": "cifar-exp"}


def test_environment_overrides_default_and_command_line_overrides_both(
    environment: pytest.MonkeyPatch,
) -> None:
    for name, value in SET.items():
        environment.setenv(name, value)
    found = tracking()
    assert found == {
        "uri": "http://me:hush@host:5000",
        "experiment": "mine",
        "experiment_id": None,
        "run_name": "first",
        "run_id": "abc",
    }
    names = "MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME, MLFLOW_RUN_NAME, MLFLOW_RUN_ID"
    assert variables_in(found) == f"from {names}"
    typed = tracking("tracking.uri=sqlite:///x.db", "tracking.experiment=typed", "tracking.run_name=t")
    # The id in the environment is one of the other store.
    expected = {"uri": "sqlite:///x.db", "experiment": "typed", "run_name": "t", "run_id": None, "experiment_id": None}
    assert typed == expected
    assert variables_in(typed).count("is overridden") == 4
    assert tracking("experiment=reference")["experiment"] == "reference"


def test_experiment_id_is_used_if_no_name_is_given(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("MLFLOW_EXPERIMENT_ID", "7")
    assert (tracking()["experiment"], tracking()["experiment_id"]) == (None, "7")
    assert tracking("tracking.experiment=typed")["experiment_id"] is None
    environment.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    assert (tracking()["experiment"], tracking()["experiment_id"]) == ("mine", None)


def test_other_trackers_stay_as_they_are(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("MLFLOW_TRACKING_URI", "no address")
    section = {"_target_": "mine.Tracker", "uri": None}
    assert with_environment(section) == section
    assert tracking("tracking=none")["uri"] is None


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("file:///tmp/mlruns", "it is a folder"),
        ("./mlruns", "it is a folder"),
        ("ftp://host", "it must begin with one of"),
        ("localhost:5000", "it must begin with one of"),
        ("http://", "it has no host"),
        ("http://[::1", "it has no host"),
        ("http://host:99999", "it has no host"),
        (
            "http://me:hush@host:5/#/experiments/3",
            "it is the address of a page, not of the server. Set tracking.uri=http://host:5",
        ),
    ],
)
def test_invalid_address_is_refused_with_the_name_of_its_variable(
    environment: pytest.MonkeyPatch, uri: str, words: str
) -> None:
    environment.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(ConfigError, match=r"MLFLOW_TRACKING_URI=.*Set tracking\.uri=") as caught:
        tracking()
    assert words in str(caught.value)
    assert "hush" not in str(caught.value)


def test_trailing_slashes_of_an_address_are_ignored() -> None:
    assert checked_address("HTTP://host:5//", "x") == "http://host:5"
    assert checked_address("databricks", "x") == "databricks"
    assert checked_address("sqlite:////data/runs.db", "x") == "sqlite:////data/runs.db"
