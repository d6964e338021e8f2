"""Masks from anywhere, as records: five layouts of other people's segmenters and annotation tools.

`rle.py` turns one COCO segmentation into checked runs, `stored.py` reads the masks of one image, `layouts.py` finds out
how masks lie on disk and which image they belong to, `source.py` joins images and masks. Nothing here knows a model.
"""

from osm_lightning.evaluation.segments.source import SegmentSource, read_segments

__all__ = ["SegmentSource", "read_segments"]
