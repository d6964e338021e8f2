"""Frozen vision towers by library and family."""

from osm_lightning.model.config import VisionConfig
from osm_lightning.model.towers.of_open_clip import OpenClipTower
from osm_lightning.model.towers.of_transformers import FAMILIES, TransformersTower
from osm_lightning.model.towers.tower import Tower

__all__ = ["FAMILIES", "OpenClipTower", "Tower", "TransformersTower", "build_tower"]


def build_tower(config: VisionConfig) -> Tower:
    """The tower that a config names, with its weights.

    Raises:
        ValueError: it cannot be had.
    """
    return TransformersTower(config) if config.tower in FAMILIES else OpenClipTower(config)
