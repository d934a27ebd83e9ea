"""Files that come with the package: configs/ and models/, also in an installed wheel."""

from __future__ import annotations

from pathlib import Path

SHIPPED = Path(__file__).resolve().parent  # holds links to both in a checkout, copies in a wheel


def find(path: str) -> str:
    """`path` if there is such a file or directory, or if none of that name is shipped; else the shipped one.

    path: relative to the current directory, such as configs/quickstart.py or models/gym.
    """
    shipped = SHIPPED / path
    if _exists(Path(path)) or not _exists(shipped):
        return path
    return str(shipped)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a path that is too long
        return False
