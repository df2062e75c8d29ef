"""Steady-state throughput counts every step after the warm-up once, also across epoch boundaries."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cifar_exp.training.throughput import Throughput, weighted_median


def trained(steps_per_epoch: int, epochs: int, log_every: int, seconds: float = 0.5, images: int = 10) -> Throughput:
    """Fed as the trainer does: at each multiple of log_every, and at the end of each epoch."""
    throughput, unread = Throughput(), 0
    for step in range(1, epochs * steps_per_epoch + 1):
        throughput.open_steps += 1
        unread += 1
        if step % log_every == 0:
            throughput.add(unread * images, unread * seconds)
            throughput.end_block()
            unread = 0
        if step % steps_per_epoch == 0:
            throughput.add(unread * images, unread * seconds)
            unread = 0
    return throughput


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 30))
def test_each_step_is_in_one_block_and_the_first_block_is_warm_up(per_epoch: int, epochs: int, every: int) -> None:
    steps = per_epoch * epochs
    throughput = trained(per_epoch, epochs, every)
    assert throughput.steps == [every] * (steps // every)
    assert throughput.rates == pytest.approx([20.0] * (steps // every))
    found = throughput.steady()
    assert found
    rate, counted, blocks = found
    assert rate == pytest.approx(20)
    assert counted == (steps - every if steps > every else steps)
    assert blocks == max(1, -(-steps // every) - 1)


def test_blocks_are_weighted_by_their_steps() -> None:
    """Two whole blocks of 5 steps outweigh the single last step."""
    throughput = Throughput([1.0, 100.0, 110.0], [5, 5, 5], open_images=1000, open_steps=1, open_seconds=1.0)
    assert throughput.steady() == (110.0, 11, 3)
    assert weighted_median([(3.0, 1), (1.0, 1), (2.0, 2)]) == 2
    assert weighted_median([(1.0, 2), (4.0, 2)]) == 2.5
    assert Throughput().steady() is None


def test_blocks_are_restored_from_current_and_earlier_checkpoints() -> None:
    throughput = trained(7, 3, 5)
    assert Throughput.load({"throughput": throughput.state_dict()}, 5) == throughput
    assert Throughput.load({"block_rates": [1.0, 2.0]}, 5) == Throughput([1.0, 2.0], [5, 5])
