"""Frozen vision towers by library and family."""

from osm_lightning.model.towers.of_open_clip import OpenClipTower
from osm_lightning.model.towers.of_transformers import Dinov2Tower, InstructBlipTower
from osm_lightning.model.towers.tower import Tower

TOWERS: dict[str, type[Tower]] = {
    "open_clip": OpenClipTower,
    "dinov2": Dinov2Tower,
    "instructblip": InstructBlipTower,
}
"""By the name that `vision.tower` has for them."""
