"""Our Q-Former computes what transformers' InstructBLIP one does, on the same random weights through our converter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import InstructBlipQFormerConfig, InstructBlipQFormerModel

from osm_lightning.model.config import QFormerConfig
from osm_lightning.model.qformer import MaskQFormer
from osm_lightning.weights.qformer_names import match_qformer, our_name

IMAGES, MASKS_PER_IMAGE, QUERIES, IMAGE_TOKENS, TEXT = 2, 3, 5, 11, 7
MASKS = IMAGES * MASKS_PER_IMAGE
IMAGE_WIDTH, WIDTH, VOCABULARY = 24, 32, 50
MOST = {torch.float32: 1e-5, torch.float64: 1e-12}
"""Largest difference that is allowed for values around 1. Double precision tells the same function from a close one."""


def config(instruction: bool = True) -> QFormerConfig:
    return QFormerConfig(
        num_layers=4,
        width=WIDTH,
        num_heads=4,
        ffn_width=64,
        num_queries=QUERIES,
        instruction_tokenizer="builtin:50" if instruction else None,
        instruction_vocabulary=VOCABULARY,
        max_instruction_tokens=16,
        mode_query=False,
    )


def randomise(module: nn.Module) -> None:
    """Large weights and no neutral biases or norms, so that nothing can be left out without being seen."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = 0.15 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + noise if name.endswith("orm.weight") else noise)


@pytest.fixture
def theirs() -> InstructBlipQFormerModel:
    model = InstructBlipQFormerModel(
        InstructBlipQFormerConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=16,
            encoder_hidden_size=IMAGE_WIDTH,
            attn_implementation="sdpa",
        )
    )
    randomise(model)
    return model.eval()


def converted(theirs: InstructBlipQFormerModel, instruction: bool = True) -> MaskQFormer:
    """Our Q-Former with their weights, in their precision."""
    ours = MaskQFormer(config(instruction), IMAGE_WIDTH).to(theirs.dtype)
    randomise(ours)
    weights, report = match_qformer(theirs.state_dict(), ours, "theirs")
    assert not report.problems()
    missing = ours.load_state_dict(weights, strict=False).missing_keys
    assert set(missing) == {"mask_query_QD", "context_query_QD"}
    return ours.eval()


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Image tokens, queries, instruction ids, and how many ids of each row are not padding."""
    generator = torch.Generator().manual_seed(1)
    image_INE = torch.randn(IMAGES, IMAGE_TOKENS, IMAGE_WIDTH, generator=generator)
    queries_MAD = torch.randn(MASKS, 2 * QUERIES, WIDTH, generator=generator)
    ids_MT = torch.randint(1, VOCABULARY, (MASKS, TEXT), generator=generator)
    lengths_M = torch.tensor([7, 1, 4, 6, 2, 3])
    return image_INE.to(dtype), queries_MAD.to(dtype), ids_MT * (torch.arange(TEXT) < lengths_M[:, None]), lengths_M


def random_visibility() -> Tensor:
    """bool[M, A, N], no two queries alike and the first token visible to all, as the CLS tokens are."""
    visible_MAN = torch.rand(MASKS, 2 * QUERIES, IMAGE_TOKENS, generator=torch.Generator().manual_seed(2)) < 0.4
    visible_MAN[:, :, 0] = True
    return visible_MAN


def run_ours(model: MaskQFormer, visible_MAN: Tensor, with_text: bool) -> tuple[Tensor, Tensor]:
    """Query outputs float[M, A, D], and the gradient of their weighted sum at the image tokens."""
    image_INE, queries_MAD, ids_MT, lengths_M = inputs(model.norm.weight.dtype)
    if not with_text:
        ids_MT, lengths_M = ids_MT[:, :0], torch.zeros_like(lengths_M)
    image_INE.requires_grad_()
    index_M = torch.arange(IMAGES).repeat_interleave(MASKS_PER_IMAGE)
    out = model.attend(queries_MAD, model.image_keys_values(image_INE), index_M, visible_MAN, ids_MT, lengths_M)
    return out.detach(), torch.autograd.grad(weighted_sum(out), image_INE)[0]


def run_theirs(model: InstructBlipQFormerModel, visible_MAN: Tensor | None, with_text: bool) -> tuple[Tensor, Tensor]:
    image_INE, queries_MAD, ids_MT, lengths_M = inputs(model.dtype)
    image_INE.requires_grad_()
    valid_MX = torch.ones(MASKS, 2 * QUERIES, dtype=torch.long)
    if with_text:
        valid_MX = torch.cat([valid_MX, (torch.arange(TEXT) < lengths_M[:, None]).long()], dim=1)
    out = model(
        input_ids=ids_MT if with_text else None,
        attention_mask=valid_MX,
        query_embeds=queries_MAD,
        encoder_hidden_states=image_INE.repeat_interleave(MASKS_PER_IMAGE, dim=0),
        encoder_attention_mask=None if visible_MAN is None else visible_MAN.unsqueeze(1),
    ).last_hidden_state[:, : 2 * QUERIES]
    return out.detach(), torch.autograd.grad(weighted_sum(out), image_INE)[0]


def weighted_sum(out: Tensor) -> Tensor:
    """A scalar with a different weight for every value: the plain sum of a LayerNorm's output has no gradient."""
    return (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(3))).sum() / 10


@pytest.mark.parametrize("dtype", list(MOST))
@pytest.mark.parametrize("with_text", [True, False])
@pytest.mark.parametrize("masked", [False, True])
def test_hidden_states_and_gradients_are_those_of_transformers(
    theirs: InstructBlipQFormerModel, masked: bool, with_text: bool, dtype: torch.dtype
) -> None:
    theirs.to(dtype)
    ours = converted(theirs)
    visible = random_visibility()
    everything = torch.ones_like(visible)
    out, gradient = run_ours(ours, visible if masked else everything, with_text)
    expected, expected_gradient = run_theirs(theirs, visible if masked else None, with_text)
    torch.testing.assert_close(out, expected, atol=MOST[dtype], rtol=0)
    torch.testing.assert_close(gradient, expected_gradient, atol=MOST[dtype], rtol=0)
    # The comparison would mean nothing if what is compared had no effect.
    assert expected_gradient.abs().max() > 1e-3
    assert (run_ours(ours, everything if masked else visible, with_text)[0] - expected).abs().max() > 0.1
    assert (run_ours(ours, visible if masked else everything, not with_text)[0] - expected).abs().max() > 0.1


def test_a_model_that_reads_no_instruction_takes_all_but_the_text_parts(theirs: InstructBlipQFormerModel) -> None:
    ours = converted(theirs, instruction=False)
    visible = random_visibility()
    out, _ = run_ours(ours, visible, with_text=False)
    expected, _ = run_theirs(theirs, visible, with_text=False)
    torch.testing.assert_close(out, expected, atol=MOST[torch.float32], rtol=0)


def test_position_ids_of_older_checkpoints_are_left_out(theirs: InstructBlipQFormerModel) -> None:
    weights = {**theirs.state_dict(), "embeddings.position_ids": torch.arange(16).unsqueeze(0)}
    assert "embeddings.position_ids" in weights
    fitting, report = match_qformer(weights, MaskQFormer(config(), IMAGE_WIDTH), "theirs")
    assert fitting.keys() == {our_name(name) for name in theirs.state_dict()}
    assert not report.problems()
    assert report.extras == ["embeddings.position_ids"]


def test_every_misfit_is_named_up_to_five_of_each(theirs: InstructBlipQFormerModel) -> None:
    weights = dict(theirs.state_dict())
    for index in range(7):
        weights[f"pooler.{index}.weight"] = torch.zeros(1)
    lost = [f"encoder.layer.{layer}.output_query.dense.bias" for layer in range(4)]
    for name in lost:
        del weights[name]
    weights["embeddings.word_embeddings.weight"] = torch.zeros(VOCABULARY + 1, WIDTH)
    text = match_qformer(weights, MaskQFormer(config(), IMAGE_WIDTH), "theirs")[1].problems()
    assert "7 unexpected: pooler.0.weight" in text
    assert "pooler.4.weight and 2 more" in text
    assert "pooler.5.weight" not in text
    assert "4 missing" in text
    assert "encoder.layer.3.output_query.dense.bias" in text
    assert "1 of another shape: embeddings.word_embeddings.weight (51, 32) for (50, 32)" in text


def test_a_prefix_or_another_depth_does_not_fit(theirs: InstructBlipQFormerModel) -> None:
    ours, weights = MaskQFormer(config(), IMAGE_WIDTH), theirs.state_dict()
    fitting, report = match_qformer({f"qformer.{name}": tensor for name, tensor in weights.items()}, ours, "theirs")
    assert not fitting
    assert len(report.missing) == len(report.unexpected) == len(weights)
    deeper = MaskQFormer(QFormerConfig(**{**vars(config()), "num_layers": 6}), IMAGE_WIDTH)
    assert "missing: encoder.layer.4." in match_qformer(weights, deeper, "theirs")[1].problems()
