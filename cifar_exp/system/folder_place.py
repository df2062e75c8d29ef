"""Where a folder is: its path, and the device and inode that a renamed folder keeps and a copied one does not."""

from pathlib import Path
from typing import Any


def place_of(folder: Path) -> dict[str, Any]:
    """The place of an existing folder, in the form that is stored as JSON."""
    found = folder.stat()
    return {"path": str(folder.resolve()), "device": found.st_dev, "inode": found.st_ino}
