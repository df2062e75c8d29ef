"""Each supported version of Hydra gets arguments that it accepts, and prints no deprecation warning."""

import argparse
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hydra import compose
from omegaconf import OmegaConf

from cifar_exp.config import hydra_versions, reading
from cifar_exp.config.defaults import conf_dir
from cifar_exp.config.hydra_versions import composing, limited_to, parser_of_old_versions, register_resolver
from cifar_exp.config.reading import read_config
from cifar_exp.config.targets import ALLOWED
from cifar_exp.runs.components import build
from tests.conftest import Command

IS_OLD = not hydra_versions._LIMITS_TARGETS


@pytest.fixture
def strict_argparse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parsers look at each help at once, as they do since Python 3.14."""
    add = argparse.ArgumentParser.add_argument

    def check(_: argparse.ArgumentParser, action: argparse.Action) -> None:
        if action.help and "%" in action.help:
            action.help % {}

    def add_checked(parser: argparse.ArgumentParser, *names: Any, **settings: Any) -> argparse.Action:
        action = add(parser, *names, **settings)
        parser._check_help(action)
        return action

    monkeypatch.setattr(argparse.ArgumentParser, "_check_help", check, raising=False)
    monkeypatch.setattr(argparse.ArgumentParser, "add_argument", add_checked)


@pytest.mark.usefixtures("strict_argparse")
@pytest.mark.skipif(not IS_OLD, reason="Hydra 1.4 sees to it by itself")
def test_hydra_parser_works_if_argparse_validates_help_texts() -> None:
    module = sys.modules["hydra.main"]
    with pytest.raises((TypeError, ValueError)):
        module.get_args_parser()
    make, check = module.get_args_parser, argparse.ArgumentParser._check_help
    with parser_of_old_versions():
        parser = module.get_args_parser()
        assert argparse.ArgumentParser._check_help is check  # a job may make parsers of its own
    assert module.get_args_parser is make
    assert parser.parse_args(["--multirun", "seed=0,1"]).overrides == ["seed=0,1"]
    with pytest.raises((TypeError, ValueError)):
        parser.add_argument("--other", help=object())


@pytest.mark.usefixtures("strict_argparse")
@pytest.mark.skipif(not IS_OLD, reason="Hydra 1.4 sees to it by itself")
def test_only_non_string_help_texts_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    def make() -> argparse.ArgumentParser:
        parser = argparse.ArgumentParser()
        parser.add_argument("--wrong", help="%(nothing)s")
        return parser

    monkeypatch.setattr(sys.modules["hydra.main"], "get_args_parser", make)
    with parser_of_old_versions(), pytest.raises((KeyError, ValueError)):
        sys.modules["hydra.main"].get_args_parser()


def test_nothing_deprecated_is_called() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        register_resolver("twice", lambda number: 2 * number)
        with composing(conf_dir()):
            composed = compose("config", ["seed=${twice:4}"])
    assert composed.seed == 8
    register_resolver("twice", lambda number: 3 * number)
    assert OmegaConf.create({"a": "${twice:2}"}).a == 6


def test_command_prints_no_hydra_version_warnings(cifar_exp: Command) -> None:
    done = cifar_exp("--cfg", "job")
    assert done.returncode == 0
    assert done.stderr == ""
    refused = cifar_exp("-m", "train.epochs=0,1")
    assert refused.returncode == 2
    assert "Warning" not in refused.stderr


def test_hydra_gets_the_allow_list_if_it_supports_one(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[str]] = []

    @contextmanager
    def limit(patterns: list[str]) -> Iterator[None]:
        given.append(patterns)
        yield

    monkeypatch.setattr(hydra_versions.utils, "execution_whitelist", limit, raising=False)
    reading.register_resolvers()
    with composing(conf_dir()):
        build(read_config(compose("config", ["trusted_modules=[mine]"])))
    assert given == [[*patterns, "mine", "mine.*"] for patterns in ALLOWED.values()]


def test_hydra_main_gets_the_allow_list_too(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(hydra_versions, "_LIMITS_TARGETS", True)
    monkeypatch.setattr(hydra_versions, "_BASE", {})
    monkeypatch.setattr(hydra_versions.hydra, "main", lambda **settings: given.update(settings) or (lambda job: job))
    monkeypatch.setattr(sys, "argv", ["cifar-exp", "-m", "seed=0,1", "+hydra.callbacks.x._target_=mine.Callback"])
    hydra_versions.run_hydra_main(
        lambda *_: None if _ else given.setdefault("ran", True), conf_dir(), ["torch.*"], print
    )
    assert given["execution_whitelist"] == ["torch.*", "mine.Callback"]
    assert given["ran"]
    assert "version_base" not in given


@pytest.mark.skipif(IS_OLD, reason="Hydra 1.3 has no such list")
def test_target_outside_the_allow_list_is_refused() -> None:
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    with limited_to(["torch.*"]):
        assert instantiate({"_target_": "torch.Size", "_args_": [[2]]})[0] == 2
        with pytest.raises(InstantiationException, match="whitelist"):
            instantiate({"_target_": "os.getcwd"})
