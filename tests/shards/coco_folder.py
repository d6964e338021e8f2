"""Small raw datasets in COCO's panoptic format, as COCO and others lay them out."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from osm_lightning.record import box_of
from osm_lightning.shards.panoptic import LAYOUTS, read_split
from osm_lightning.vocabulary import load_vocabulary

SPLIT = "val2017"
LICENCE = {"id": 4, "name": "Attribution License", "url": "http://creativecommons.org/licenses/by/2.0/"}


def colours_of(png_path):
    rgb = np.asarray(Image.open(png_path)).astype(int)
    return rgb[..., 0] + rgb[..., 1] * 256 + rgb[..., 2] * 65536


class CocoFolder:
    """A small folder in COCO's panoptic layout, written by `save` and bent by the tests before."""

    def __init__(self, root):
        self.root = root
        self.images, self.annotations, self.colours = [], [], {}

    def add(self, image_id, colours, crowd=()):
        """Adds an image whose segment ids are int[H, W]; the JSON is true to them."""
        name = f"{image_id:012}"
        height, width = colours.shape
        for folder in ("annotations", f"panoptic_{SPLIT}", SPLIT):
            (self.root / folder).mkdir(parents=True, exist_ok=True)
        rgb = np.stack([colours % 256, colours // 256 % 256, colours // 65536], axis=-1).astype(np.uint8)
        Image.fromarray(rgb).save(self.root / f"panoptic_{SPLIT}/{name}.png")
        pixels = np.random.default_rng(image_id).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(self.root / f"{SPLIT}/{name}.jpg")
        self.images.append(
            {
                "id": image_id,
                "file_name": f"{name}.jpg",
                "height": height,
                "width": width,
                "license": 4,
                "coco_url": "u",
            }
        )
        segments = [
            {
                "id": int(segment_id),
                "category_id": 1 + index % 3,
                "iscrowd": int(segment_id in crowd),
                "area": int((colours == segment_id).sum()),
                "bbox": box_of(colours == segment_id),
            }
            for index, segment_id in enumerate(s for s in np.unique(colours)[::-1] if s)
        ]
        self.annotations.append({"image_id": image_id, "file_name": f"{name}.png", "segments_info": segments})
        self.colours[name] = colours
        return self

    def save(self):
        content = {"images": self.images, "annotations": self.annotations, "licenses": [LICENCE]}
        (self.root / f"annotations/panoptic_{SPLIT}.json").write_text(json.dumps(content))
        return self

    def read(self):
        return read_split(LAYOUTS["coco"], self.save().root, SPLIT, load_vocabulary("coco"))


def coco_of_noise(root: Path, num_images: int, side: int = 64) -> CocoFolder:
    """Images of noise with four segments each, saved."""
    coco = CocoFolder(root)
    for image_id in range(1, num_images + 1):
        coco.add(
            image_id, np.random.default_rng(image_id).integers(0, 5, (side // 8, side // 8)).repeat(8, 0).repeat(8, 1)
        )
    return coco.save()
