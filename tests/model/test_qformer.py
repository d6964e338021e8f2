"""MaskQ-Former's own parts: masks laid side by side by image, padding that nobody sees, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from osm_lightning.model.config import QFormerConfig
from osm_lightning.model.qformer import MaskQFormer, Slots

IMAGE_WIDTH, TOKENS, QUERIES, TEXT = 6, 7, 2, 4
CONFIG = QFormerConfig(
    num_layers=3,
    width=8,
    num_heads=2,
    ffn_width=12,
    num_queries=QUERIES,
    instruction_tokenizer="builtin:20",
    instruction_vocabulary=20,
    max_instruction_tokens=TEXT,
    dropout=0.0,
)
UNSORTED = torch.tensor([2, 0, 2, 2, 0, 3])
"""Image of each mask: out of order, 0 to 3 masks per image, none of image 1."""


def tiny_qformer(config: QFormerConfig = CONFIG) -> MaskQFormer:
    torch.manual_seed(0)
    model = MaskQFormer(config, IMAGE_WIDTH)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def inputs(num_masks: int, num_images: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Queries, image tokens, visibility, instruction ids and their lengths."""
    generator = torch.Generator().manual_seed(1)
    queries_MAD = torch.randn(num_masks, 2 * QUERIES + 1, 8, generator=generator)
    image_INE = torch.randn(num_images, TOKENS, IMAGE_WIDTH, generator=generator)
    visible_MAN = torch.rand(num_masks, 2 * QUERIES + 1, TOKENS, generator=generator) < 0.4
    visible_MAN[:, :, 0] = True
    ids_MT = torch.randint(1, 20, (num_masks, TEXT), generator=generator)
    lengths_M = torch.randint(0, TEXT + 1, (num_masks,), generator=generator)
    return queries_MAD, image_INE, visible_MAN, ids_MT, lengths_M


class TestSlots:
    def test_masks_stand_with_their_image_in_their_own_order(self) -> None:
        slots = Slots.of(UNSORTED, num_images=5)
        assert (slots.num_images, slots.per_image) == (5, 3)
        assert slots.flat_M.tolist() == [6, 0, 7, 8, 1, 9]

    def test_scatter_fills_empty_places_and_gather_undoes_it(self) -> None:
        slots = Slots.of(UNSORTED, num_images=5)
        rows = torch.arange(1, 1 + 6 * 2 * 3).view(6, 2, 3)
        packed = slots.scatter(rows, fill=-1)
        assert packed.shape == (5, 3 * 2, 3)
        assert packed[1].eq(-1).all()
        assert packed[4].eq(-1).all()
        assert torch.equal(packed[2], rows[[0, 2, 3]].flatten(0, 1))
        assert torch.equal(packed[0], torch.cat([rows[1], rows[4], torch.full((2, 3), -1)]))
        assert torch.equal(slots.gather(packed, 2), rows)

    def test_as_many_masks_everywhere_leave_no_empty_place(self) -> None:
        index = torch.arange(3).repeat_interleave(2)
        rows = torch.randn(6, 4, 2)
        assert torch.equal(Slots.of(index, 3).scatter(rows, 0.0), rows.view(3, 8, 2))


class TestSharedImages:
    def test_masks_in_any_order_get_what_each_gets_alone_with_its_image(self) -> None:
        model = tiny_qformer()
        queries, image, visible, ids, lengths = inputs(num_masks=6, num_images=5)
        together = model.attend(queries, model.image_keys_values(image), UNSORTED, visible, ids, lengths)
        for mask, index in enumerate(UNSORTED.tolist()):
            one = slice(mask, mask + 1)
            shared = model.image_keys_values(image[index : index + 1])
            alone = model.attend(
                queries[one], shared, torch.zeros(1, dtype=torch.int64), visible[one], ids[one], lengths[one]
            )
            torch.testing.assert_close(together[one], alone, atol=1e-5, rtol=1e-5)

    def test_empty_places_give_finite_gradients_and_none_to_images_without_masks(self) -> None:
        model = tiny_qformer()
        queries, image, visible, ids, lengths = inputs(num_masks=6, num_images=5)
        visible[:, :, 1:] = False  # the least that a row may see
        image.requires_grad_()
        out = model.attend(queries, model.image_keys_values(image), UNSORTED, visible, ids, lengths)
        out.square().sum().backward()
        assert out.isfinite().all()
        assert image.grad is not None
        assert image.grad[[1, 4]].eq(0).all()
        assert image.grad[[0, 2, 3], 0].ne(0).all()
        assert image.grad[:, 1:].eq(0).all()
        for name, parameter in model.named_parameters():
            assert parameter.grad is None or parameter.grad.isfinite().all(), name

    def test_keys_and_values_are_made_for_every_nth_layer_from_the_first(self) -> None:
        image = torch.randn(5, TOKENS, IMAGE_WIDTH)
        made = [entry is not None for entry in tiny_qformer().image_keys_values(image)]
        assert made == [True, False, True]
        every = [
            entry is not None
            for entry in tiny_qformer(replace(CONFIG, cross_attention_every=1)).image_keys_values(image)
        ]
        assert every == [True, True, True]
        first = tiny_qformer().image_keys_values(image)[0]
        assert first is not None
        assert first.keys_IHNd.shape == first.values_IHNd.shape == (5, 2, TOKENS, 4)


class TestInstruction:
    def test_padding_is_not_seen(self) -> None:
        model = tiny_qformer()
        queries, image, visible, ids, _ = inputs(num_masks=2, num_images=1)
        index, lengths = torch.zeros(2, dtype=torch.int64), torch.tensor([3, 0])
        images = model.image_keys_values(image)
        wanted = model.attend(queries, images, index, visible, ids, lengths)
        other_padding = ids.clone()
        other_padding[0, 3], other_padding[1] = 19 - ids[0, 3], 0
        torch.testing.assert_close(model.attend(queries, images, index, visible, other_padding, lengths), wanted)
        shorter = model.attend(queries[:1], images, index[:1], visible[:1], ids[:1, :3], lengths[:1])
        torch.testing.assert_close(shorter, wanted[:1], atol=1e-6, rtol=1e-5)
        none = model.attend(queries[1:], images, index[1:], visible[1:], ids[1:, :0], lengths[1:])
        torch.testing.assert_close(none, wanted[1:], atol=1e-6, rtol=1e-5)

    def test_its_words_and_their_order_matter(self) -> None:
        model = tiny_qformer()
        queries, image, visible, _, _ = inputs(num_masks=1, num_images=1)
        images, index, length = model.image_keys_values(image), torch.tensor([0]), torch.tensor([3])
        outs = [
            model.attend(queries, images, index, visible, torch.tensor([ids]), length)
            for ids in ([1, 2, 3], [1, 3, 2], [1, 2, 4])
        ]
        assert (outs[0] - outs[1]).abs().max() > 1e-3
        assert (outs[0] - outs[2]).abs().max() > 1e-3

    def test_a_model_without_it_ignores_the_batch_s(self) -> None:
        model = tiny_qformer(replace(CONFIG, instruction_tokenizer=None))
        assert not any("text_ffn" in name or "instruction" in name for name in model.state_dict())
        queries, image, visible, ids, lengths = inputs(num_masks=2, num_images=1)
        images, index = model.image_keys_values(image), torch.zeros(2, dtype=torch.int64)
        out = model.attend(queries, images, index, visible, ids, lengths)
        assert torch.equal(out, model.attend(queries, images, index, visible, ids[:, :0], lengths * 0))

    def test_one_that_is_too_long_is_refused(self) -> None:
        model = tiny_qformer()
        queries, image, visible, _, _ = inputs(num_masks=1, num_images=1)
        ids = torch.ones(1, TEXT + 1, dtype=torch.int64)
        with pytest.raises(ValueError, match=r"5 tokens, but qformer\.max_instruction_tokens is 4"):
            model.attend(queries, model.image_keys_values(image), torch.tensor([0]), visible, ids, torch.tensor([5]))


class TestQueries:
    def test_order_is_mask_context_mode(self) -> None:
        model = tiny_qformer()
        mode_MD = torch.randn(3, 8)
        queries = model.queries(mode_MD, num_masks=3)
        assert torch.equal(queries[1, :QUERIES], model.mask_query_QD)
        assert torch.equal(queries[1, QUERIES : 2 * QUERIES], model.context_query_QD)
        assert torch.equal(queries[:, -1], mode_MD)

    def test_parts_can_be_left_out(self) -> None:
        model = tiny_qformer(replace(CONFIG, context="none"))
        assert model.context_query_QD is None
        assert "context_query_QD" not in model.state_dict()
        assert model.queries(None, num_masks=3).shape == (3, QUERIES, 8)

    def test_mask_queries_start_as_a_copy_of_the_context_queries_and_part_from_them(self) -> None:
        model = MaskQFormer(CONFIG, IMAGE_WIDTH)
        assert torch.equal(model.mask_query_QD, model.context_query_QD)
        assert model.mask_query_QD.data_ptr() != model.context_query_QD.data_ptr()
        with torch.no_grad():
            model.mask_query_QD += 1
        assert not torch.equal(model.mask_query_QD, model.context_query_QD)


class TestDropout:
    def run(self, model: MaskQFormer) -> Tensor:
        queries, image, visible, ids, lengths = inputs(num_masks=2, num_images=1)
        index = torch.zeros(2, dtype=torch.int64)
        return model.attend(queries, model.image_keys_values(image), index, visible, ids, lengths)

    def test_it_is_on_in_training_only(self) -> None:
        model = tiny_qformer(replace(CONFIG, dropout=0.5))
        model.train()
        assert not torch.equal(self.run(model), self.run(model))
        model.eval()
        assert torch.equal(self.run(model), self.run(model))

    def test_without_it_training_and_eval_agree(self) -> None:
        model = tiny_qformer()
        assert torch.equal(self.run(model.train()), self.run(model.eval()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 9}, r"qformer\.width is 9.*num_heads \(2\)"),
        ({"context": -0.5}, r"qformer\.context is -0\.5.*'global'"),
    ],
)
def test_sizes_that_cannot_be_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MaskQFormer(replace(CONFIG, **changes), IMAGE_WIDTH)
