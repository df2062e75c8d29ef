"""The formulas of benchmarks/scaling_simulator.py against closed forms, and its random draws against both."""

import importlib
import math
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from benchmarks import scaling_formulas as sim
from cifar_exp.records.journal import Entry, JournalWriter

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
LINK = sim.Link(latency=1e-5, bandwidth=1e9)


@pytest.fixture
def simulator(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module; scripts of that folder import each other by name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("scaling_simulator")


def test_ring_sends_the_bytes_and_takes_the_steps_of_its_closed_form() -> None:
    assert sim.ring_seconds(1e6, 1, LINK) == 0
    assert sim.ring_seconds(1e6, 2, LINK) == pytest.approx(2e-5 + 1e-3)  # each sends half, twice
    for ranks in (3, 8, 512):
        sent = 2 * (ranks - 1) / ranks * 1e6
        assert sim.ring_seconds(1e6, ranks, LINK) == pytest.approx(2 * (ranks - 1) * 1e-5 + sent / 1e9)


def test_tree_has_logarithmic_latency_and_the_rings_limit_of_bytes() -> None:
    assert sim.tree_seconds(1e6, 1, LINK) == 0
    for ranks, depth in ((2, 1), (5, 3), (8, 3), (512, 9)):
        assert sim.tree_seconds(1e6, ranks, LINK) == pytest.approx(2 * depth * 1e-5 + 2e-3)
    small, large = 1e3, 1e9
    assert sim.tree_seconds(small, 512, LINK) < sim.ring_seconds(small, 512, LINK) / 50
    assert sim.tree_seconds(large, 512, LINK) == pytest.approx(sim.ring_seconds(large, 512, LINK), rel=0.01)


def test_allreduce_over_hosts_is_a_ring_inside_and_the_better_of_both_between() -> None:
    cluster = sim.Cluster(inside=sim.Link(0, 1e9), between=sim.Link(0, 1e8), ranks_per_host=4)
    assert cluster.allreduce_seconds(4e6, 4) == pytest.approx(sim.ring_seconds(4e6, 4, cluster.inside))
    # 6 MB inside at 1 GB/s; between two hosts each rank averages 1 MB at 100 MB/s.
    assert cluster.allreduce_seconds(4e6, 8) == pytest.approx(6e-3 + 1e-2)
    assert sim.Cluster(LINK, LINK, 1).allreduce_seconds(1e6, 2) == pytest.approx(sim.ring_seconds(1e6, 2, LINK))


@pytest.mark.parametrize(
    ("ready", "seconds", "exposed"),
    [
        ([10.0], [3.0], 3.0),  # one bucket after the pass: all of it
        ([5.0, 10.0], [2.0, 1.0], 1.0),  # the first is hidden
        ([5.0, 6.0, 10.0], [6.0, 1.0, 1.0], 3.0),  # the link is the limit: 5 + 8 - 10
        ([1.0, 2.0], [1.0, 1.0], 0.0),
    ],
)
def test_communication_is_exposed_from_the_end_of_the_backward_pass(
    ready: list[float], seconds: list[float], exposed: float
) -> None:
    assert sim.exposed_seconds(ready, seconds, backward_end=10.0) == exposed


def test_slowest_rank_is_the_expected_maximum_of_normal_values() -> None:
    assert sim.slowest_of(1) == 0
    assert sim.slowest_of(2) == pytest.approx(1 / math.sqrt(math.pi))
    assert sim.slowest_of(3) == pytest.approx(1.5 / math.sqrt(math.pi))
    assert sim.slowest_of(512) == pytest.approx(3.04, abs=0.01)  # tables of normal order statistics
    for ranks in (2, 8, 64):
        assert sim.simulated_step(1.0, 0.05, ranks) == pytest.approx(1 + 0.05 * sim.slowest_of(ranks), rel=2e-3)


def test_youngs_and_dalys_intervals_are_near_the_optimum_of_the_complete_model() -> None:
    assert sim.young_interval(2.0, 100.0) == pytest.approx(20.0)
    assert sim.daly_interval(200.0, 100.0) == 100.0
    for cost, mtbf in ((1.0, 1e4), (10.0, 1e3), (100.0, 1e3)):
        share = cost / (2 * mtbf)
        assert sim.daly_interval(cost, mtbf) == pytest.approx(
            math.sqrt(2 * cost * mtbf) * (1 + math.sqrt(share) / 3 + share / 9) - cost
        )
        tries = np.geomspace(cost / 10, 10 * mtbf, 20_000)
        times = [sim.expected_runtime(1.0, interval, cost, 0.0, mtbf) for interval in tries]
        best = tries[int(np.argmin(times))]
        assert sim.daly_interval(cost, mtbf) == pytest.approx(best, rel=0.01)
        found = sim.expected_runtime(1.0, sim.young_interval(cost, mtbf), cost, 0.0, mtbf)
        assert found == pytest.approx(min(times), rel=0.03)  # the optimum is flat


def test_runtime_with_failures_is_that_of_the_complete_model() -> None:
    rare = sim.expected_runtime(100.0, 10.0, 1.0, 5.0, mtbf=1e9)
    assert rare == pytest.approx(110.0)  # ten checkpoints, no failure
    for restart in (0.0, 4.0):
        formula = sim.expected_runtime(1000.0, 10.0, 1.0, restart, mtbf=30.0)
        assert sim.simulated_runtime(1000.0, 10.0, 1.0, restart, mtbf=30.0) == pytest.approx(formula, rel=0.02)


def test_prediction_adds_up_and_a_single_rank_only_computes(simulator: ModuleType) -> None:
    run = simulator.Training()
    alone = simulator.predict(run, 1)
    assert (alone.efficiency, alone.exposed, alone.waiting) == (1.0, 0.0, 0.0)
    assert alone.images_per_second == pytest.approx(run.images_per_second)
    assert alone.hours == pytest.approx(90 * 1_281_167 / 2470 / 3600)
    many = simulator.predict(run, 64)
    assert many.images_per_second == pytest.approx(64 * 256 / many.step)
    assert many.mtbf_hours == pytest.approx(alone.mtbf_hours / 64)
    slow = replace(run, cluster=replace(run.cluster, between=sim.Link(1e-5, 1e8)))
    assert simulator.predict(slow, 64).exposed > 0.1 > many.exposed
    assert simulator.predict(slow, 8) == simulator.predict(run, 8)  # within one host


def test_measured_runs_are_predicted_from_their_journals(simulator: ModuleType, tmp_path: Path) -> None:
    """The second run's own throughput is not used for its prediction."""
    more = {"communication/bytes_per_step": 1e6, "communication/link_bytes_per_second": 1e8}
    ranks = {f"rank_time/{rank}/compute": 1.0 for rank in (0, 1)}
    for name, rate, last in (("one", 100.0, {}), ("two", 180.0, more | ranks)):
        (tmp_path / name).mkdir()
        with JournalWriter(tmp_path / name) as writer:
            for step in range(1, 8):
                writer.write(Entry(step, 1, float(step), {"step/images_per_second": rate}))
            writer.write(Entry(7, 1, 8.0, {"steady_images_per_second": rate, **last}))
    one, two = simulator.measured(tmp_path / "one"), simulator.measured(tmp_path / "two")
    assert (one.ranks, two.ranks, one.spread) == (1, 2, 0.0)
    # A step of 10 images takes 0.1 s alone, and 0.01 s more for 1 MB at 100 MB/s.
    assert simulator.prediction_of(one, two, batch=10) == pytest.approx(20 / 0.11)
    (row,) = simulator.beside(tmp_path / "one", [tmp_path / "two"], 10)
    assert [*row.values()] == ["two", "2", "100", "100", "182", "180", "0.990"]
