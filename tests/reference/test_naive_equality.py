"""Batched and mixed, with shared images and answer positions only, OSM computes what the naive restatement does."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import naive_osm
import pytest
import torch
from naive_osm import Example
from torch import Tensor

from osm_lightning.batch import MaskBatch, mode_index
from osm_lightning.model.config import LanguageConfig, QFormerConfig, VisionConfig
from osm_lightning.model.osm import OSM
from osm_lightning.naming.greedy import name_masks
from osm_lightning.training.loss import group_loss

SIDE, WINDOW, PATCH = 24, 8, 4
VOCABULARY = 40
MODES = ("coco", "lvis")
GROUPS = ((0, 0), (0, 1), (1, 0), (1, 2))
"""(dataset, mode) of the masks in turn: each dataset in the agnostic mode and in its own."""
DATASET_WEIGHTS = (1.0, 2.5, 7.0)
"""No mask is of the third dataset."""
MASKS_PER_IMAGE = (2, 5, 1)
# The model is in double precision, but features and logits are handed on in single precision.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}

DEFAULT = QFormerConfig(
    num_layers=3,
    width=16,
    num_heads=4,
    ffn_width=24,
    num_queries=3,
    instruction_tokenizer="builtin:30",
    instruction_vocabulary=30,
    max_instruction_tokens=8,
    dropout=0.0,
)


def tiny_model(qformer: QFormerConfig = DEFAULT, use_windows: bool = True, vocabulary: int = VOCABULARY) -> OSM:
    """Random weights, large enough that every part makes a difference; every width is another."""
    torch.manual_seed(0)
    vision = VisionConfig(
        tower="dinov2",
        architecture={
            "hidden_size": 12,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": WINDOW,
            "patch_size": PATCH,
            "initializer_range": 0.5,
        },
        image_size_px=SIDE,
        window_size_px=WINDOW,
        patch_size_px=PATCH,
        use_windows=use_windows,
        windows_per_chunk=4,
    )
    language = LanguageConfig(
        architecture={
            "hidden_size": 20,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "vocab_size": vocabulary,
            "initializer_range": 0.4,
        },
        dtype="float32",
    )
    model = OSM(vision, qformer, language, MODES)
    with torch.no_grad():
        for name, parameter in model.trained():
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + 0.3 * noise if name.endswith("norm.weight") else 0.4 * noise)
        for layer in model.language.llm.model.layers:
            layer.self_attn.o_proj.weight *= 5  # else a random LLM says the same of every mask
    return model.double()


def tiny_examples(same_prompt: bool = False) -> list[list[Example]]:
    """Per image its masks: overlapping boxes, a single pixel, the border; datasets, modes and lengths are mixed."""
    generator = torch.Generator().manual_seed(5)

    def ids(length: int, most: int) -> tuple[int, ...]:
        return tuple(torch.randint(1, most, (length,), generator=generator).tolist())

    boxes = [
        (0, 0, 3, 3),
        (5, 2, 14, 9),
        (23, 23, 23, 23),
        (0, 11, 23, 11),
        (9, 9, 9, 9),
        (4, 4, 7, 7),
        (16, 1, 22, 20),
    ]
    prompt = ids(3, VOCABULARY)
    images = []
    for number in MASKS_PER_IMAGE:
        image = torch.randint(0, 256, (3, SIDE, SIDE), dtype=torch.uint8, generator=generator)
        examples = []
        for _ in range(number):
            index = sum(map(len, images)) + len(examples)
            region = naive_osm.pixels_of_box(SIDE, boxes[index % len(boxes)])
            holes = torch.rand(SIDE, SIDE, generator=generator) < 0.3
            mask = region & ~holes if bool((region & ~holes).any()) else region
            dataset, mode = GROUPS[(3 * index) % len(GROUPS)]
            prompt_ids = prompt if same_prompt else ids(1 + index % 3, VOCABULARY)
            answer_ids, instruction_ids = ids(1 + (2 * index) % 5, VOCABULARY), ids(index % 4 + 1, 30)
            examples.append(Example(image, mask, dataset, mode, prompt_ids, answer_ids, instruction_ids))
        images.append(examples)
    return images


def padded(rows: list[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
    """int64[M, longest], padded with 0, and int64[M], the lengths."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows]), torch.tensor([len(row) for row in rows])


def coverage(mask_SS: Tensor, rule: str) -> Tensor:
    """float16[G, G], share of every patch that a mask covers (of its first pixel alone: "nearest"), one at a time."""
    side = SIDE // PATCH
    out_GG = torch.zeros(side, side)
    for row in range(side):
        for column in range(side):
            patch = mask_SS[row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH]
            out_GG[row, column] = patch[0, 0] if rule == "nearest" else patch.float().mean()
    return out_GG.half()


def batch_of(images: list[list[Example]], context: float | str, rule: str = "touched") -> MaskBatch:
    examples = [example for masks in images for example in masks]
    text_ids, text_tokens = padded([example.prompt_ids + example.answer_ids for example in examples])
    instruction_ids, instruction_tokens = padded([example.instruction_ids for example in examples])
    return MaskBatch(
        images_I3SS=torch.stack([masks[0].image_3SS for masks in images]),
        image_index_M=torch.tensor([index for index, masks in enumerate(images) for _ in masks]),
        coverage_MGG=torch.stack([coverage(example.mask_SS, rule) for example in examples]),
        context_box_px_M4=torch.tensor(
            [naive_osm.context_box(example.mask_SS, context) for example in examples], dtype=torch.int32
        ),
        mode_M=torch.tensor([example.mode for example in examples]),
        dataset_M=torch.tensor([example.dataset for example in examples]),
        class_id_M=torch.zeros(len(examples), dtype=torch.int64),
        text_ids_ML=text_ids,
        prompt_tokens_M=torch.tensor([len(example.prompt_ids) for example in examples]),
        text_tokens_M=text_tokens,
        instruction_ids_MT=instruction_ids,
        instruction_tokens_M=instruction_tokens,
        datasets=("first", "second", "absent"),
        keys=tuple(f"image{index}" for index in range(len(images))),
        mask_ids=tuple(f"mask{index}" for index in range(len(examples))),
    )


CASES = {
    "paper": {},
    "global context": {"context": "global"},
    "tight context": {"context": 0.0},
    "no context": {"context": "none"},
    "no mode": {"mode_query": False},
    "no instruction": {"instruction_tokenizer": None},
    "every layer looks": {"cross_attention_every": 1},
}


def check_equality(model: OSM, supervise_prompt: bool = False) -> None:
    images = tiny_examples()
    examples = [example for masks in images for example in masks]
    batch = batch_of(images, model.qformer.config.context, model.qformer.config.mask_rule)

    answers = model(batch, supervise_prompt)
    ours = group_loss(answers, batch, torch.tensor(DATASET_WEIGHTS)).total
    ours.backward()
    gradients = {name: parameter.grad for name, parameter in model.trained()}
    model.zero_grad(set_to_none=True)

    expected_logits, expected_targets, expected_masks = [], [], []
    with torch.no_grad():
        tokens_MQZ = model.mask_tokens(model.encode(batch.images_I3SS), batch)
        for index, example in enumerate(examples):
            tokens_QZ = naive_osm.mask_tokens(model, example, naive_osm.image_tokens(model, example.image_3SS))
            torch.testing.assert_close(tokens_MQZ[index], tokens_QZ, **CLOSE)
            logits, targets = naive_osm.answer_logits(model, example, supervise_prompt)
            expected_logits += logits
            expected_targets += targets
            expected_masks += [index] * len(targets)
    torch.testing.assert_close(answers.logits_PV.double(), torch.stack(expected_logits), **CLOSE)
    assert answers.target_P.tolist() == expected_targets
    assert answers.mask_index_P.tolist() == expected_masks

    expected = naive_osm.loss(model, examples, DATASET_WEIGHTS, supervise_prompt)
    torch.testing.assert_close(ours.double(), expected.double(), **CLOSE)
    expected.backward()
    for name, parameter in model.trained():
        wanted = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(gradients[name], wanted, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")
        if has_gradient(name, len(model.qformer.layers)):
            assert wanted.abs().max() > 1e-3, f"{name} has no gradient, so that nothing was compared"


def has_gradient(name: str, num_layers: int) -> bool:
    """Whether it can have one: a softmax ignores what it adds to all keys, and nobody reads the last layer's words."""
    return not name.endswith("key.bias") and f"layers.{num_layers - 1}.text_ffn" not in name


@pytest.mark.parametrize("case", CASES)
def test_outputs_loss_and_gradients_are_those_of_the_naive_model(case: str) -> None:
    check_equality(tiny_model(replace(DEFAULT, **CASES[case])))


def test_so_they_are_where_patches_weigh_what_the_mask_covers() -> None:
    check_equality(tiny_model(replace(DEFAULT, mask_rule="share")))


def test_so_they_are_where_a_patch_is_seen_by_its_first_pixel() -> None:
    model = tiny_model(replace(DEFAULT, mask_rule="nearest"))
    seen = [coverage(example.mask_SS, "nearest").any() for masks in tiny_examples() for example in masks]
    assert not all(seen), "a mask that vanishes on the grid is to be among them"
    check_equality(model)


def test_so_they_are_for_the_whole_image_at_once() -> None:
    check_equality(tiny_model(use_windows=False))


def test_so_they_are_where_the_prompt_is_supervised() -> None:
    check_equality(tiny_model(), supervise_prompt=True)


def eos_that_ends_rows_apart(model: OSM, examples: list[Example], mode: int, most: int) -> tuple[int, ...]:
    """Ids to stand for EOS, so that of a random LLM's endless chains some end early, some late and some not at all."""
    chains = [naive_osm.greedy_name(model, example, mode, (), most)[0] for example in examples]
    for candidates in combinations(sorted({token for chain in chains for token in chain}), 2):
        ends = {next((i for i, token in enumerate(chain) if token in candidates), most) for chain in chains}
        if len(ends) > 2 and most in ends:
            return candidates
    raise AssertionError("no two ids end the chains at different steps: use another seed")


@pytest.mark.parametrize("mode", ["agnostic", "lvis"])
def test_names_are_those_of_one_mask_at_a_time_without_a_cache(mode: str) -> None:
    model = tiny_model().eval()
    images = tiny_examples(same_prompt=True)
    examples = [example for masks in images for example in masks]
    batch = batch_of(images, DEFAULT.context)
    most = 6
    eos_ids = eos_that_ends_rows_apart(model, examples, mode_index(mode, model.modes.names), most)
    with torch.no_grad():
        encoded = model.encode(batch.images_I3SS)
    named = name_masks(model, encoded, batch, ["agnostic", "lvis"], str, eos_ids, most, rows_per_chunk=5)
    lengths = set()
    for example, mask in zip(examples, named, strict=True):
        answer = mask.answers[mode]
        index = mode_index(mode, model.modes.names)
        ids, logprob, logprob_no_eos = naive_osm.greedy_name(model, example, index, eos_ids, most)
        assert list(answer.token_ids) == ids
        assert answer.logprob == pytest.approx(logprob, abs=1e-6)
        assert answer.logprob_no_eos == pytest.approx(logprob_no_eos, abs=1e-6)
        lengths.add(len(ids))
    assert len(lengths) > 2, "the rows must end at different steps"
    assert most in lengths, "and one of them not at all"


def test_a_mask_does_not_notice_the_others() -> None:
    """The same masks in another company: fewer of them, other images, other padding."""
    model = tiny_model()
    images = tiny_examples()
    together = model(batch_of(images, DEFAULT.context))
    alone = model(batch_of([images[1][3:]], DEFAULT.context))
    wanted = torch.isin(together.mask_index_P, torch.tensor([5, 6]))
    torch.testing.assert_close(alone.logits_PV, together.logits_PV[wanted], **CLOSE)
