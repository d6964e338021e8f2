"""Masks from anywhere: five layouts of other people's segmenters and annotation tools, or what is at hand in memory.

`rle.py` turns one COCO segmentation into checked runs, `stored.py` reads the masks of one image, `layouts.py` finds out
how masks lie on disk and which image they belong to, `source.py` joins images and masks; `given.py` takes the masks of
one image as arrays or RLE. Nothing here knows a model.
"""

from osm_lightning.evaluation.segments.given import GivenMasks, given_segments
from osm_lightning.evaluation.segments.source import SegmentSource, read_segments

__all__ = ["GivenMasks", "SegmentSource", "given_segments", "read_segments"]
