"""How far a build came: a small file beside the shards that are finished, so that the next build goes on behind them.

It is believed only for the very plan that it was written for. A file that isn't understood counts as none.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import PIL
from PIL import features

from osm_lightning.record import SCHEMA as RECORD_SCHEMA
from osm_lightning.shard_index import SCHEMA as INDEX_SCHEMA
from osm_lightning.shard_index import SplitInfo, split_from_json, split_to_json
from osm_lightning.shards.conversion import RawSplit
from osm_lightning.shards.source import Findings
from osm_lightning.vocabulary import Vocabulary
from osm_lightning.whole_file import write_whole

SCHEMA = 1
"""Version of the file; another is no journal."""


@dataclass(slots=True)
class Journal:
    """What came of a plan's first images."""

    plan: str
    """Fingerprint of what is built, from `fingerprint`."""
    finished: SplitInfo = field(default_factory=lambda: SplitInfo((), {}))
    """The shards that hold them."""
    num_images: int = 0
    """How many images that is, with those that were skipped."""
    skipped: list[int] = field(default_factory=list)
    """Positions of those that could not be converted."""
    errors: Findings = field(default_factory=Findings)
    """Why they could not."""
    notes: Findings = field(default_factory=Findings)

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """The journal in a file; None where there is none that can be read."""
        try:
            content = json.loads(path.read_bytes())
            if content.pop("schema") != SCHEMA:
                return None
            return cls(
                finished=split_from_json(content.pop("finished")),
                errors=Findings.from_json(content.pop("errors")),
                notes=Findings.from_json(content.pop("notes")),
                **content,
            )
        except (OSError, LookupError, TypeError, AttributeError, ValueError):
            return None

    def write(self, path: Path) -> None:
        """Replaces the file at once, whatever happens meanwhile."""
        content = {
            "schema": SCHEMA,
            "plan": self.plan,
            "finished": split_to_json(self.finished),
            "num_images": self.num_images,
            "skipped": self.skipped,
            "errors": self.errors.to_json(),
            "notes": self.notes.to_json(),
        }
        write_whole(path, json.dumps(content))


def fingerprint(split: RawSplit, vocabulary: Vocabulary | None, options: Mapping[str, Any]) -> str:
    """Names a plan: 64 hexadecimal digits that change with anything that may change the bytes of its shards.

    Pictures are not looked at: whoever replaces one between two halves of a build removes the journal.

    Args:
        split: what is to be built.
        vocabulary: the classes that its tables were read with, if any.
        options: what else the bytes depend on; plain JSON content.
    """
    table = split.source.stat()
    content = {
        "schemas": [SCHEMA, RECORD_SCHEMA, INDEX_SCHEMA],
        # Pillow compresses the segment maps.
        "versions": [version("osm_lightning"), PIL.__version__, features.version("zlib")],
        "table": [table.st_size, table.st_mtime_ns],
        "classes": [[entry.id, *entry.names] for entry in vocabulary or ()],
        "options": dict(options),
        "notes": split.notes.to_json(),
        "errors": split.errors.to_json(),
        "keys": [image.key for image in split.images],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
