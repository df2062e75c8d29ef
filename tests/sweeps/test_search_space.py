"""The space of a search: Hydra's grammar of sweeps becomes lists and scales, and what cannot be searched is refused."""

from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from cifar_exp.errors import ConfigError
from cifar_exp.sweeps.search_space import Choice, Numbers, Space


def space(*words: str) -> Space:
    return Space.of(OverridesParser.create().parse_overrides(list(words)))


@pytest.mark.parametrize(
    ("word", "values"),
    [
        ("a=interval(0.01,1)", Numbers(0.01, 1.0)),
        ("a=interval(-1,0)", Numbers(-1.0, 0.0)),
        ("a=tag(log,interval(0.01,1))", Numbers(0.01, 1.0, is_log=True)),
        ("a=int(interval(4,64))", Numbers(4, 64)),
        ("a=range(1,10)", Numbers(1, 9, 1)),  # as in Python, without the stop
        ("a=range(10,0,-3)", Numbers(1, 10, 3)),
        ("a=tag(log,range(1,10))", Numbers(1, 9, 1, is_log=True)),
        ("a=range(0,1,0.25)", Numbers(0.0, 0.75, 0.25)),
        ("a=choice(16,32,16)", Choice(("16", "32"))),
        ("a=convnet,resnet", Choice(("convnet", "resnet"))),
        ("a=[1,2],[3]", Choice(("[1,2]", "[3]"))),
    ],
)
def test_each_form_of_hydras_grammar(word: str, values: Choice | Numbers) -> None:
    assert space(word) == Space((), {"a": values})


def test_the_last_override_of_a_setting_counts() -> None:
    found = space("a=1,2", "b=3", "~c", "+d=x", "b=4,5", "a=7")
    assert found == Space(("~c", "+d=x", "a=7"), {"b": Choice(("4", "5"))})
    assert found.ends() == [["~c", "+d=x", "a=7", "b=4"], ["~c", "+d=x", "a=7", "b=5"]]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("a=1", "no setting is searched"),
        ("seed=0,1", "the best seed is luck"),
        ("devices.count=1,2", "Set one count, or hydra/sweeper=study"),
        ("data.validation=0.1,0.2", "cannot be compared"),
        ("a=tag(other,interval(1,2))", "the only tag of a search is log"),
        ("a=tag(log,interval(0,1))", "begins above 0"),
        ("a=interval(2,1)", "Set the smaller number first"),
        ("a=range(1,1)", "the range is empty"),
        ("a=tag(log,range(1,9,2))", "no step"),
        ("a=tag(log,range(1.0,9.0,1.0))", "no step"),
        ("a=tag(log,choice(1,2))", "a list has no scale"),
    ],
)
def test_what_cannot_be_searched_is_refused_with_the_remedy(word: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        space(word)


def test_values_are_chosen_within_their_bounds_and_written_so_that_they_are_read_back_exactly() -> None:
    optuna = pytest.importorskip("optuna", reason="needs the package optuna (the extra cifar-exp[search])")
    found = space("x=1", "lr=tag(log,interval(0.001,1))", "w=range(2,9,3)", "f=range(0,1,0.25)", "m=a,b")
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    seen: list[dict[str, Any]] = []
    for _ in range(50):
        trial = study.ask()
        words = found.overrides(trial)
        chosen = {word.partition("=")[0]: word.partition("=")[2] for word in words}
        assert words[0] == "x=1"
        assert float(chosen["lr"]) == trial.params["lr"]
        seen.append(chosen)
    assert all(0.001 <= float(chosen["lr"]) <= 1 for chosen in seen)
    assert 10 < sum(float(chosen["lr"]) < 0.0316 for chosen in seen) < 40  # half, on a logarithmic scale
    assert {chosen["w"] for chosen in seen} == {"2", "5", "8"}
    assert {chosen["f"] for chosen in seen} == {"0.0", "0.25", "0.5", "0.75"}
    assert {chosen["m"] for chosen in seen} == {"a", "b"}
