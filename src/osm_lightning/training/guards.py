"""What keeps one bad batch from ruining a run: steps whose gradient is no number are skipped, spikes are told.

All ranks must skip the same step, whatever the engine. They agree without a message of their own: a rank whose loss is
no number makes its gradient no number (`OSMTask.training_step`), summing over ranks makes everybody's so, and the norm
of the whole gradient, which is the same on all ranks, decides. Backward runs as ever, so that no engine waits for it.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections import deque
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from osm_lightning.batch import MaskBatch

MEDIAN_STEPS = 100
"""Steps over which the usual gradient norm is taken."""

MIN_STEPS = 20
"""Steps before which no norm is unusual."""


class GradientGuard(Callback):
    """Skips optimizer steps whose gradient is no number, and logs `train/grad_norm` and `train/skipped_steps`.

    A skipped step takes all batches that were accumulated for it along. Weights and the optimizer's state stay as they
    are; the schedule moves on, so that it ends where the run does.
    """

    def __init__(self, max_skipped_in_row: int, spike_factor: float) -> None:
        """Only remembers.

        Args:
            max_skipped_in_row: steps that may be skipped one after the other; one more ends the run.
            spike_factor: a norm of more than this many times the median is warned of.
        """
        self.max_skipped_in_row, self.spike_factor = max_skipped_in_row, spike_factor
        self.skipped = self.skipped_in_row = 0
        self._norms: deque[float] = deque(maxlen=MEDIAN_STEPS)
        self._step = 0

    def state_dict(self) -> dict[str, Any]:
        """Skipped steps go on counting when a run is resumed."""
        return {"skipped": self.skipped, "skipped_in_row": self.skipped_in_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up the count."""
        self.skipped, self.skipped_in_row = state_dict["skipped"], state_dict["skipped_in_row"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Learns where the run stands."""
        self._step = trainer.global_step

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Drops a gradient that is no number: an optimizer does nothing to parameters without one.

        DeepSpeed keeps gradients to itself, and drops such ones by itself (`on_train_batch_end`).
        """
        if engine_of(trainer) is not None:
            return
        norm = gradient_norm(optimizer)
        if not math.isfinite(norm):
            optimizer.zero_grad(set_to_none=True)
        self._judge(norm, trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: MaskBatch, batch_idx: int
    ) -> None:
        """Asks DeepSpeed how its step went."""
        engine = engine_of(trainer)
        if engine is None or trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        norm = engine.get_global_grad_norm() if engine.was_step_applied() else math.nan
        self._judge(math.nan if norm is None else float(norm), trainer, pl_module)

    def _judge(self, norm: float, trainer: Trainer, pl_module: LightningModule) -> None:
        """Counts a step, and logs it.

        Raises:
            ValueError: too many in a row were skipped.
        """
        if math.isfinite(norm):
            self.skipped_in_row = 0
            self._tell_spike(norm, trainer)
        else:
            self.skipped += 1
            self.skipped_in_row += 1
        pl_module.log_dict({"train/grad_norm": norm, "train/skipped_steps": float(self.skipped)})
        if self.skipped_in_row > self.max_skipped_in_row:
            raise ValueError(
                f"the gradient is no number at step {trainer.global_step}, nor was it in the "
                f"{self.max_skipped_in_row} steps before, which were skipped (model.optim.max_skipped_in_row). The "
                "warnings above name the images. Lower model.optim.lr, or use trainer.precision 32, and go on from "
                "the last checkpoint."
            )

    def _tell_spike(self, norm: float, trainer: Trainer) -> None:
        if len(self._norms) >= MIN_STEPS and trainer.is_global_zero:
            median = statistics.median(self._norms)
            if norm > self.spike_factor * median:
                warnings.warn(
                    f"train/grad_norm is {norm:.3g} at step {trainer.global_step}, {norm / median:.0f} times its "
                    f"median over {len(self._norms)} steps ({median:.3g}). Clipping (trainer.gradient_clip_val) "
                    "bounds what it does; if it comes often, lower model.optim.lr.",
                    stacklevel=2,
                )
        self._norms.append(norm)


def engine_of(trainer: Trainer) -> Any:
    """DeepSpeed's engine, where it trains; it does by itself what the others leave to the optimizer."""
    return trainer.model if hasattr(trainer.model, "was_step_applied") else None


def gradient_norm(optimizer: Optimizer) -> float:
    """Norm of the whole gradient, over all of its shards; before clipping."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm: Tensor = torch.nn.utils.get_total_norm(gradients)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
