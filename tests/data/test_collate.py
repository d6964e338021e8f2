import pytest
import torch

from osm_lightning.batch import AGNOSTIC, MaskSample
from osm_lightning.data.collate import collate, pad


def make_sample(key, dataset, texts, instructions=None, num_vanished=0):
    """A sample with one mask for each text; every mask's numbers differ."""
    num_masks, first = len(texts), sum(key.encode())
    return MaskSample(
        key=key,
        dataset=dataset,
        image_3SS=torch.full((3, 28, 28), first % 256, dtype=torch.uint8),
        coverage_KGG=torch.arange(num_masks * 4, dtype=torch.float16).reshape(num_masks, 2, 2) / 64 + first / 1024,
        context_box_px_K4=first + torch.arange(num_masks * 4, dtype=torch.int32).reshape(num_masks, 4),
        mask_ids=tuple(f"{key}-{k}" for k in range(num_masks)),
        class_ids=tuple(first + k for k in range(num_masks)),
        text_ids=tuple(texts),
        prompt_tokens=tuple(range(1, num_masks + 1)),
        instruction_ids=tuple(instructions or [()] * num_masks),
        num_vanished=num_vanished,
    )


FIRST = make_sample("a", "right", [(5, 6, 7), (8, 9, 10, 11)], [(1, 2), (3,)], num_vanished=2)
NONE = make_sample("b", "left", [], num_vanished=1)
LAST = make_sample("c", "left", [(12,)], [(4, 5, 6)])


def test_masks_follow_their_samples_in_order():
    batch = collate([FIRST, NONE, LAST], ("left", "right"), modes=[2, 0, 1])
    assert (batch.num_images, batch.num_masks) == (3, 3)
    assert batch.image_index_M.tolist() == [0, 0, 2]
    assert batch.dataset_M.tolist() == [1, 1, 0]
    assert batch.datasets == ("left", "right")
    assert batch.mode_M.tolist() == [2, 0, 1]
    assert batch.keys == ("a", "b", "c")
    assert batch.mask_ids == ("a-0", "a-1", "c-0")
    assert batch.class_id_M.tolist() == [97, 98, 99]
    assert batch.prompt_tokens_M.tolist() == [1, 2, 1]
    assert batch.num_vanished == 3
    assert torch.equal(batch.images_I3SS, torch.stack([FIRST.image_3SS, NONE.image_3SS, LAST.image_3SS]))
    assert torch.equal(batch.coverage_MGG, torch.cat([FIRST.coverage_KGG, LAST.coverage_KGG]))
    assert torch.equal(batch.context_box_px_M4, torch.cat([FIRST.context_box_px_K4, LAST.context_box_px_K4]))


def test_texts_are_padded_on_the_right_to_the_longest():
    batch = collate([FIRST, LAST], ("left", "right"))
    assert batch.text_ids_ML.tolist() == [[5, 6, 7, 0], [8, 9, 10, 11], [12, 0, 0, 0]]
    assert batch.text_tokens_M.tolist() == [3, 4, 1]
    assert batch.instruction_ids_MT.tolist() == [[1, 2, 0], [3, 0, 0], [4, 5, 6]]
    assert batch.instruction_tokens_M.tolist() == [2, 1, 3]


@pytest.mark.parametrize("samples", [[FIRST, LAST], [NONE], [NONE, FIRST]])
def test_types_do_not_depend_on_what_is_there(samples):
    batch = collate(samples, ("left", "right"))
    assert batch.images_I3SS.dtype == torch.uint8
    assert batch.coverage_MGG.dtype == torch.float16
    assert batch.context_box_px_M4.dtype == torch.int32
    for name in ("image_index_M", "mode_M", "dataset_M", "class_id_M", "text_ids_ML", "prompt_tokens_M"):
        assert getattr(batch, name).dtype == torch.int64, name
    for name in ("text_tokens_M", "instruction_ids_MT", "instruction_tokens_M"):
        assert getattr(batch, name).dtype == torch.int64, name


def test_an_image_without_masks_makes_a_batch():
    batch = collate([NONE], ("left",))
    assert (batch.num_images, batch.num_masks, batch.num_vanished) == (1, 0, 1)
    assert batch.coverage_MGG.shape == (0, 2, 2)
    assert batch.context_box_px_M4.shape == (0, 4)
    assert batch.text_ids_ML.shape == (0, 0)


def test_without_modes_all_are_agnostic():
    assert collate([FIRST], ("right",)).mode_M.tolist() == [AGNOSTIC, AGNOSTIC]


def test_a_qformer_that_takes_no_instruction_gets_none():
    batch = collate([make_sample("a", "left", [(1,), (2,)])], ("left",))
    assert batch.instruction_ids_MT.shape == (2, 0)
    assert batch.instruction_tokens_M.tolist() == [0, 0]


def test_pad():
    ids, lengths = pad([(1, 2), (), (3,)])
    assert ids.tolist() == [[1, 2], [0, 0], [3, 0]]
    assert lengths.tolist() == [2, 0, 1]
    assert [tensor.shape for tensor in pad([])] == [(0, 0), (0,)]
