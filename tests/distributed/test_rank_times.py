"""The time breakdown of each rank adds up, and a straggler is named."""

import pytest

from cifar_exp.distributed.data_parallel import Communication
from cifar_exp.distributed.link_speed import sent_bytes
from cifar_exp.distributed.rank_times import NAMES, RankTimes, by_rank, straggler

# compute, data, evaluation, hidden communication; then what each of four steps waited for gradients
ROWS = [
    [10.0, 1.0, 2.0, 0.5, 0.3, 0.4, 0.1, 0.6],
    [11.0, 1.5, 2.5, 0.6, 0.1, 0.1, 0.2, 0.1],
]


def test_waiting_time_of_the_slowest_rank_is_communication() -> None:
    times = RankTimes()
    times.add(ROWS)
    assert times.seconds["communication"] == pytest.approx([0.4, 0.4])
    assert times.seconds["waiting"] == pytest.approx([0.2 + 0.3 + 0.0 + 0.5, 0.1])
    assert times.seconds["compute"] == [10.0, 11.0]
    assert times.last == [1, 3]
    # Each rank's parts add up to what it has measured.
    for rank in range(2):
        exposed = times.seconds["communication"][rank] + times.seconds["waiting"][rank]
        assert exposed == pytest.approx(sum(ROWS[rank][4:]))


def test_epochs_add_up_and_go_through_a_checkpoint() -> None:
    times, again = RankTimes(), RankTimes()
    times.add(ROWS)
    again.load_state_dict(times.state_dict())
    again.add(ROWS)
    assert again.seconds["data"] == [2.0, 3.0]
    assert again.last == [2, 6]
    assert times.last == [1, 3]
    assert times.seconds["data"] == [1.0, 1.5]
    again.add(ROWS[:1])  # another number of ranks: theirs alone
    assert again.seconds["data"] == [1.0]


def test_metrics_are_named_by_rank_and_come_back() -> None:
    times = RankTimes()
    times.add(ROWS)
    metrics = times.metrics()
    assert metrics["rank_time/1/waiting"] == pytest.approx(0.1)
    assert metrics["rank_time/0/last_share"] == 0.25
    ranks = by_rank(metrics | {"time_split/step": 3.0})
    assert len(ranks) == 2
    assert set(ranks[0]) == {*NAMES, "last_share"}
    assert by_rank({"time_split/step": 3.0}) == []


def test_unmeasured_time_is_not_reported_as_zero() -> None:
    times = RankTimes()
    times.add([row[:4] for row in ROWS])
    assert [set(rank) for rank in by_rank(times.metrics())] == [{"compute", "data", "evaluation"}] * 2
    assert straggler(by_rank(times.metrics())) is None


def test_straggler_is_last_in_most_steps_and_delays_the_others() -> None:
    times = RankTimes()
    times.add(ROWS)
    assert straggler(by_rank(times.metrics())) == (
        "straggler: rank 1 came last in 75% of the steps; the others waited 8.1% of their training time for it"
    )
    even, quick = RankTimes(), RankTimes()
    even.add([[9.0, 1.0, 1.0, 0.0, 4.0, 0.0], [9.0, 1.0, 1.0, 0.0, 0.0, 4.0]])
    assert straggler(by_rank(even.metrics())) is None  # they wait for each other
    quick.add([[*row[:4], *(wait / 100 for wait in row[4:])] for row in ROWS])
    assert straggler(by_rank(quick.metrics())) is None  # last in most steps, and it costs nothing
    assert straggler([]) is None


def test_overlapped_communication_is_bucket_time_minus_exposed_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two buckets, from 0 and from 3 to 9; the backward pass ends at 10."""
    clock = iter([0.0, 3.0])
    monkeypatch.setattr("cifar_exp.distributed.data_parallel.time.perf_counter", lambda: next(clock))
    communication = Communication()
    communication.bucket_complete()
    communication.bucket_complete()
    monkeypatch.setattr("cifar_exp.distributed.data_parallel.time.perf_counter", lambda: 9.0)
    communication.bucket_averaged()
    communication.bucket_averaged()
    monkeypatch.setattr("cifar_exp.distributed.data_parallel.time.perf_counter", lambda: 10.0)
    communication.backward_done()
    communication.backward_done()  # of a micro-batch without gradients to average
    assert communication.take() == ([7.0], 2.0)
    assert communication.take() == ([], 0.0)


def test_ring_all_reduce_sends_nearly_twice_the_gradients() -> None:
    assert sent_bytes(100, 1) == 0
    assert sent_bytes(100, 2) == 100
    assert sent_bytes(100, 4) == 150
