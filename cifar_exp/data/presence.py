"""Check that the folders of a data set exist, before the slow imports."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from cifar_exp.errors import DataError

SplitName = Literal["train", "test"]
SPLITS: tuple[SplitName, SplitName] = ("train", "test")
EXPECTED = (
    "Expected: <root>/train/<class>/*.png and <root>/test/<class>/*.png (or .jpg and others), the same classes in both."
)
FOLDERS, SHARDS = "cifar_exp.data.class_folders.folders", "cifar_exp.data.shards.dataset.shards"


def check_presence(section: Mapping[str, Any]) -> None:
    """Check that the folders of ``data=folders`` and ``data=shards`` exist.

    Other data sets are generated, downloaded or cached.

    Args:
        section: the settings ``data``.

    Raises:
        DataError: a folder is missing.
    """
    if section.get("_target_") == FOLDERS and isinstance(root := section.get("root"), str):
        check_tree(Path(root).expanduser())
    if section.get("_target_") == SHARDS and isinstance(root := section.get("root"), str) and "://" not in root:
        check_shard_folders(Path(root).expanduser())


def check_tree(root: Path) -> None:
    """Check that ``root`` has the folders ``train`` and ``test``.

    Raises:
        DataError: one is missing.
    """
    _check_splits(
        root,
        f"{EXPECTED}\nSet data.root=<folder>, run cifar-exp data to create it from the CIFAR-10 archive, or set "
        f"experiment=quickstart, which needs no images.",
    )


def check_shard_folders(root: Path) -> None:
    """Check that ``root`` has the folders ``train`` and ``test`` of ``data=shards``.

    Raises:
        DataError: one is missing.
    """
    _check_splits(
        root,
        "Expected: shards in <root>/train/ and <root>/test/, as .tar (WebDataset) or index.json with .mds (MosaicML "
        "streaming).\nSet data.root=<folder> or data.root=s3://<bucket>/<prefix>",
    )


def _check_splits(root: Path, expected: str) -> None:
    for folder in (root, *(root / split for split in SPLITS)):
        if not folder.is_dir():
            raise DataError(
                f"data.root={root}: there is no folder {folder} (looked for {folder.absolute()}).\n{expected}"
            )
