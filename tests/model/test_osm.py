"""The parts put together: which tokens are supervised, what is trained, and a training step in mixed precision.

That the numbers are right is `tests/reference/`'s business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from osm_lightning.batch import MaskBatch
from osm_lightning.model.config import LanguageConfig, Precision, QFormerConfig, VisionConfig
from osm_lightning.model.frozen import fingerprint
from osm_lightning.model.osm import OSM

SIDE, PATCH, QUERIES, VOCABULARY = 16, 4, 2, 30
QFORMER = QFormerConfig(num_layers=2, width=8, num_heads=2, ffn_width=12, num_queries=QUERIES, dropout=0.0)


def tiny_model(qformer: QFormerConfig = QFORMER, dtype: Precision = "float32", modes: Sequence[str] = ("coco",)) -> OSM:
    torch.manual_seed(0)
    vit = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": PATCH}
    llm = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": VOCABULARY,
        "initializer_range": 0.3,
    }
    vision = VisionConfig(
        tower="dinov2",
        architecture=vit,
        image_size_px=SIDE,
        window_size_px=8,
        patch_size_px=PATCH,
        dtype=dtype,
    )
    return OSM(vision, qformer, LanguageConfig(architecture=llm, dtype=dtype), modes)


def tiny_batch() -> MaskBatch:
    """Two images, three masks; prompts of 2, 1 and 3 ids, answers of 3, 1 and 2."""
    generator = torch.Generator().manual_seed(1)
    return MaskBatch(
        images_I3SS=torch.randint(0, 256, (2, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator),
        image_index_M=torch.tensor([0, 0, 1]),
        coverage_MGG=torch.rand(3, 4, 4, generator=generator).half(),
        context_box_px_M4=torch.tensor([[0, 0, 5, 5], [3, 3, 15, 15], [8, 0, 15, 7]], dtype=torch.int32),
        mode_M=torch.tensor([0, 1, 1]),
        dataset_M=torch.zeros(3, dtype=torch.int64),
        class_id_M=torch.zeros(3, dtype=torch.int64),
        text_ids_ML=torch.tensor([[11, 12, 13, 14, 2], [21, 2, 0, 0, 0], [5, 6, 7, 8, 2]]),
        prompt_tokens_M=torch.tensor([2, 1, 3]),
        text_tokens_M=torch.tensor([5, 2, 5]),
        instruction_ids_MT=torch.zeros(3, 0, dtype=torch.int64),
        instruction_tokens_M=torch.zeros(3, dtype=torch.int64),
        datasets=("coco",),
        keys=("one", "two"),
        mask_ids=("a", "b", "c"),
    )


def test_answers_and_eos_are_predicted_and_nothing_else() -> None:
    answers = tiny_model()(tiny_batch())
    assert answers.target_P.tolist() == [13, 14, 2, 2, 8, 2]
    assert answers.mask_index_P.tolist() == [0, 0, 0, 1, 2, 2]
    assert answers.logits_PV.shape == (6, VOCABULARY)
    assert answers.logits_PV.dtype == torch.float32


def test_supervising_the_prompt_adds_it_but_for_its_first_id_and_never_the_padding() -> None:
    model, batch = tiny_model(), tiny_batch()
    answers, everything = model(batch), model(batch, supervise_prompt=True)
    assert everything.target_P.tolist() == [12, 13, 14, 2, 2, 6, 7, 8, 2]
    assert everything.mask_index_P.tolist() == [0] * 4 + [1] + [2] * 4
    torch.testing.assert_close(everything.logits_PV[[1, 2, 3, 4, 7, 8]], answers.logits_PV)


def test_what_is_behind_a_token_does_not_change_its_prediction() -> None:
    model, batch = tiny_model(), tiny_batch()
    changed = batch.text_ids_ML.clone()
    changed[0, 4] = 29  # the last target of the first mask
    changed[1, 2:] = 17  # padding
    answers, other = model(batch), model(replace(batch, text_ids_ML=changed))
    assert other.target_P.tolist() == [13, 14, 29, 2, 8, 2]
    assert torch.equal(other.logits_PV, answers.logits_PV)


def test_what_is_trained_is_the_mask_q_former_s_side() -> None:
    model = tiny_model(replace(QFORMER, instruction_tokenizer="builtin:20", instruction_vocabulary=20))
    parts = {name.split(".")[0] for name, _ in model.trained()}
    assert parts == {"vision", "qformer", "modes", "projection"}
    names = {name for name, _ in model.trained()}
    assert {name for name in names if name.startswith("vision")} == {"vision.position_NE"}
    assert {"modes.query", "modes.embedding", "qformer.mask_query_QD", "qformer.context_query_QD"} <= names
    assert names >= {"qformer.instruction.word.weight", "projection.weight"}
    assert not any(name.startswith(("vision.tower", "language")) for name in names)


def test_without_a_mode_query_no_mode_is_trained_or_read() -> None:
    model, batch = tiny_model(replace(QFORMER, mode_query=False)), tiny_batch()
    assert not any(name.startswith("modes") for name, _ in model.trained())
    tokens = model.mask_tokens(model.encode(batch.images_I3SS), batch)
    assert tokens.shape == (3, QUERIES, 16)
    other = model.mask_tokens(model.encode(batch.images_I3SS), batch.in_mode(0))
    assert torch.equal(tokens, other)


def test_the_mode_s_embedding_stands_behind_the_mask_tokens() -> None:
    model, batch = tiny_model(), tiny_batch()
    tokens = model.mask_tokens(model.encode(batch.images_I3SS), batch)
    assert tokens.shape == (3, QUERIES + 1, 16)
    assert torch.equal(tokens[:, -1], model.modes.embedding[[0, 1, 1]])


def test_modes_that_are_not_in_the_batch_get_no_gradient() -> None:
    model, batch = tiny_model(), tiny_batch().in_mode(1)
    model(batch).logits_PV.square().sum().backward()
    for table in (model.modes.query, model.modes.embedding):
        assert table.grad is not None
        assert table.grad[0].eq(0).all()
        assert table.grad[1].ne(0).any()


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_frozen_parts_train_single_precision_weights(autocast: bool) -> None:
    model, batch = tiny_model(dtype="bfloat16").train(), tiny_batch()
    trained = dict(model.trained())
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if name not in trained}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert {p.dtype for p in frozen.values()} == {torch.bfloat16}
    optimiser = torch.optim.AdamW(trained.values(), lr=1e-2, weight_decay=0.0)
    before = {name: p.detach().clone() for name, p in trained.items()}
    losses = []
    for _ in range(8):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            answers = model(batch)
        loss = torch.nn.functional.cross_entropy(answers.logits_PV, answers.target_P)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    # A softmax ignores what it adds to all keys; everything else must have moved.
    still = [n for n, p in trained.items() if torch.equal(p, before[n]) and not n.endswith("key.bias")]
    assert not still
    for name, parameter in model.named_parameters():
        if name in frozen:
            assert parameter.grad is None
            assert torch.equal(parameter, frozen[name]), name


def test_frozen_parts_stay_in_eval_when_the_whole_model_trains() -> None:
    model = tiny_model().train()
    assert model.qformer.training
    assert not model.vision.tower.training
    assert not model.language.llm.training
    assert not model.eval().qformer.training


def test_frozen_parts_are_known_again_in_another_precision_and_not_in_other_weights() -> None:
    identity = tiny_model().frozen_identity()
    assert identity.keys() == {"vision", "language"}
    assert tiny_model(dtype="bfloat16").frozen_identity() == identity
    other = tiny_model()
    with torch.no_grad():
        other.language.llm.get_input_embeddings().weight[0, 0] += 1
    assert fingerprint(other.vision.tower) == identity["vision"]
    assert fingerprint(other.language.llm) != identity["language"]


@pytest.mark.parametrize(
    ("modes", "message"), [(["coco", "coco"], "'coco' twice"), (["agnostic"], "'agnostic'"), (["any"], "'any'")]
)
def test_modes_that_cannot_be_are_refused(modes: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_model(modes=modes)
