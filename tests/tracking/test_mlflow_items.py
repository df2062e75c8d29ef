"""Names and values that MLflow refuses are cleaned or cut. One refused item does not affect the others."""

import time
from pathlib import Path
from typing import Any

import pytest
from mlflow.entities import Param
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import BAD_REQUEST, INTERNAL_ERROR, INVALID_PARAMETER_VALUE

from cifar_exp.records.journal import Entry
from cifar_exp.records.run_folder import RunInfo
from cifar_exp.tracking.mlflow_items import MetricNames, allowed_name, log_each, with_allowed_names
from cifar_exp.tracking.mlflow_tracker import MLflowTracker

NAMES = {
    "model.weights.cat (big)": "model.weights.cat _big_",
    "data.classes[0]": "data.classes_0_",
    "a b:c": "a b:c",
    "größe": "größe",
    "new\nline": "new_line",
    "/abs": "_/abs",
    "a//b": "a/_/b",
    "../up": "__/up",
    "a/": "a/_",
    "": "_",
    "\ud800": "_",
}


@pytest.mark.parametrize(("name", "expected"), NAMES.items())
def test_invalid_mlflow_name_is_cleaned(name: str, expected: str) -> None:
    assert allowed_name(name) == expected


def test_names_stay_different_and_values_are_cut() -> None:
    cleaned = with_allowed_names({"k=v": 1, "k@v": 2, "k_v": 3, "x" * 300: 4, "x" * 301: 5, "long": "v" * 7000})
    assert list(cleaned.values())[:5] == ["1", "2", "3", "4", "5"]
    assert cleaned["k_v"] == "3"
    assert len(cleaned) == 6
    assert max(map(len, cleaned)) == 250
    assert cleaned["long"] == "v" * 5996 + " ..."


@pytest.mark.usefixtures("store")
def test_mlflow_accepts_all_cleaned_items(workplace: Path) -> None:
    folder = workplace / "run"
    folder.mkdir()
    params = {**dict.fromkeys(NAMES, 1), "n" * 400: 1, "long": "v" * 7000, "empty": ""}
    tags = {**dict.fromkeys(NAMES, "x"), "overrides": "o" * 9000}
    run = RunInfo("a run", folder, params, tags, time.time())
    run.save("hash")
    tracker = MLflowTracker()
    for _ in range(2):  # MLflow does not allow params to change
        sink = tracker.sink(run)
        sink.open()
        sink.write([Entry(1, 1, 0.5, {name: 1.0 for name in NAMES if name != "\ud800"})])
        sink.close("FINISHED")
    assert sink.run_id
    stored = tracker.client().get_run(sink.run_id)
    assert stored.info.status == "FINISHED"
    assert len(stored.data.params) == len(params)
    assert set(NAMES.values()) <= set(stored.data.params)
    assert set(NAMES.values()) <= set(stored.data.metrics)
    assert {**stored.data.tags}["data.classes_0_"] == "x"
    assert len(stored.data.tags["overrides"]) == 6000


def test_metrics_keep_different_names() -> None:
    names = MetricNames()
    names.add(["a?b", "a*b", "a_b"])
    names.add(["a?b", "c?d"])
    names.add(["a*b", "c_d", "x" * 300, "x" * 301])
    assert [names["a_b"], names["c?d"]] == ["a_b", "c_d"]
    given = {names[name] for name in ("a?b", "a*b", "a_b", "c?d", "c_d", "x" * 300, "x" * 301)}
    assert len(given) == 7
    assert all(allowed_name(name) == name for name in given)


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize("sent", [0, 1, 3])
def test_metrics_with_equal_cleaned_names_do_not_merge(workplace: Path, sent: int) -> None:
    """The run and `cifar-exp sync` choose the same names."""
    folder = workplace / "run"
    folder.mkdir()
    run = RunInfo("a run", folder, {}, {}, time.time())
    run.save("hash")
    entries = [
        Entry(1, 1, 0.1, {"a?b": 1.0}),
        Entry(1, 1, 0.1, {"a*b": 2.0}),
        Entry(2, 1, 0.2, {"a*b": 3.0, "a_b": 4.0}),
    ]
    live = MLflowTracker().sink(run)
    live.open()
    for entry in entries[:sent]:
        live.write([entry])
    later = MLflowTracker().sink(run)
    later.open()
    missing = later.missing(entries)
    assert sum(len(entry.metrics) for entry in missing) == [4, 3, 0, 0][sent]
    later.write(missing)
    assert later.missing(entries) == []
    assert later.run_id
    client, names = MLflowTracker().client(), MetricNames()
    for entry in entries:
        names.add(entry.metrics)
    found = {
        name: [(point.step, point.value) for point in client.get_metric_history(later.run_id, names[name])]
        for name in ("a?b", "a*b", "a_b")
    }
    assert names["a?b"] == "a_b"
    assert found == {"a?b": [(1, 1.0)], "a*b": [(1, 2.0), (2, 3.0)], "a_b": [(2, 4.0)]}


def refusing(bad: set[str], longest: int, code: int = INVALID_PARAMETER_VALUE) -> tuple[list[Param], Any]:
    """The items that a server accepted, and its log function, which refuses the names in ``bad`` and longer values."""
    accepted: list[Param] = []

    def log(params: list[Param]) -> None:
        if any(param.key in bad or len(param.value) > longest for param in params):
            raise MlflowException("no", code)
        accepted.extend(params)

    return accepted, log


def test_refused_item_does_not_affect_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    params = [Param(f"p{number}", "v") for number in range(250)] + [Param("long", "v" * 4000)]
    accepted, log = refusing({"p7", "p200"}, longest=500)
    reported: set[str] = set()
    for _ in range(2):
        log_each(params, 100, log, reported)
    kept = {param.key: param.value for param in accepted}
    assert set(kept) == {param.key for param in params} - {"p7", "p200"}
    assert kept["long"] == "v" * 496 + " ..."  # an older server's limit
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(",")[0] for line in lines] == [
        "cifar-exp: MLflow refuses the param p7",
        "cifar-exp: MLflow refuses the param p200",
    ]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (INTERNAL_ERROR, "the server is away"),
        (BAD_REQUEST, "no such table: params"),
        (INVALID_PARAMETER_VALUE, "The run x must be in the 'active' state. Current state is deleted."),
    ],
)
def test_error_about_the_whole_request_is_raised(code: int, message: str) -> None:
    def log(_: object) -> None:
        raise MlflowException(message, code)

    with pytest.raises(MlflowException, match=message):
        log_each([Param("a", "1"), Param("b", "2")], 100, log, set())
