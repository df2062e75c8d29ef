"""`cifar-exp data`: the CIFAR-10 archive -> a tree of class folders with PNG images, for people and other programs.

The images are the release's, bit for bit; ``data=folders data.root=data/cifar10-folders`` trains on them.
"""

import sys
from pathlib import Path

import click

from cifar_exp.cli.words import settings_in
from cifar_exp.errors import ConfigError

SETTINGS = ("data.root", "data.archive", "data.mirror")


@click.command("data")
@click.argument("words", nargs=-1, metavar="[SETTINGS]...")
@click.option(
    "--to",
    type=click.Path(path_type=Path),
    default=Path("data/cifar10-folders"),
    show_default=True,
    help="Folder for the images.",
)
def command(words: tuple[str, ...], to: Path) -> None:
    """Fetch CIFAR-10, verify it, and write it as train/<class>/NNNN.png and test/<class>/NNNN.png.

    \b
    data.root=data       folder for the archive and its decoded copy
    data.archive=<file>  a local cifar-10-python.tar.gz; then nothing is downloaded
    data.mirror=<URL>    another address of cifar-10-python.tar.gz
    """
    from cifar_exp.config.defaults import settings_of
    from cifar_exp.data.cifar10 import cifar10
    from cifar_exp.data.folder_export import export, table
    from cifar_exp.system.surroundings import set_up_environment

    set_up_environment()
    typed, rest = settings_in(words, SETTINGS)
    if rest:
        raise ConfigError(f"{rest[0]}: it must be a setting. Set {' or '.join(f'{name}=...' for name in SETTINGS)}")
    chosen = {name.removeprefix("data."): value for name, value in typed.items()}
    files = cifar10(**settings_of("data", "cifar10") | chosen)
    try:
        counts = export(files, to)
    except KeyboardInterrupt:
        print("Stopped. What is written stays; the same command continues.", file=sys.stderr)
        raise
    print(table(files.classes, counts))
    print(f"To train on them: cifar-exp data=folders data.root={to}")
