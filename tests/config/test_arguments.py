"""Arguments in messages can be pasted into a shell."""

import shlex

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st

from cifar_exp.config.arguments import argument


@pytest.mark.parametrize("value", ["runs/a", "/a/lr=0.1", "a#b", "a(1)", "größe", "c'd", 'q"x', "2024", "true", "a\\"])
def test_an_argument_is_read_as_its_value(value: str) -> None:
    (word,) = shlex.split(argument("resume", value))
    assert OverridesParser.create().parse_override(word).value() == value


def test_plain_values_get_no_quotes() -> None:
    assert argument("resume", "outputs/a") == "resume=outputs/a"
    assert argument("model.width", 8) == "model.width=8"


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0\n\r$", exclude_categories=["Cs", "Cc"]), min_size=1))
def test_any_text_is_read_as_itself(value: str) -> None:
    (word,) = shlex.split(argument("data.root", value))
    found = OverridesParser.create().parse_override(word).value()
    assert str(found) == value
