"""Strategies by name: `trainer.strategy` takes Lightning's own names (`auto`, `ddp`) and those of `STRATEGIES`."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import ParallelStrategy, StrategyRegistry

from osm_lightning.training.fsdp2 import FSDP2
from osm_lightning.training.zero import OSMDeepSpeed

STRATEGIES: dict[str, tuple[type[ParallelStrategy], dict[str, Any], str]] = {
    "deepspeed_zero1": (OSMDeepSpeed, {"stage": 1}, "DeepSpeed: the optimizer's state is sharded"),
    "deepspeed_zero2": (OSMDeepSpeed, {"stage": 2}, "DeepSpeed: gradients too"),
    "deepspeed_zero3": (OSMDeepSpeed, {"stage": 3}, "DeepSpeed: weights too"),
    "deepspeed_zero3_offload": (OSMDeepSpeed, {"stage": 3, "offload": True}, "DeepSpeed: kept in the machine's memory"),
    "fsdp2": (FSDP2, {}, "torch's fully_shard: weights, gradients and the optimizer's state are sharded"),
}
"""What `trainer.strategy` may name, beside Lightning's own."""


def register_strategies() -> None:
    """Makes the names known to Lightning; again is no harm."""
    for name, (strategy, settings, description) in STRATEGIES.items():
        StrategyRegistry.register(name, strategy, description=description, override=True, **settings)
