from __future__ import annotations

import pytest

from osm_lightning.weights.registry import SETS, fetch_command


@pytest.mark.parametrize(
    ("path", "command"),
    [
        ("weights/mini/vision", "osm weights fetch mini --out weights"),
        ("weights/mini/language/", "osm weights fetch mini --out weights"),
        ("weights/mini", "osm weights fetch mini --out weights"),
        ("mini/vision", "osm weights fetch mini --out ."),
        ("/my models/mini/vision", "osm weights fetch mini --out '/my models'"),
        ("weights/mini/checkpoint", None),
        ("weights/instructblip/vision", None),
        ("vision", None),
        ("", None),
    ],
)
def test_fetch_command_makes_that_very_folder(path: str, command: str | None) -> None:
    assert fetch_command(path) == command


def test_every_part_is_pinned_and_has_a_folder_of_its_own() -> None:
    for key, part_set in SETS.items():
        assert part_set.key == key
        assert len({part.name for part in part_set.parts}) == len(part_set.parts)
        for part in part_set.parts:
            assert len(bytes.fromhex(part.wheel_sha256)) == 32
            assert part.known
            assert part.unknown
