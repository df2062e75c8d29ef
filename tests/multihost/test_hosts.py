"""One run over two hosts: the same result as on one, and a right end whatever happens to a host or to the cable."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cifar_exp.records.journal import last_values
from tests.conftest import TINY
from tests.conftest import Command as RunCommand
from tests.helpers.hosts import HERE, Command, Host, hosts, refused, steps, wait_for
from tests.helpers.paced import ENDLESS

SHORT = [*(word for word in TINY if not word.startswith("devices.count")), *HERE]
LONG = [*(word for word in ENDLESS if not word.startswith("devices.count")), *HERE]
pytestmark = pytest.mark.skipif(bool(why := refused()), reason=f"NOT RUN: {why}")


@pytest.fixture
def two() -> Iterator[tuple[Host, Host]]:
    """Two hosts."""
    with hosts(2) as (first, second):
        yield first, second


def trained_together(two: tuple[Host, Host], *words: str, hosts: object = 2) -> tuple[Command, Command]:
    """Start a long run on both hosts and wait until it trains."""
    other, first = (host.start(*LONG, *words, hosts=hosts) for host in reversed(two))
    wait_for(lambda: steps(two[0]) > 3, first, other)
    return first, other


def test_two_hosts_train_what_one_trains_bit_for_bit(
    two: tuple[Host, Host], cifar_exp: RunCommand, workplace: Path
) -> None:
    other, first = two[1].start(*SHORT), two[0].start(*SHORT)
    one = cifar_exp(*SHORT)
    assert one.returncode == 0, one.stderr
    assert [command.ended()[0] for command in (first, other)] == [0, 0]
    ours = load_file(two[0].folder / "run" / "model.safetensors")
    theirs = load_file(workplace / "run" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert [name for name, value in ours.items() if not torch.equal(value, theirs[name])] == []
    assert not (two[1].folder / "run").exists()
    assert (first.left_behind, other.left_behind) == ([], [])


@pytest.mark.long
def test_the_best_networks_accuracy_needs_no_checkpoint_on_other_hosts(two: tuple[Host, Host]) -> None:
    # With this learning rate and seed the last epoch is not the best one.
    words = (*SHORT, "data.validation=0.3", "optimizer.lr=0.3", "train.epochs=8", "seed=1", "train.batch_size=16")
    commands = [host.start(*words) for host in reversed(two)]
    assert [command.ended()[0] for command in commands] == [0, 0]
    found = last_values(two[0].folder / "run")
    assert found["best_epoch"] < 8
    assert 0 <= found["test/accuracy_best"] <= 1


def test_a_host_that_differs_is_refused_on_both(two: tuple[Host, Host]) -> None:
    first = two[0].start(*SHORT)
    other = two[1].start(*SHORT, "train.epochs=3")
    (code, message), (other_code, other_message) = first.ended(), other.ended()
    assert (code, other_code) == (2, 2)
    assert "host 1: it differs in train.epochs (3 there, 2 here)" in message
    assert "train.epochs" in other_message
    assert not (two[0].folder / "run").exists()


@pytest.mark.long
def test_a_host_without_the_token_is_refused_and_host_0_waits_for_another(two: tuple[Host, Host]) -> None:
    first = two[0].start(*SHORT, "launcher.timeout=25")
    code, message = two[1].start(*SHORT, token="another").ended()
    assert code == 4
    assert "another token" in message
    code, message = first.ended()
    assert code == 4
    assert "launcher.hosts=2: host 1 has not come in launcher.timeout=25 s" in message


def test_a_killed_host_is_named_and_the_run_goes_on_when_it_is_back(two: tuple[Host, Host]) -> None:
    words = ("launcher.max_restarts=1", "train.epochs=60")
    first, other = trained_together(two, *words)
    other.kill()
    code = two[1].start(*LONG, *words).ended()[0]
    ended, message = first.ended()
    assert (ended, code) == (0, 0)
    assert "host 1 is lost" in message
    assert "restart 1: training resumes from step" in message
    assert first.left_behind == []


@pytest.mark.long
def test_a_cut_cable_ends_the_run_on_both_hosts(two: tuple[Host, Host]) -> None:
    first, other = trained_together(two)
    two[1].cut()
    (code, message), (other_code, other_message) = first.ended(), other.ended()
    assert (code, other_code) == (7, 7)
    assert "host 1 is lost" in message
    assert "host 0 is lost" in other_message
    assert (first.left_behind, other.left_behind) == ([], [])


@pytest.mark.long
def test_a_killed_host_is_not_needed_if_fewer_will_do(two: tuple[Host, Host]) -> None:
    first, other = trained_together(two, "launcher.max_restarts=1", "train.epochs=60", hosts="1:2")
    other.kill()
    code, message = first.ended()
    assert code == 0
    assert "host 1 is lost" in message


@pytest.mark.long
def test_sigterm_on_one_host_saves_and_stops_all(two: tuple[Host, Host]) -> None:
    first, other = trained_together(two)
    other.signal(signal.SIGTERM)
    (code, message), (other_code, _) = first.ended(), other.ended()
    assert (code, other_code) == (143, 143)
    assert "host 1: stopped by signal 15" in message
    assert list((two[0].folder / "run" / "checkpoints").glob("*.pt"))
    assert (first.left_behind, other.left_behind) == ([], [])


@pytest.mark.long
def test_a_hung_rank_of_another_host_is_named(two: tuple[Host, Host]) -> None:
    first, other = trained_together(two, "launcher.timeout=25")
    (rank,) = [each for each in other.processes if each.parent().parent() == other.main]
    rank.suspend()
    (code, message), (other_code, _) = first.ended(), other.ended()
    assert (code, other_code) == (7, 7)
    assert "host 1: rank 1 hung after step" in message
