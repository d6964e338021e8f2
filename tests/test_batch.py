"""Layout of samples and batches: cutting, switching the mode, moving."""

import dataclasses
from collections.abc import Sized

import pytest
import torch

from osm_lightning.batch import AGNOSTIC, AGNOSTIC_NAME, MaskBatch, MaskSample, mode_index, mode_names


@pytest.fixture
def sample() -> MaskSample:
    """Four masks, so that no field but the masks' own has that length."""
    return MaskSample(
        key="a",
        dataset="d",
        image_3SS=torch.zeros(3, 4, 4, dtype=torch.uint8),
        coverage_KGG=torch.arange(16, dtype=torch.float16).reshape(4, 2, 2),
        context_box_px_K4=torch.arange(16, dtype=torch.int32).reshape(4, 4),
        mask_ids=("w", "x", "y", "z"),
        class_ids=(1, 2, 3, 4),
        text_ids=((1,), (1, 2), (1, 2, 3), (4,)),
        prompt_tokens=(1, 1, 2, 1),
        instruction_ids=((), (5,), (6,), (7,)),
        num_vanished=3,
    )


@pytest.fixture
def batch() -> MaskBatch:
    return MaskBatch(
        images_I3SS=torch.zeros(1, 3, 4, 4, dtype=torch.uint8),
        image_index_M=torch.zeros(2, dtype=torch.int64),
        coverage_MGG=torch.ones(2, 2, 2, dtype=torch.float16),
        context_box_px_M4=torch.zeros(2, 4, dtype=torch.int32),
        mode_M=torch.tensor([AGNOSTIC, 2]),
        dataset_M=torch.tensor([0, 1]),
        class_id_M=torch.tensor([1, 2]),
        text_ids_ML=torch.ones(2, 5, dtype=torch.int64),
        prompt_tokens_M=torch.tensor([2, 3]),
        text_tokens_M=torch.tensor([4, 5]),
        instruction_ids_MT=torch.ones(2, 3, dtype=torch.int64),
        instruction_tokens_M=torch.tensor([2, 3]),
        datasets=("coco", "lvis"),
        keys=("a",),
        mask_ids=("x", "y"),
        num_vanished=3,
    )


def tensors(batch: MaskBatch) -> dict[str, torch.Tensor]:
    values = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}


def test_take_cuts_every_field_that_is_per_mask(sample: MaskSample) -> None:
    cut = sample.take(2)
    assert cut.num_masks == 2
    per_mask = 0
    for field in dataclasses.fields(sample):
        value, whole = getattr(cut, field.name), getattr(sample, field.name)
        if isinstance(whole, Sized) and len(whole) == 4:
            same = torch.equal(value, whole[:2]) if isinstance(whole, torch.Tensor) else value == whole[:2]
            assert same, field.name
            per_mask += 1
        else:
            assert value is whole, field.name
    assert per_mask == 7
    assert sample.num_masks == 4, "the sample itself must stay whole"


def test_take_as_many_as_there_are_or_more_changes_nothing(sample: MaskSample) -> None:
    assert sample.take(4) is sample
    assert sample.take(9) is sample


def test_lost_masks_can_be_noted(sample: MaskSample) -> None:
    noted = sample.with_vanished(5)
    assert (noted.num_vanished, sample.num_vanished) == (5, 3)
    assert noted.image_3SS is sample.image_3SS


def test_counts(batch: MaskBatch) -> None:
    assert (batch.num_images, batch.num_masks) == (1, 2)


def test_a_part_takes_its_masks_and_the_images_that_they_point_at() -> None:
    numbers = torch.arange(6)
    names = tuple(field.name for field in dataclasses.fields(MaskBatch) if "_M" in field.name)
    per_mask = {name: numbers.reshape(6, *[1] * (name.endswith("_MGG") + (name[-1] != "M"))) for name in names}
    per_mask["image_index_M"] = torch.tensor([0, 1, 1, 2, 2, 3])
    whole = MaskBatch(
        images_I3SS=torch.arange(4).reshape(4, 1, 1, 1),
        **per_mask,
        datasets=("coco",),
        keys=("a", "b", "c", "d"),
        mask_ids=tuple("012345"),
    )
    part, images = whole.part(slice(2, 5))
    assert images == slice(1, 3)
    assert (part.keys, part.mask_ids, part.datasets) == (("b", "c"), ("2", "3", "4"), ("coco",))
    assert part.images_I3SS.flatten().tolist() == [1, 2]
    assert part.image_index_M.tolist() == [0, 1, 1]
    for name in names:
        if name != "image_index_M":
            assert getattr(part, name).flatten().tolist() == [2, 3, 4], name
    assert whole.part(slice(4, 99))[0].mask_ids == ("4", "5")
    nothing, images = whole.part(slice(0, 0))
    assert (nothing.num_masks, images) == (0, slice(0, 4))


def test_in_mode_changes_only_the_mode(batch: MaskBatch) -> None:
    changed = batch.in_mode(1)
    assert changed.mode_M.tolist() == [1, 1]
    assert changed.mode_M.dtype == torch.int64
    assert batch.mode_M.tolist() == [AGNOSTIC, 2], "the batch itself must stay as it was"
    for field in dataclasses.fields(batch):
        if field.name != "mode_M":
            assert getattr(changed, field.name) is getattr(batch, field.name), field.name


def test_to_moves_every_tensor_and_keeps_the_rest(batch: MaskBatch) -> None:
    moved = batch.to("meta")
    assert len(tensors(moved)) == 12
    for name, value in tensors(moved).items():
        assert value.device.type == "meta", name
        assert (value.dtype, value.shape) == (getattr(batch, name).dtype, getattr(batch, name).shape), name
    for field in dataclasses.fields(batch):
        if field.name not in tensors(batch):
            assert getattr(moved, field.name) is getattr(batch, field.name), field.name


def test_nothing_can_be_set_by_accident(batch: MaskBatch, sample: MaskSample) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        batch.mode_M = torch.zeros(2)  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        sample.key = "b"  # type: ignore[misc]


def test_agnostic_mode_comes_first_under_either_name() -> None:
    modes = mode_names(["coco", "lvis"])
    assert modes == (AGNOSTIC_NAME, "coco", "lvis")
    assert [mode_index(mode, modes) for mode in modes] == [AGNOSTIC, 1, 2]
    assert mode_index("any", modes) == AGNOSTIC


@pytest.mark.parametrize("names", [["coco", "agnostic"], ["any"]])
def test_agnostic_mode_is_nobody_elses_name(names: list[str]) -> None:
    with pytest.raises(ValueError, match=rf"model\.modes names '{names[-1]}', which every model has"):
        mode_names(names)


def test_mode_that_stands_twice_or_nowhere_is_refused() -> None:
    with pytest.raises(ValueError, match="names 'coco' twice"):
        mode_names(["coco", "lvis", "coco"])
    with pytest.raises(ValueError, match=r"mode 'lvis' is not one of this model's \(agnostic, coco\)"):
        mode_index("lvis", mode_names(["coco"]))
