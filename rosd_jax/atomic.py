"""Files that appear complete or not at all: a reader sees the old file or the new one, never a part of it.

write_text(path, chunks)      UTF-8
write_bytes(path, chunks)
temporary(path)               the name of a file while it is written
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

TEMPORARY = ".tmp"


def temporary(path: Path) -> Path:
    """The name of a file while it is written: in the same directory, since a rename cannot change disks."""
    return path.with_name(path.name + TEMPORARY)


def write_text(path: Path, chunks: Iterable[str]) -> None:
    """`write_bytes` for text, in UTF-8 and with line ends as they are."""
    write_bytes(path, (chunk.encode() for chunk in chunks))


def write_bytes(path: Path, chunks: Iterable[bytes]) -> None:
    """Writes a temporary file, syncs it to the disk, then renames it to `path`. A failure leaves no file.

    Raises OSError, and whatever the iterable raises.
    """
    part = temporary(path)
    try:
        with open(part, "wb") as file:
            file.writelines(chunks)
            file.flush()
            # Without this, a crash of the machine may keep the rename and lose the contents.
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
