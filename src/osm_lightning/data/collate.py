"""MaskSamples to one MaskBatch: texts padded to the longest, images shared by index."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from osm_lightning.batch import AGNOSTIC, PADDING, MaskBatch, MaskSample


def collate(samples: Sequence[MaskSample], datasets: Sequence[str], modes: Sequence[int] | None = None) -> MaskBatch:
    """Puts samples together.

    Args:
        samples: at least one.
        datasets: names of all data sources; a mask's dataset is its index here.
        modes: mode index of every mask, in order; None makes all agnostic.
    """
    num_masks = [sample.num_masks for sample in samples]
    texts = [ids for sample in samples for ids in sample.text_ids]
    instructions = [ids for sample in samples for ids in sample.instruction_ids]
    text_ids, text_tokens = pad(texts)
    instruction_ids, instruction_tokens = pad(instructions)
    repeats = torch.tensor(num_masks)
    dataset = torch.tensor([datasets.index(sample.dataset) for sample in samples])
    return MaskBatch(
        images_I3SS=torch.stack([sample.image_3SS.permute(1, 2, 0) for sample in samples]).permute(0, 3, 1, 2),
        image_index_M=torch.arange(len(samples)).repeat_interleave(repeats),
        coverage_MGG=torch.cat([sample.coverage_KGG for sample in samples]),
        context_box_px_M4=torch.cat([sample.context_box_px_K4 for sample in samples]),
        mode_M=torch.full((len(texts),), AGNOSTIC) if modes is None else torch.tensor(modes),
        dataset_M=dataset.repeat_interleave(repeats),
        class_id_M=torch.tensor([c for sample in samples for c in sample.class_ids], dtype=torch.int64),
        text_ids_ML=text_ids,
        prompt_tokens_M=torch.tensor([n for sample in samples for n in sample.prompt_tokens], dtype=torch.int64),
        text_tokens_M=text_tokens,
        instruction_ids_MT=instruction_ids,
        instruction_tokens_M=instruction_tokens,
        datasets=tuple(datasets),
        keys=tuple(sample.key for sample in samples if sample.key != PADDING),
        mask_ids=tuple(mask_id for sample in samples for mask_id in sample.mask_ids),
        num_vanished=sum(sample.num_vanished for sample in samples),
    )


def pad(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Rows of ids to int64[M, longest], padded on the right with 0, and their lengths int64[M]."""
    out = torch.zeros(len(rows), max(map(len, rows), default=0), dtype=torch.int64)
    for target, row in zip(out, rows, strict=True):
        target[: len(row)] = torch.tensor(row, dtype=torch.int64)
    return out, torch.tensor([len(row) for row in rows], dtype=torch.int64)
