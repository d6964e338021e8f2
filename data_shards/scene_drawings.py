"""The drawings that `build_scenes.py` makes its scenes of: emoji of several artists, from pinned npm packages.

Emoji are called by their CLDR names, with hyphens for spaces, as the Iconify sets call theirs. Nothing here knows what
a scene looks like.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import subprocess
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from rich.progress import track

DRAWN_PX = 256
"""Side at which vector drawings are rendered, and that of Fluent's pictures."""


@dataclass(frozen=True, slots=True)
class Package:
    """An npm package, pinned by its content."""

    name: str
    version: str
    sha512: str
    """In base64, as npm writes it."""


@dataclass(frozen=True, slots=True, eq=False)
class Drawing:
    """One artist's picture of a class."""

    class_id: int
    source: str
    """Key of the artist's set and CLDR name, such as `noto/cat`."""
    pixels: Image.Image
    """RGBA, trimmed to what is not transparent."""


PACKAGES = {
    "noto": Package(
        "@iconify-json/noto",
        "1.2.9",
        "DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
    ),
    "noto-v1": Package(
        "@iconify-json/noto-v1",
        "1.2.5",
        "/DsVMius69Q0fRS53z7QK1TROSuar606jiIx+laXtdsYGMXpf6LtHBx6CGfoo3UHHb/XpBsw+1L1x3eyPqMuVA==",
    ),
    "twemoji": Package(
        "@iconify-json/twemoji",
        "1.2.5",
        "uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==",
    ),
    "emojione": Package(
        "@iconify-json/emojione",
        "1.2.3",
        "T9+T3HIbJNLKKsmxYKlaYhvnHYkz/HNYTV7SHCXVZPfeUi4FqskY70YeN8yYAZT8cCv7w5vJxS4Q1m8zb9CMMg==",
    ),
    "fluent": Package(
        "@lobehub/fluent-emoji-3d",
        "1.1.0",
        "Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
    ),
}
"""The artists' sets by their keys. Whose they are and under which licence: `scenes/ATTRIBUTION.md`."""


def read_drawings(classes: Mapping[int, Sequence[str]], sets: Sequence[str]) -> dict[int, list[Drawing]]:
    """Downloads all drawings of every class in some of the sets.

    Args:
        classes: from class id to the CLDR names of its emoji.
        sets: keys of PACKAGES.

    Raises:
        ValueError: a package is not the pinned one, or lacks a drawing.
    """
    code_points: dict[str, list[str]] = {}
    for points, name in json.loads(_fetch(PACKAGES["noto"])["chars.json"]).items():
        code_points.setdefault(name, []).append(points)
    drawings: dict[int, list[Drawing]] = {class_id: [] for class_id in classes}
    missing = []
    for key in sets:
        files = _fetch(PACKAGES[key])
        icons = json.loads(files["icons.json"]) if "icons.json" in files else None
        for class_id, names in track(classes.items(), f"drawings of {key}"):
            for name in names:
                try:
                    image = _open_webp(files, code_points[name]) if icons is None else _render_icon(icons, name)
                except KeyError:
                    missing.append(f"{key}/{name}")
                    continue
                pixels = image.convert("RGBA")
                drawings[class_id].append(Drawing(class_id, f"{key}/{name}", pixels.crop(pixels.getbbox())))
    if missing:
        raise ValueError(
            f"{len(missing)} drawings of the vocabulary are missing, such as {', '.join(missing[:5])}: every artist "
            "must have drawn all emoji of a class. Take them out of its column `drawings`."
        )
    return drawings


def _fetch(package: Package) -> dict[str, bytes]:
    """Downloads a package and reads its JSON and WebP files; nothing is unpacked or run."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["npm", "pack", f"{package.name}@{package.version}", "--silent", "--pack-destination", folder]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        (path,) = Path(folder).glob("*.tgz")
        archive = path.read_bytes()
    sha512 = base64.b64encode(hashlib.sha512(archive).digest()).decode()
    if sha512 != package.sha512:
        raise ValueError(
            f"{package.name}@{package.version} has sha512 {sha512}, but {package.sha512} is pinned: it is not what the "
            "set was made from. Look at what changed before you change the pin."
        )
    files = {}
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for entry in tar:
            if entry.name.endswith((".json", ".webp")) and (file := tar.extractfile(entry)) is not None:
                files[entry.name.removeprefix("package/")] = file.read()
    return files


def _render_icon(icons: Mapping[str, Any], name: str) -> Image.Image:
    """Renders one drawing of a set in Iconify's JSON format; KeyError where the set lacks it."""
    import resvg_py  # not a dependency of the project: only a rebuild draws

    icon = icons["icons"][icons.get("aliases", {}).get(name, {"parent": name})["parent"]]
    left, top = icon.get("left", 0), icon.get("top", 0)
    width, height = (icon.get(side, icons[side]) for side in ("width", "height"))
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="{DRAWN_PX}" '
        f'height="{DRAWN_PX}" viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
    )
    return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg))))


def _open_webp(files: Mapping[str, bytes], code_points: Sequence[str]) -> Image.Image:
    """Opens one drawing of a set whose files are called by code points; KeyError where the set lacks it.

    A name can have several spellings in code points: with and without U+FE0F, which asks for a coloured emoji.
    """
    paths = [f"assets/{points}{selector}.webp" for points in code_points for selector in ("", "-fe0f")]
    path = next((path for path in paths if path in files), paths[0])
    return Image.open(io.BytesIO(files[path]))
