"""Names whatever is inside a segmentation mask, with no vocabulary given.

`OSM` is what there is to use from Python (docs/api.md). It is imported when it is asked for: torch takes seconds, for
which the command's `--help` need not wait.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from osm_lightning.api import OSM, Scene
    from osm_lightning.batch import Answer, NamedMask

__version__ = "0.1.0"

__all__ = ["OSM", "Answer", "NamedMask", "Scene", "__version__"]


def __getattr__(name: str) -> Any:
    if name in {"OSM", "Scene", "NamedMask", "Answer"}:
        from osm_lightning import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
