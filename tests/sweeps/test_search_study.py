"""The study of a search: the number of trials over several processes, interrupted trials, pruning, and the report."""

import csv
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from cifar_exp.distributed.rank_control import RankControl
from cifar_exp.distributed.stop_requests import STOP_FILE, StopPoint
from cifar_exp.errors import ConfigError, StorageError
from cifar_exp.records.journal import Entry, JournalWriter
from cifar_exp.sweeps.search_pruning import Pruning
from cifar_exp.sweeps.search_report import command, report
from cifar_exp.sweeps.search_space import Space
from cifar_exp.sweeps.search_study import TEST_ACCURACY, SearchSettings, SearchStudy

optuna = pytest.importorskip("optuna", reason="needs the package optuna (the extra cifar-exp[search])")


def settings(**changed: Any) -> SearchSettings:
    default: dict[str, Any] = {"n_trials": 3, "n_jobs": 1, "storage": None, "study": "search", "sampler": "tpe"}
    more: dict[str, Any] = {"pruner": "median", "startup_trials": 1, "warmup_epochs": 1, "seed": 0}
    return SearchSettings(**default | more | changed)


def study(folder: Path, words: str = "data.validation=0.1 lr=interval(0,1) w=1,2", **changed: Any) -> SearchStudy:
    folder.mkdir(exist_ok=True)
    space = Space.of(OverridesParser.create().parse_overrides(words.split()))
    return SearchStudy(settings(**changed), folder, space, space.fixed)


def started(search: SearchStudy) -> tuple[Any, list[str], bool]:
    found = search.next_trial()
    assert found
    return found


def test_an_interrupted_search_repeats_its_open_trial_with_the_same_values_and_then_goes_on(tmp_path: Path) -> None:
    first = study(tmp_path)
    trial, words, was_interrupted = started(first)
    assert (trial.number, was_interrupted) == (0, False)
    first.tell(trial, "COMPLETE", 0.5, {TEST_ACCURACY: 0.4})
    _, open_words, _ = started(first)  # and the process is killed

    again = study(tmp_path)
    trial, words, was_interrupted = started(again)
    assert (trial.number, words, was_interrupted) == (1, open_words, True)
    again.tell(trial, "FAIL", None, {"reason": "the loss is not finite"})
    trial, words, was_interrupted = started(again)
    assert (trial.number, was_interrupted) == (2, False)
    again.tell(trial, "COMPLETE", 0.3, {})
    assert again.next_trial() is None
    more = study(tmp_path, n_trials=4)
    assert started(more)[0].number == 3

    straight = study(tmp_path / "straight")  # the same values without an interruption
    trial, _, _ = started(straight)
    straight.tell(trial, "COMPLETE", 0.5, {})
    assert started(straight)[1] == open_words


def test_two_processes_share_the_trials_of_one_storage_and_leave_each_others_open_ones(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'both.db'}"
    first, second = study(tmp_path / "a", storage=storage), study(tmp_path / "b", storage=storage)
    trials = [started(search)[0] for search in (first, second, first)]
    assert [trial.number for trial in trials] == [0, 1, 2]
    assert second.next_trial() is None
    assert trials[0].params != trials[1].params
    again = study(tmp_path / "b", storage=storage)
    assert started(again)[0].number == 1  # its own
    assert again.next_trial() is None


def test_a_study_of_something_else_and_a_database_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    study(tmp_path)
    with pytest.raises(ConfigError, match=r"hydra\.sweeper\.study=search: .*Set hydra\.sweeper\.study=<another name>"):
        study(tmp_path, "data.validation=0.1 lr=interval(0,2) w=1,2")
    with pytest.raises(ConfigError, match="searches something else"):
        study(tmp_path, "data.validation=0.2 lr=interval(0,1) w=1,2")
    study(tmp_path, "data.validation=0.2 lr=interval(0,1) w=1,2", study="other")
    with pytest.raises(StorageError, match=r"sqlite:////nowhere/x\.db: the study cannot be read"):
        study(tmp_path, storage="sqlite:////nowhere/x.db")
    with pytest.raises(ConfigError, match="it is not the address of a database") as refused:
        study(tmp_path, storage="me:secret@nowhere")
    assert "Traceback" not in str(refused.value)


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"n_trials": 0}, "n_trials=0: it must be 1 or more"), ({"sampler": "x"}, "sampler=x: it must be tpe or random")],
)
def test_wrong_settings_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(**changed)


def write(folder: Path, accuracies: list[float]) -> None:
    folder.mkdir(exist_ok=True)
    with JournalWriter(folder) as journal:
        for epoch, accuracy in enumerate(accuracies, start=1):
            journal.write(Entry(10 * epoch, epoch, 1.0, {"val/accuracy": accuracy}))


def test_a_trial_below_the_median_gets_a_stop_file_with_the_reason_which_the_ranks_report(tmp_path: Path) -> None:
    search = study(tmp_path)
    pruning = Pruning(search)
    trial, _, _ = started(search)
    write(tmp_path / "0", [0.4, 0.6])
    pruning.begin(trial, tmp_path / "0")
    assert pruning.end(trial) == ""
    search.tell(trial, "COMPLETE", 0.6, {})

    bad, _, _ = started(search)
    write(tmp_path / "1", [0.1, 0.2])
    pruning.begin(bad, tmp_path / "1")
    pruning._report(pruning._running[1], may_prune=True)
    reason = "pruned: validation accuracy 0.2000 after epoch 2, median of the completed trials 0.6000"  # not in epoch 1
    assert (tmp_path / "1" / STOP_FILE).read_text() == reason
    control = RankControl(tmp_path, tmp_path / "1")
    control.approach(StopPoint(25))
    request = control.agreed(StopPoint(25))
    assert request
    assert (request.kind, request.reason) == ("stop", reason)
    assert pruning.end(bad) == reason

    late, _, _ = started(search)
    write(tmp_path / "2", [0.1, 0.2])
    pruning.begin(late, tmp_path / "2")
    pruning._report(pruning._running[2], may_prune=True)
    assert pruning.end(late) == ""  # it had ended before it read the file, so it is complete
    assert not (tmp_path / "2" / STOP_FILE).exists()


def test_the_report_names_the_best_completed_trial_and_its_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    search = study(tmp_path, "data.validation=0.1 resume=auto x=[a,b] lr=interval(0,1) w=1,2", n_trials=9)
    ends: list[tuple[Any, float | None]] = [("COMPLETE", 0.5), ("PRUNED", 0.9), ("COMPLETE", 0.7), ("FAIL", None)]
    for state, accuracy in ends:
        trial, _, _ = started(search)
        if accuracy:
            trial.report(accuracy, 2)
        search.tell(trial, state, accuracy, {TEST_ACCURACY: 0.65})
    metrics, files = report(search, tmp_path, quiet=False)
    assert metrics == [
        ("search/val_accuracy", 0.5, 0),
        ("search/best_val_accuracy", 0.5, 0),
        ("search/val_accuracy", 0.7, 2),
        ("search/best_val_accuracy", 0.7, 2),
    ]
    best = search.trials()[2]
    line = f"cifar-exp data.validation=0.1 'x=[a,b]' lr={best.params['lr']!r} w={best.params['w']}"
    assert command(search, best).endswith(line)
    printed = capsys.readouterr().out
    assert "best: trial 2, validation accuracy 0.7000. It is the highest of 2" in printed
    assert "its test accuracy is 0.6500" in printed
    assert line in printed
    rows = list(csv.DictReader(files[0].open()))
    assert [(row["trial"], row["result"], row["val_accuracy"]) for row in rows] == [
        ("0", "done", "0.5"),
        ("1", "pruned", "0.9"),
        ("2", "done", "0.7"),
        ("3", "failed", ""),
    ]


def test_importances_need_a_few_trials_and_find_the_setting_that_matters(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="needs scikit-learn")
    search = study(tmp_path, n_trials=12, sampler="random")
    for _ in range(12):
        assert search.importances() == {} or len(search.trials()) >= 4
        trial, _, _ = started(search)
        search.tell(trial, "COMPLETE", trial.params["lr"], {})
    shares = search.importances()
    assert shares["lr"] > 0.9
    assert sum(shares.values()) == pytest.approx(1)
