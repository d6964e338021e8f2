"""Images with all their masks, for validation and prediction."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import Dataset

from osm_lightning.batch import PADDING, MaskSample
from osm_lightning.data.sample import Labels, View, whole_sample
from osm_lightning.data.text import TextCodec


class Whole(Dataset[MaskSample]):
    """Records by position, each with all its masks."""

    def __init__(self, records: Any, labels: Labels, view: View, codec: TextCodec, keep_vanished: bool = False) -> None:
        self.records, self.labels, self.view, self.codec = records, labels, view, codec
        self.keep_vanished = keep_vanished

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, position: int) -> MaskSample:
        if position >= len(self):
            return self._padding()
        return whole_sample(self.records[position], self.labels, self.view, self.codec, self.keep_vanished)

    def _padding(self) -> MaskSample:
        """An empty image without masks, beyond the last one."""
        side, grid = self.view.image_size_px, self.view.image_size_px // self.view.patch_size_px
        return MaskSample(
            key=PADDING,
            dataset=self.labels.dataset,
            image_3SS=torch.zeros(3, side, side, dtype=torch.uint8),
            coverage_KGG=torch.zeros(0, grid, grid, dtype=torch.float16),
            context_box_px_K4=torch.zeros(0, 4, dtype=torch.int32),
            mask_ids=(),
            class_ids=(),
            text_ids=(),
            prompt_tokens=(),
            instruction_ids=(),
        )
