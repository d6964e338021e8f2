"""Training steps of the released code, restated plainly: one dataset, one half, one mask, one token at a time.

What the released training loop does is in docs/fidelity.md: it reads tokens cut to a length, supervises prompts, adds
up the datasets' losses, clips what is accumulated after every micro-step, decays everything, and moves a cosine whose
length is counted in micro-steps once per accumulated step. Nothing here knows our batches, losses, optimizer or
schedule. The model is taken for its weights; what it makes of one mask is `naive_osm.py`'s business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import cos, pi, sqrt
from typing import Any

import naive_osm
import torch
from naive_osm import Example
from torch import Tensor

from osm_lightning.model.osm import OSM

IGNORED = -100
"""The label of what is not learnt."""

PADDING = -1
"""Stands for the pad token's id, which never reaches the LLM here."""


@dataclass(frozen=True)
class Asked:
    """One mask, the question about it, and the name that is to be learnt."""

    image_3SS: Tensor
    """uint8[3, S, S]."""
    mask_SS: Tensor
    """bool[S, S]."""
    dataset: int
    mode: int
    """0 is the agnostic one."""
    question: str
    """A template with " Assistant:" behind it."""
    name: str


@dataclass(frozen=True)
class Recipe:
    """The released flags that a step depends on."""

    tokenizer: Any
    """The LLM's. Puts its BOS first by itself."""
    instruction_tokenizer: Any
    """The Q-Former's."""
    loss_multiplier: Sequence[float]
    """By dataset."""
    gradient_accumulation_steps: int
    learning_rate: float
    warmup_steps: int
    total_micro_steps: int
    max_tokens: int = 32
    max_norm: float = 1.0
    weight_decay: float = 0.05


# --- Text and labels -----------------------------------------------------------------------------------------------


def text_ids(asked: Asked, recipe: Recipe) -> list[int]:
    """Prompt, name and EOS, cut at the right and filled up at the right to a fixed length."""
    ids = [*recipe.tokenizer(f"{asked.question} {asked.name}")["input_ids"], recipe.tokenizer.eos_token_id]
    ids = ids[: recipe.max_tokens]
    while len(ids) < recipe.max_tokens:
        ids.append(PADDING)
    return ids


def labels(ids: Sequence[int]) -> list[int]:
    """What is to be predicted at each place: the id itself, but for the padding and for the first, which is BOS."""
    wanted = [IGNORED if token == PADDING else token for token in ids]
    wanted[0] = IGNORED
    return wanted


# --- Loss ----------------------------------------------------------------------------------------------------------


def token_losses(model: OSM, asked: Asked, recipe: Recipe) -> list[Tensor]:
    """Negative log-likelihood of every labelled token of one mask's text."""
    instruction = recipe.instruction_tokenizer(asked.question)["input_ids"][: recipe.max_tokens]
    seen = Example(asked.image_3SS, asked.mask_SS, asked.dataset, asked.mode, (), (), tuple(instruction))
    prefix = naive_osm.mask_tokens(model, seen, naive_osm.image_tokens(model, asked.image_3SS))
    ids = text_ids(asked, recipe)
    logits = naive_osm.next_token_logits(model, prefix, [token for token in ids if token != PADDING])
    losses = []
    for place, label in enumerate(labels(ids)):
        if label != IGNORED:
            probability = torch.softmax(logits[len(prefix) + place - 1], dim=0)[label]
            losses.append(-torch.log(probability))
    return losses


def half_batch_loss(model: OSM, half: Sequence[Asked], recipe: Recipe) -> Tensor:
    """Mean over all tokens of all masks of a half."""
    losses = []
    for asked in half:
        losses += token_losses(model, asked, recipe)
    return sum(losses, torch.zeros(())) / len(losses)


def batch_loss(model: OSM, batch: Sequence[Asked], recipe: Recipe) -> Tensor:
    """What one micro-step goes down by, before it is divided by the number of them: a sum over datasets."""
    total = torch.zeros(())
    for dataset, multiplier in enumerate(recipe.loss_multiplier):
        own = [asked for asked in batch if asked.dataset == dataset and asked.mode != 0]
        agnostic = [asked for asked in batch if asked.dataset == dataset and asked.mode == 0]
        if own or agnostic:
            mean = (half_batch_loss(model, own, recipe) + half_batch_loss(model, agnostic, recipe)) / 2
            total = total + multiplier * mean
    return total


# --- Clipping, schedule, optimizer ---------------------------------------------------------------------------------


def clipped(gradients: dict[str, Tensor], max_norm: float) -> dict[str, Tensor]:
    """All gradients together, no longer than a limit."""
    norm = sqrt(sum(float((gradient**2).sum()) for gradient in gradients.values()))
    if norm <= max_norm:
        return gradients
    return {name: gradient * (max_norm / (norm + 1e-6)) for name, gradient in gradients.items()}


def learning_rate(step: int, recipe: Recipe) -> float:
    """At an accumulated step; the cosine's end is counted in micro-steps."""
    if step < recipe.warmup_steps:
        return recipe.learning_rate * step / recipe.warmup_steps
    done = (step - recipe.warmup_steps) / (recipe.total_micro_steps - recipe.warmup_steps)
    return recipe.learning_rate * 0.5 * (1 + cos(pi * done))


@dataclass
class AdamW:
    """AdamW with torch's defaults, which decays everything that it is given."""

    weight_decay: float
    steps: int = 0
    first: dict[str, Tensor] = field(default_factory=dict)
    second: dict[str, Tensor] = field(default_factory=dict)

    def step(self, weights: dict[str, Tensor], gradients: dict[str, Tensor], rate: float) -> dict[str, Tensor]:
        """The weights after one step."""
        self.steps += 1
        moved = {}
        for name, weight in weights.items():
            gradient = gradients[name]
            self.first[name] = 0.9 * self.first.get(name, 0) + 0.1 * gradient
            self.second[name] = 0.999 * self.second.get(name, 0) + 0.001 * gradient**2
            first = self.first[name] / (1 - 0.9**self.steps)
            second = self.second[name] / (1 - 0.999**self.steps)
            decayed = weight - rate * self.weight_decay * weight
            moved[name] = decayed - rate * first / (second.sqrt() + 1e-8)
        return moved


# --- The loop ------------------------------------------------------------------------------------------------------


@dataclass
class Records:
    """The loss and the accumulated gradient of every micro-step; the rate and the weights of every step."""

    losses: list[float] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    weights: list[dict[str, Tensor]] = field(default_factory=list)


def train(model: OSM, batches: Sequence[Sequence[Asked]], recipe: Recipe) -> Records:
    """Trains the model in place."""
    done, optimizer = Records(), AdamW(recipe.weight_decay)
    trained = dict(model.trained())
    gradients = {name: torch.zeros_like(parameter) for name, parameter in trained.items()}
    for number, batch in enumerate(batches, start=1):
        loss = batch_loss(model, batch, recipe)
        found = torch.autograd.grad(
            loss / recipe.gradient_accumulation_steps, list(trained.values()), allow_unused=True
        )
        summed = {}
        for name, gradient in zip(trained, found, strict=True):
            summed[name] = gradients[name] if gradient is None else gradients[name] + gradient
        gradients = clipped(summed, recipe.max_norm)
        done.losses.append(float(loss.detach()))
        done.gradients.append(gradients)
        if number % recipe.gradient_accumulation_steps == 0 or number == len(batches):
            rate = learning_rate(len(done.rates), recipe)
            weights = {name: parameter.detach() for name, parameter in trained.items()}
            moved = optimizer.step(weights, gradients, rate)
            with torch.no_grad():
                for name, parameter in trained.items():
                    parameter.copy_(moved[name])
            done.rates.append(rate)
            done.weights.append(moved)
            gradients = {name: torch.zeros_like(parameter) for name, parameter in trained.items()}
    return done
