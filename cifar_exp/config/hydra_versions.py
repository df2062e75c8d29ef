"""The differences between the supported versions of Hydra (1.3, 1.4) and OmegaConf (2.3, 2.4).

The version is detected by its features, not by its number, so release candidates and later versions work, too.
"""

import argparse
import inspect
import io
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr
from pathlib import Path
from typing import Any

import hydra
from hydra import initialize_config_dir, utils
from hydra._internal import hydra as hydras
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf

from cifar_exp.config.hydra_section import check_hydra_section, typed_targets
from cifar_exp.config.limited_yaml import limited

# Hydra 1.4 has its own allow-list of `_target_`s and deprecates `version_base`.
_LIMITS_TARGETS = "execution_whitelist" in inspect.signature(hydra.main).parameters
# What --experimental-rerun takes.
RERUN_SOURCE = (
    "the folder of a job that ran with hydra.output_subdir=.hydra"
    if _LIMITS_TARGETS
    else "a config.pickle that hydra.experimental.callbacks.PickleJobInfoCallback wrote"
)
_BASE: dict[str, Any] = {} if _LIMITS_TARGETS else {"version_base": "1.3"}


def run_hydra_main(
    job: Callable[[DictConfig], Any], folder: Path, trusted: Iterable[str], before_folder: Callable[[Path], None]
) -> None:
    """Let Hydra parse ``sys.argv`` and run ``job``, once or for each job of a sweep.

    Args:
        job: the function to call with the composed configuration.
        folder: the folder of ``config.yaml``.
        trusted: the `_target_`s that a configuration may have, including those for Python's logging: dotted paths, or
            modules with ``.*``.
        before_folder: is called with the folder of a single run before Hydra creates it.

    Raises:
        Exception: the exception of ``job``. Hydra's callbacks have been called, and Hydra prints nothing.
    """
    allowed = [*trusted, *typed_targets(given_options(sys.argv[1:]).get("overrides", []))]
    limit: dict[str, Any] = {"execution_whitelist": allowed} if _LIMITS_TARGETS else {}
    with parser_of_old_versions(), _calling_before_run(before_folder), _failing_silently(), _checking(allowed):
        hydra.main(config_path=str(folder), config_name="config", **_BASE, **limit)(job)()


def options() -> dict[str, argparse.Action]:
    """Hydra's command-line options: spelling -> argparse action."""
    return dict(_parser()._option_string_actions)


def given_options(words: Sequence[str]) -> dict[str, Any]:
    """The values of Hydra's options in a command line, by argparse's names (``config_dir``), and the overrides."""
    try:
        with redirect_stderr(io.StringIO()):
            return vars(_parser().parse_known_args(list(words))[0])
    except SystemExit:  # argparse rejects the words
        return {}


def _parser() -> argparse.ArgumentParser:
    with parser_of_old_versions():
        parser: argparse.ArgumentParser = sys.modules["hydra.main"].get_args_parser()
        return parser


@contextmanager
def composing(folder: Path) -> Iterator[None]:
    """Inside this context ``hydra.compose`` reads ``folder``."""
    with initialize_config_dir(str(folder), **_BASE), _replaced(OmegaConf, "load", limited(OmegaConf.load)):
        yield


def limited_to(trusted: Iterable[str]) -> AbstractContextManager[Any]:
    """Inside this context Hydra 1.4 instantiates only the `_target_`s in ``trusted``. Hydra 1.3 has no such limit."""
    limit = getattr(utils, "execution_whitelist", None)
    return limit(list(trusted)) if limit else nullcontext()


def register_resolver(name: str, resolver: Callable[..., Any]) -> None:
    """Register ``resolver`` for ``${name:...}`` in YAML. An earlier one of that name is replaced."""
    register: Callable[..., Any] = OmegaConf.register_resolver
    if "replace" not in inspect.signature(register).parameters:  # OmegaConf 2.3: this name is a deprecated function
        register = OmegaConf.register_new_resolver
    register(name, resolver, replace=True)


@contextmanager
def ending_sweep(context: HydraContext, config: DictConfig) -> Iterator[None]:
    """Call Hydra's callbacks at the end of a sweep that fails. Hydra 1.4 calls them itself."""
    try:
        yield
    except BaseException:
        if not _LIMITS_TARGETS:
            context.callbacks.on_multirun_end(config=config, config_name=config.hydra.job.config_name)
        raise


@contextmanager
def _calling_before_run(before_folder: Callable[[Path], None]) -> Iterator[None]:
    """Inside this context a single run calls ``before_folder`` with its folder. Hydra has no hook at that place."""
    run_job = hydras.run_job  # type: ignore[attr-defined]

    def called(**arguments: Any) -> Any:
        config, state = arguments["config"], HydraConfig.instance()
        before = state.cfg
        state.set_config(config)  # the folder's name may refer to it
        try:
            before_folder(Path(str(OmegaConf.select(config, arguments["job_dir_key"]))))
        finally:
            state.cfg = before
        return run_job(**arguments)

    with _replaced(hydras, "run_job", called):
        yield


@contextmanager
def _checking(trusted: Sequence[str]) -> Iterator[None]:
    """Inside this context Hydra reads YAML within limits, and its own section is checked before it calls anything."""
    make_callbacks: Any = hydras.Callbacks  # type: ignore[attr-defined]
    configure: Any = hydras.configure_log  # type: ignore[attr-defined]

    def callbacks(config: DictConfig | None = None, **arguments: Any) -> Any:
        if config is not None:
            check_hydra_section(config, trusted)
        return make_callbacks(config, **arguments)

    def configure_log(log_config: Any, *arguments: Any, **named: Any) -> Any:
        if log_config is not None:
            section = OmegaConf.create({"hydra": {"hydra_logging": OmegaConf.to_container(log_config)}})
            check_hydra_section(section, trusted)
        return configure(log_config, *arguments, **named)

    with (
        _replaced(OmegaConf, "load", limited(OmegaConf.load)),
        _replaced(hydras, "Callbacks", callbacks),
        _replaced(hydras, "configure_log", configure_log),
    ):
        yield


@contextmanager
def _failing_silently() -> Iterator[None]:
    """Inside this context Hydra raises the exception of a failed job without printing the job's overrides before."""
    value: Any = JobReturn.return_value

    def get(job: JobReturn) -> Any:
        with redirect_stderr(io.StringIO()):
            return value.fget(job)

    with _replaced(JobReturn, "return_value", property(get, value.fset)):
        yield


@contextmanager
def parser_of_old_versions() -> Iterator[None]:
    """Make Hydra 1.3 work on Python 3.14, where argparse rejects a help text that is not a string.

    Remove this when Hydra 1.3 is no longer supported: Hydra 1.4 has the same workaround.
    """
    module = sys.modules["hydra.main"]  # the name `hydra.main` is the function
    make_parser = module.get_args_parser
    if _LIMITS_TARGETS or not hasattr(argparse.ArgumentParser, "_check_help"):
        yield
        return

    def making() -> argparse.ArgumentParser:
        check = argparse.ArgumentParser._check_help  # type: ignore[attr-defined]

        def check_strings(parser: argparse.ArgumentParser, action: argparse.Action) -> None:
            if isinstance(action.help, str):
                check(parser, action)

        with _replaced(argparse.ArgumentParser, "_check_help", check_strings):
            parser: argparse.ArgumentParser = make_parser()
            return parser

    with _replaced(module, "get_args_parser", making):
        yield


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Inside this context ``owner.name`` is ``value``. unittest.mock does the same, and its import takes 20 ms."""
    own = vars(owner).get(name)  # None: inherited
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name) if own is None else setattr(owner, name, own)
