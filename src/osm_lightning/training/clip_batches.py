"""Clipping after every batch that is accumulated, as the released code does (`model.optim.clip: batches`).

What is cut is the gradient accumulated so far, earlier batches' share included: later batches of a step weigh more than
earlier ones, and the step's norm is the limit at most.
"""

from __future__ import annotations

import warnings

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

HALF = "16-mixed"
"""Lightning's precision whose gradients are scaled until the optimizer steps."""


class ClipBatches(Callback):
    """Clips what is accumulated after every batch's backward; without accumulation the trainer's own clipping does."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses what cannot, before the model is built.

        Raises:
            ValueError: the strategy keeps gradients to itself, or the precision scales them.
        """
        if stage != "fit" or trainer.accumulate_grad_batches == 1:
            return
        if not trainer.gradient_clip_val:
            warnings.warn(
                "model.optim.clip is 'batches', but trainer.gradient_clip_val is not set, so that nothing is clipped.",
                stacklevel=2,
            )
        strategy = trainer.strategy
        whole = isinstance(strategy, SingleDeviceStrategy | DDPStrategy)
        if not whole or strategy.handles_gradient_accumulation:  # DeepSpeed, by Lightning's reckoning a kind of DDP
            raise ValueError(
                f"model.optim.clip is 'batches', but trainer.strategy {type(strategy).__name__} holds parts of "
                "gradients, which are whole only when the optimizer steps. Use trainer.strategy ddp, set "
                "model.optim.clip to 'steps', or trainer.accumulate_grad_batches to 1, where both are the same."
            )
        if trainer.precision == HALF:
            raise ValueError(
                f"model.optim.clip is 'batches', but under trainer.precision {HALF} gradients are scaled until the "
                "optimizer steps, so that a limit means nothing before. Use bf16-mixed or 32."
            )

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Clips what the processes have in common."""
        if trainer.accumulate_grad_batches == 1 or not trainer.gradient_clip_val:
            return
        optimizer = trainer.optimizers[0]
        model = trainer.strategy.model
        if isinstance(model, DistributedDataParallel) and not model.require_backward_grad_sync:
            # DDP would average at the step's last batch only. What came before is the same everywhere: averaging it
            # again changes nothing.
            average_gradients(optimizer, trainer.world_size)
        pl_module.clip_gradients(optimizer, trainer.gradient_clip_val, trainer.gradient_clip_algorithm)


def average_gradients(optimizer: Optimizer, num_processes: int) -> None:
    """Means over all processes, in place."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= num_processes
