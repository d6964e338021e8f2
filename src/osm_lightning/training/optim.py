"""AdamW with decay only where it belongs, and warm-up and cosine counted in optimizer steps (Sec. 4).

What the released code does instead is a switch each; `configs/overlay/as_released.yaml` turns them all.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, pi
from typing import Any, Literal

from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

Decay = Literal["linear", "all"]


@dataclass(frozen=True)
class OptimConfig:
    """Settings of AdamW and of the learning rate. The defaults are the paper's."""

    lr: float = 4e-5
    """Peak learning rate."""
    weight_decay: float = 0.05
    """AdamW's; on what `decay` says."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's."""
    warmup_steps: int = 100
    """Optimizer steps of linear warm-up from 0."""
    final_share: float = 0.0
    """Share of the peak that is left at the end of the cosine."""
    decay: Decay = "linear"
    """What decays: weights of linear layers, or all that is trained (released)."""
    horizon: Literal["steps", "batches"] = "steps"
    """What the length of the cosine counts: optimizer steps, or the batches that they accumulate (released). It moves
    once per optimizer step all the same, so that with 4 batches to a step a quarter of it is gone through. The released
    warm-up begins at 0 and not one step above it."""
    clip: Literal["steps", "batches"] = "steps"
    """When trainer.gradient_clip_val applies: before every optimizer step, or after every batch, to what is accumulated
    so far (released)."""
    max_skipped_in_row: int = 10
    """Steps in a row that are skipped because a loss or gradient is no number; one more ends the run."""
    spike_factor: float = 10.0
    """Gradient norms of more than this many times their median are warned of."""


def parameter_groups(model: nn.Module, weight_decay: float, decay: Decay = "linear") -> list[dict[str, Any]]:
    """Trainable parameters in two groups: weights of linear layers, which decay, and all others, which may.

    The others are biases, LayerNorms, queries, modes, positions and embeddings. The groups are the same whatever
    decays, so that a checkpoint's numbers mean the same parameters.
    """
    decays = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if id(p) in decays], "weight_decay": weight_decay},
        {
            "params": [p for p in trained if id(p) not in decays],
            "weight_decay": weight_decay if decay == "all" else 0.0,
        },
    ]


def adamw(model: nn.Module, config: OptimConfig) -> AdamW:
    """AdamW over what is trained."""
    return AdamW(parameter_groups(model, config.weight_decay, config.decay), lr=config.lr, betas=config.betas)


def schedule_factor(step: int, config: OptimConfig, total_steps: int) -> float:
    """Share of the peak learning rate at an optimizer step: linear warm-up, then half a cosine.

    Args:
        step: optimizer steps done.
        config: warm-up, and what is left at the end.
        total_steps: length of the schedule, in what `config.horizon` counts.
    """
    if step < config.warmup_steps:
        return (step + (config.horizon == "steps")) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    return config.final_share + (1 - config.final_share) * 0.5 * (1 + cos(pi * min(1.0, done)))


def warmup_cosine(optimizer: AdamW, config: OptimConfig, total_steps: int) -> LambdaLR:
    """The schedule; to be stepped once per optimizer step."""
    return LambdaLR(optimizer, lambda step: schedule_factor(step, config, total_steps))
