"""Files that are there whole or not at all, whenever the writer is stopped."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file. Whoever looks sees the old one or the new one, never a part; text is UTF-8.

    Raises:
        OSError: it could not be written; the old one, if any, is as it was.
    """
    temporary = path.with_name(f".{path.name.removeprefix('.')}.partial")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
