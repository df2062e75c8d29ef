"""Mark temporary folders, so that a later start removes only folders that a killed process left.

The name alone proves nothing: another user may have a folder of this name. The mark holds the folder's device and
inode, so a copy of a marked folder is not marked.
"""

import json
import os
from pathlib import Path

MARK = ".temporary-of-cifar-exp"


def mark(folder: Path) -> None:
    """Mark a new folder."""
    (folder / MARK).write_text(json.dumps(_identity(folder)))


def is_marked(folder: Path) -> bool:
    """Whether :func:`mark` has marked this folder and it belongs to this user. A link to a folder is not marked."""
    try:
        if folder.is_symlink() or folder.stat().st_uid != os.geteuid():
            return False
        return bool(json.loads((folder / MARK).read_text()) == _identity(folder))
    except (OSError, ValueError):
        return False


def _identity(folder: Path) -> list[int]:
    found = folder.stat()
    return [found.st_dev, found.st_ino]
