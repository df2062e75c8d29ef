"""What another host composes: its own words, and the values of the job for the lists of a sweep."""

from cifar_exp.launch.host_words import overrides_here, plain_overrides

TYPED = ["model.width=8,16", "train.epochs=3", "launcher.host_rank=1", "data.root=/here", "seed=range(3)"]


def test_lists_are_left_out() -> None:
    assert plain_overrides(TYPED) == ["train.epochs=3", "launcher.host_rank=1", "data.root=/here"]


def test_own_words_win_and_host_0s_places_are_not_taken() -> None:
    sent = ["model.width=16", "train.epochs=4", "launcher.host_rank=0", "data.root=/there", "seed=2", "tracking=none"]
    assert overrides_here(TYPED, sent) == [*plain_overrides(TYPED), "model.width=16", "seed=2"]
