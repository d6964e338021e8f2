"""Files that are there whole or not at all, whenever the writer is stopped."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file. Whoever looks sees the old one or the new one, never a part; text is UTF-8.

    Raises:
        OSError: it could not be written; the old one, if any, is as it was.
    """
    with open_whole(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def open_whole(path: Path) -> Iterator[BinaryIO]:
    """Opens a file that takes its name when the block ends, and never does if an exception ends it.

    Raises:
        OSError: it could not be written; the old one, if any, is as it was.
    """
    temporary = path.with_name(f".{path.name.removeprefix('.')}.partial")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
