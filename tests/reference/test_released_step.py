"""Training steps under `configs/overlay/as_released.yaml` are those of the naive restatement of the released loop.

Loss, gradients after every micro-step, learning rates, decay and weights. Each switch of the overlay, turned back
alone, must be seen here: a test that does not notice it would prove nothing.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning
import naive_osm
import naive_released_step as naive
import pytest
import torch
import yaml
from naive_osm import Example
from naive_released_step import Asked, Recipe, Records
from test_naive_equality import DEFAULT, SIDE, batch_of, has_gradient, tiny_model
from tokenizers import Tokenizer, processors
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast, get_cosine_schedule_with_warmup

from osm_lightning.batch import MaskBatch
from osm_lightning.data.module import OSMData, SourceConfig
from osm_lightning.data.text import TextCodec, builtin_tokenizer
from osm_lightning.instructions import MASK_QUESTIONS, prompt
from osm_lightning.model.osm import OSM
from osm_lightning.training.optim import OptimConfig
from osm_lightning.training.task import OSMTask

OVERLAY = yaml.safe_load(
    (Path(__file__).parents[2] / "configs" / "overlay" / "as_released.yaml").read_text(encoding="utf-8")
)
WORDS = 2000
"""Ids of the tokenizers: so many that all questions are shorter than the released limit."""
WEIGHTS = (1.0, 2.5, 7.0)
"""No mask is of the third dataset."""
ACCUMULATE, STEPS = 2, 3
OPTIM = {"lr": 1e-3, "warmup_steps": 1}
LOSS = {"rtol": 0, "atol": 1e-5}
GRADIENT = {"rtol": 1e-4, "atol": 1e-4}
"""Both as the task demands; norms are 1."""
NAMES = ("cat", "traffic light", "a red car that stands in front of the old town hall", "sky", "dining table", "zebra")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder like InstructBLIP's: BOS comes first, and is the same token as EOS."""
    folder = tmp_path_factory.mktemp("tokenizer")
    backend = Tokenizer.from_str(builtin_tokenizer(WORDS).backend_tokenizer.to_str())
    eos = backend.token_to_id("<eos>")
    backend.post_processor = processors.TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", eos)])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<eos>", eos_token="<eos>", pad_token="<pad>")
    made.save_pretrained(folder)
    return str(folder)


def micro_batches() -> list[list[list[Asked]]]:
    """Per micro-batch its images, and per image its masks: both datasets, each half in its own mode, in no order."""
    generator = torch.Generator().manual_seed(3)
    boxes = [(0, 0, 9, 9), (5, 2, 14, 19), (23, 23, 23, 23), (0, 11, 23, 12), (9, 9, 9, 9), (16, 1, 22, 20)]
    groups = [(0, 1), (1, 0), (0, 0), (1, 2), (0, 1), (1, 0), (0, 0)]
    made, number = [], 0
    for _ in range(ACCUMULATE * STEPS):
        images: list[list[Asked]] = []
        for size in (3, 1, 3):
            image = torch.randint(0, 256, (3, SIDE, SIDE), dtype=torch.uint8, generator=generator)
            masks = []
            for _ in range(size):
                place = sum(map(len, images)) + len(masks)
                mask = naive_osm.pixels_of_box(SIDE, boxes[number % len(boxes)])
                question = prompt(MASK_QUESTIONS[(5 * number) % len(MASK_QUESTIONS)])
                masks.append(Asked(image, mask, *groups[place], question, NAMES[number % len(NAMES)]))
                number += 1
            images.append(masks)
        made.append(images)
    return made


def model_for(tokenizer: str) -> OSM:
    """Random weights."""
    qformer = replace(
        DEFAULT,
        instruction_tokenizer=tokenizer,
        instruction_vocabulary=WORDS,
        max_instruction_tokens=64,
        **OVERLAY["model"]["qformer"],
    )
    return tiny_model(qformer, vocabulary=WORDS)


# Ours


class Given(OSMData):
    """The data module, with batches that are at hand."""

    given: list[MaskBatch]

    @property
    def batches_per_epoch(self) -> int:
        return len(self.given)

    def train_dataloader(self) -> Any:
        return DataLoader(self.given, batch_size=None)  # type: ignore[arg-type]


class Keep(lightning.Callback):
    """Records what a run does."""

    def __init__(self) -> None:
        self.records = Records()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        rates = {group["lr"] for group in optimizer.param_groups}
        assert len(rates) == 1
        self.records.rates += rates

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.records.losses.append(float(outputs["loss"]) * trainer.accumulate_grad_batches)
        trained = dict(pl_module.osm.trained())
        self.records.gradients.append({name: parameter.grad.clone() for name, parameter in trained.items()})
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.records.weights.append({name: p.detach().clone() for name, p in trained.items()})


def example(asked: Asked, codec: TextCodec) -> Example:
    """A mask as our data hand it on."""
    (question,) = [q for q in MASK_QUESTIONS if prompt(q) == asked.question]
    text = codec.encode(question, asked.name)
    cut = text.prompt_tokens
    where = asked.image_3SS, asked.mask_SS, asked.dataset, asked.mode
    return Example(*where, text.text_ids[:cut], text.text_ids[cut:], text.instruction_ids)


def settings(**turned: Any) -> dict[str, Any]:
    """The overlay's settings, flat, with some turned back."""
    model = {key: value for key, value in OVERLAY["model"].items() if key not in {"optim", "qformer"}}
    parts = OVERLAY["model"]["optim"], OVERLAY["model"]["qformer"], OVERLAY["data"], OVERLAY["trainer"]
    return {key: value for part in (model, *parts) for key, value in part.items()} | turned


def our_records(model: OSM, tokenizer: str, folder: Path, **turned: Any) -> Records:
    chosen = settings(**turned)
    optim = OptimConfig(**OPTIM, **{name: chosen.pop(name) for name in OVERLAY["model"]["optim"]})
    codec = TextCodec(tokenizer, tokenizer, chosen.pop("max_text_tokens"))
    vision, language = model.vision.config, model.language.config
    clip, rule = chosen.pop("gradient_clip_val"), chosen.pop("mask_rule")
    task = OSMTask(vision, model.qformer.config, language, list(model.modes.names[1:]), optim, **chosen)
    task.osm = copy.deepcopy(model)
    task.osm.qformer.config.mask_rule = rule
    sources = {
        name: SourceConfig("none", weight=weight)
        for name, weight in zip(("first", "second", "absent"), WEIGHTS, strict=True)
    }
    data = Given(sources, tokenizer)
    data.given = [
        batch_of([[example(asked, codec) for asked in masks] for masks in images], DEFAULT.context, rule)
        for images in micro_batches()
    ]
    keep = Keep()
    loop = lightning.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_epochs=1,
        accumulate_grad_batches=ACCUMULATE,
        gradient_clip_val=clip,
        limit_val_batches=0,
        callbacks=[keep],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loop.fit(task, data)
    return keep.records


# The comparison


def recipe_of(tokenizer: str) -> Recipe:
    loaded = PreTrainedTokenizerFast.from_pretrained(tokenizer)
    batches = ACCUMULATE * STEPS
    return Recipe(loaded, loaded, WEIGHTS, ACCUMULATE, OPTIM["lr"], int(OPTIM["warmup_steps"]), batches)


@pytest.fixture(scope="module")
def naive_records(tokenizer: str) -> Records:
    batches = [[asked for masks in images for asked in masks] for images in micro_batches()]
    return naive.train(model_for(tokenizer), batches, recipe_of(tokenizer))


def check(ours: Records, wanted: Records, start: OSM, recipe: Recipe) -> None:
    """Loss, gradients, rates; and weights as plain AdamW makes them of our own gradients.

    Of its own: where a gradient is nothing but rounding, AdamW makes as large a step of it as of any other.
    """
    torch.testing.assert_close(torch.tensor(ours.losses), torch.tensor(wanted.losses), **LOSS)
    for found, expected in zip(ours.gradients, wanted.gradients, strict=True):
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, **GRADIENT, msg=lambda text, name=name: f"{name}: {text}")
    torch.testing.assert_close(torch.tensor(ours.rates), torch.tensor(wanted.rates), rtol=1e-6, atol=0)
    optimizer = naive.AdamW(recipe.weight_decay)
    weights = {name: parameter.detach() for name, parameter in start.trained()}
    for step, rate in enumerate(wanted.rates):
        weights = optimizer.step(weights, ours.gradients[(step + 1) * ACCUMULATE - 1], rate)
        torch.testing.assert_close(ours.weights[step], weights, rtol=1e-9, atol=1e-12)


def test_steps_as_released_are_the_naive_ones(naive_records: Records, tokenizer: str, tmp_path: Path) -> None:
    model = model_for(tokenizer)
    check(our_records(model, tokenizer, tmp_path), naive_records, model, recipe_of(tokenizer))


def test_the_comparison_has_something_to_see(naive_records: Records, tokenizer: str) -> None:
    """Clipping bites in every micro-step, names are cut, all that can have a gradient has one, and weights move."""
    model, recipe = model_for(tokenizer), recipe_of(tokenizer)
    for gradients in naive_records.gradients:
        norm = torch.nn.utils.get_total_norm(list(gradients.values()))
        torch.testing.assert_close(float(norm), recipe.max_norm, rtol=1e-5, atol=0)
        for name, gradient in gradients.items():
            if has_gradient(name, len(model.qformer.layers)):
                assert gradient.abs().max() > 10 * GRADIENT["atol"], name
    lengths = {
        len([token for token in naive.text_ids(asked, recipe) if token != naive.PADDING])
        for images in micro_batches()
        for masks in images
        for asked in masks
    }
    eos = [naive.text_ids(a, recipe)[-1] for images in micro_batches() for masks in images for a in masks]
    assert max(lengths) == recipe.max_tokens
    assert len(lengths) > 4
    assert any(token not in {naive.PADDING, recipe.tokenizer.eos_token_id} for token in eos), "no name is cut"
    assert naive_records.rates[0] == 0
    assert len(set(naive_records.rates)) == STEPS


def test_the_naive_rates_are_transformers_own(tokenizer: str) -> None:
    recipe = replace(recipe_of(tokenizer), warmup_steps=100, total_micro_steps=15_625)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=recipe.learning_rate)
    schedule = get_cosine_schedule_with_warmup(optimizer, 100, recipe.total_micro_steps)
    steps = -(-recipe.total_micro_steps // 4)
    rates = []
    for _ in range(steps):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert [naive.learning_rate(step, recipe) for step in range(steps)] == pytest.approx(rates)
    assert rates[-1] / recipe.learning_rate == pytest.approx(0.86, abs=0.005), "the released recipe ends near there"


TURNED_BACK = [
    {"supervise_prompt": False},
    {"sum_datasets": False},
    {"decay": "linear"},
    {"horizon": "steps"},
    {"clip": "steps"},
    {"max_text_tokens": None},
    {"mask_rule": "touched"},
    {"gradient_clip_val": None},
]


@pytest.mark.parametrize("turned", TURNED_BACK, ids=lambda turned: next(iter(turned)))
def test_every_switch_of_the_overlay_is_seen(
    turned: dict[str, Any], naive_records: Records, tokenizer: str, tmp_path: Path
) -> None:
    model = model_for(tokenizer)
    ours = our_records(model, tokenizer, tmp_path, **turned)
    with pytest.raises(AssertionError):
        check(ours, naive_records, model, recipe_of(tokenizer))


def test_every_switch_of_the_overlay_is_turned_back_above() -> None:
    inert = {"score_eos"}  # of predictions; tests/evaluation/test_predictions.py
    assert {name for turned in TURNED_BACK for name in turned} == settings().keys() - inert


@pytest.mark.parametrize("mutation", ["mode", "first id", "clip at last", "halves"])
def test_mistakes_in_the_reference_would_be_seen(
    mutation: str, tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other way round: a reference that is a little wrong must not agree."""
    model, recipe = model_for(tokenizer), recipe_of(tokenizer)
    batches = [[asked for masks in images for asked in masks] for images in micro_batches()[:ACCUMULATE]]
    ours = our_records(model, tokenizer, tmp_path)
    ours = Records(ours.losses[:ACCUMULATE], ours.gradients[:ACCUMULATE], ours.rates[:1], ours.weights[:1])
    check(ours, naive.train(copy.deepcopy(model), batches, recipe), model, recipe)
    if mutation == "mode":
        batches = [[replace(asked, mode=asked.mode and 3 - asked.mode) for asked in batch] for batch in batches]
    elif mutation == "first id":
        monkeypatch.setattr(naive, "labels", lambda ids: [naive.IGNORED if i == naive.PADDING else i for i in ids])
    elif mutation == "clip at last":
        monkeypatch.setattr(naive, "clipped", lambda gradients, max_norm: gradients)
    else:
        monkeypatch.setattr(naive, "half_batch_loss", mean_of_masks)
    with pytest.raises(AssertionError):
        check(ours, naive.train(copy.deepcopy(model), batches, recipe), model, recipe)


def mean_of_masks(model: OSM, half: list[Asked], recipe: Recipe) -> torch.Tensor:
    """Every mask weighs the same, however many tokens it has: another loss, near the released one."""
    means = [torch.stack(naive.token_losses(model, asked, recipe)).mean() for asked in half]
    return torch.stack(means).mean()
