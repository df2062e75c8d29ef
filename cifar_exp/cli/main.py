"""The command `cifar-exp`: its subcommands and their common error handling."""

import argparse
import importlib
import sys
from collections.abc import Sequence

import click

from cifar_exp.errors import ConfigError, Stopped
from cifar_exp.system.own_version import own_version
from cifar_exp.system.process import end_process
from cifar_exp.system.signals import ignore_signals, install_signal_handlers, swallowed
from cifar_exp.system.standard_streams import ignore_broken, open_closed_streams

# A subcommand is `command` in the module of the same name. The module is imported on use, so that --help is fast.
COMMANDS = {
    "train": "Train once as configured; with -m, sweep over lists of values.",
    "predict": "Label images with the network of a run.",
    "report": "Recreate the tables and figures of a sweep, or compare two sweeps.",
    "verify": "Check on this machine whether N ranks compute what one rank computes.",
    "data": "Fetch CIFAR-10, verify it, and write it as class folders.",
    "sync": "Deliver runs from disk to MLflow, after an outage or a crash.",
    "ui": "Serve MLflow's pages for the runs, on this machine only.",
}
EXAMPLES = """\b
Examples:
  cifar-exp experiment=quickstart                        a first result, without a download
  cifar-exp model.width=64 train.epochs=5                a wider network, fewer epochs
  cifar-exp -m experiment=speedup devices.count=1,2      a sweep over device counts
  cifar-exp predict latest my-pictures/                  labels for images
  cifar-exp train --help                                 all groups and settings
"""


# Options of subcommands that take the next word as their value.
OWN_VALUE_OPTIONS = ("--to", "--port")


class Commands(click.Group):
    """Subcommands that are imported on use. A command line with only options and overrides means ``train``."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in COMMANDS:
            return None
        found: click.Command = importlib.import_module(f"cifar_exp.cli.{cmd_name}").command
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        args = with_subcommand_first(args)
        if args[0] not in COMMANDS and "." in args[0]:
            from cifar_exp.config.defaults import default_settings

            if args[0] in default_settings():
                value = args[1] if len(args) > 1 else "<value>"
                raise ConfigError(f"{args[0]}: a setting is written as key=value. Set {args[0]}={value}")
        return super().parse_args(ctx, args)


def with_subcommand_first(args: Sequence[str]) -> list[str]:
    """The words of a command line, with the subcommand as the first one.

    The subcommand may be anywhere: it is the first word that is not an option, an option's value or an override.
    ``--version`` always prints the package's version.
    """
    if any(word.startswith("--v") and "--version".startswith(word) for word in args):
        return ["--version"]
    if COMMANDS.keys() & set(args[1:]) and args[0] not in COMMANDS:
        from cifar_exp.cli.options import split_options
        from cifar_exp.config import hydra_versions

        own = {name: argparse.Action([name], name) for name in OWN_VALUE_OPTIONS}
        options, words = split_options(args, hydra_versions.options() | own)
        first = next((word for word in words if not _is_override(word)), None)
        if first in COMMANDS:
            words.remove(first)
            return [first, *options, *words]
    if not args or (args[0] != "--help" and (args[0].startswith("-") or _is_override(args[0]))):
        return ["train", *args]
    return list(args)


def _is_override(word: str) -> bool:
    return "=" in word or word.startswith(("+", "~"))


@click.group(cls=Commands, epilog=EXAMPLES, context_settings={"max_content_width": 100})
@click.version_option(own_version() or "of source code that is not installed", prog_name="cifar-exp")
def commands() -> None:
    """What do wider, deeper, better-trained networks and more devices buy?

    Settings are key=value, groups group=choice. RUN and SWEEP are a folder, an MLflow run id, or `latest`.
    """


def main(args: Sequence[str] | None = None) -> None:
    """Run a command line and end the process with its exit code.

    Args:
        args: the arguments after ``cifar-exp``; None for those of ``sys.argv``.
    """
    install_signal_handlers()
    open_closed_streams()
    ignore_broken(sys.stderr)  # a message that cannot be printed must not change the exit code
    code = run_command(sys.argv[1:] if args is None else list(args))
    ignore_signals()
    end_process(code)


def run_command(args: Sequence[str]) -> int:
    """Run the command with these arguments and return its exit code. An error is printed as one message."""
    try:
        # Not `commands.main`: for Ctrl-C, click would print an empty line and raise another error.
        with commands.make_context("cifar-exp", list(args)) as context:
            code: object = commands.invoke(context)
        sys.stdout.flush()  # a closed pipe or a full disk is noticed here
        return code if isinstance(code, int) else 0
    except click.exceptions.Exit as ended:  # of --help and --version
        return ended.exit_code
    except BrokenPipeError:  # the reader of the output closed the pipe
        ignore_broken(sys.stdout)
        return 0
    except (Stopped, Exception) as error:
        if stopped := Stopped.cause_of(error) or swallowed():
            print(f"cifar-exp: {stopped}", file=sys.stderr)
            return stopped.exit_code
        if isinstance(error, click.ClickException):
            where = getattr(error, "ctx", None)
            command = where.command_path if where else "cifar-exp"
            error = ConfigError(f"{error.format_message()} See {command} --help")
        ignore_broken(sys.stdout)
        from cifar_exp.system.bugs import as_user_error
        from cifar_exp.system.printable import print_notice
        from cifar_exp.system.redaction import masked_text

        problem = as_user_error(error)
        print_notice(masked_text(str(problem)))
        return problem.exit_code


if __name__ == "__main__":
    main()
