"""torch's FSDP2: it shards OSM while it is loaded, and opens any checkpoint.

What its checkpoints look like is `weights/sharded.py`'s business.
"""

from __future__ import annotations

import atexit
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed import checkpoint as distributed_checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from osm_lightning.model.osm import OSM
from osm_lightning.training.engine_state import SavesTogether, saved_states, take_settings
from osm_lightning.training.sharding import Collective, Sharding, leave_group
from osm_lightning.weights.checkpoint import PREFIX
from osm_lightning.weights.sharded import OPTIMIZER, REST, WEIGHTS


class FSDP2(SavesTogether, ModelParallelStrategy, Sharding):
    """torch's fully_shard: every frozen block is a unit; the trained parts, and what else there is, are one."""

    def setup_environment(self) -> None:
        """All processes share the data: there is no tensor parallelism."""
        devices = len(self.parallel_devices or ())
        self._data_parallel_size, self._tensor_parallel_size = devices * self.num_nodes, 1
        super().setup_environment()
        self.lockstep = Collective(self.root_device)
        if self.root_device.type == "cpu":
            atexit.register(leave_group)

    def shard_block(self, block: nn.Module) -> None:
        """Gathered for its forward (and backward), and given up again."""
        fully_shard(block, mesh=self.device_mesh["data_parallel"], reshard_after_forward=True)

    def shard_model(self, model: OSM) -> None:
        """Gathered at the beginning of a step, and kept to its end: trained parts and word embeddings are small."""
        units: tuple[tuple[nn.Module, tuple[str, ...]], ...] = (
            (model.language, ("embed", "hidden", "logits")),  # naming calls it by itself
            (model, ("encode", "mask_tokens")),
        )
        for unit, methods in units:
            fully_shard(unit, mesh=self.device_mesh["data_parallel"], reshard_after_forward=False)
            for method in methods:
                register_fsdp_forward_method(unit, method)

    def fill(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Adapters are shared out with their block; all else is whole until `shard_model`."""
        parameter.copy_(self._part(value, parameter) if isinstance(parameter, DTensor) else value)

    # Checkpoints ----------------------------------------------------------------------------------------------------

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """This process's parts of what a checkpoint holds."""
        options = StateDictOptions(cpu_offload=True, ignore_frozen_params=True)
        trained = get_model_state_dict(cast("nn.Module", self.model), options=options)
        kept = self.osm.kept()
        beside = {PREFIX + name: value.detach().cpu() for name, value in kept if not value.requires_grad}
        return {**trained, **beside}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """This process's parts of it, by name."""
        inner = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        return get_optimizer_state_dict(
            cast("nn.Module", self.model), inner, options=StateDictOptions(cpu_offload=True)
        )

    def save_parts(self, checkpoint: dict[str, Any], folder: Path) -> None:
        """Writes them as a distributed checkpoint."""
        rest = {key: value for key, value in checkpoint.items() if key not in {"state_dict", "optimizer_states"}}
        tensors = {WEIGHTS: checkpoint["state_dict"]}
        if checkpoint.get("optimizer_states"):
            tensors[OPTIMIZER] = checkpoint["optimizer_states"][0]["state"]
        try:
            distributed_checkpoint.save(tensors, checkpoint_id=folder)
        except distributed_checkpoint.CheckpointException as error:  # no Exception, and a traceback for its text
            reason, _ = next(iter(error.failures.values()))
            raise RuntimeError(str(reason)) from error
        if self.is_global_zero:
            torch.save(rest, folder / REST)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Gives every parameter that a checkpoint holds this process's part of its value."""
        with torch.no_grad():
            for name, parameter in self.osm.kept():
                self.fill(parameter, checkpoint["state_dict"][PREFIX + name])

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Gives the optimizer its parts of the moments, its number of steps and its settings."""
        (saved,) = checkpoint["optimizer_states"]
        optimizer = self.optimizers[0]
        for parameter, state in saved_states(self.osm, saved):
            optimizer.state[parameter] = {
                key: self._part(value, parameter) if value.shape == parameter.shape else value.clone()
                for key, value in state.items()
            }
        take_settings(optimizer, saved)

    def _part(self, value: Tensor, parameter: Tensor) -> Tensor:
        like = cast("DTensor", parameter)
        value = value.to(self.root_device)
        return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
