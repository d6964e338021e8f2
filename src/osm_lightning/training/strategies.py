"""Strategies by name: DeepSpeed's ZeRO and FSDP2, made to train on CPU processes as on GPUs, and to shard OSM.

`trainer.strategy` takes Lightning's own names (`auto`, `ddp`) and those of `STRATEGIES`. A strategy that shards the
weights says so with `Sharding`; the task then hands it every frozen block while it is loaded, and the whole model once
the trained parts have their weights. Nothing here knows what a checkpoint looks like (`engine_state.py` does).
"""

from __future__ import annotations

import atexit
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins.precision import DeepSpeedPrecision, Precision
from lightning.pytorch.strategies import (
    DeepSpeedStrategy,
    ModelParallelStrategy,
    ParallelStrategy,
    StrategyRegistry,
)
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

from osm_lightning.model.lockstep import ALONE, Lockstep
from osm_lightning.model.osm import OSM
from osm_lightning.training.engine_state import SavesTogether, saved_states, take_settings
from osm_lightning.weights.checkpoint import PREFIX
from osm_lightning.weights.sharded import DEEPSPEED_TAG, OPTIMIZER, REST, WEIGHTS

if TYPE_CHECKING:
    from osm_lightning.training.task import OSMTask

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW remembers of every value."""


class Collective(Lockstep):
    """Processes that hold parts of the weights: a count is the largest of all."""

    together = True

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def most(self, count: int) -> int:
        """Asks the others."""
        counts = torch.tensor(count, device=self.device)
        dist.all_reduce(counts, dist.ReduceOp.MAX)
        return int(counts)


class Sharding:
    """A strategy in which a process may hold a part of the frozen weights only."""

    lockstep: Lockstep = ALONE

    def shard_block(self, block: nn.Module) -> None:
        """Leaves this process with its part of a frozen block; called while the next ones are not loaded yet."""
        raise NotImplementedError

    def shard_model(self, model: OSM) -> None:
        """Shards all the rest, trained parts included."""
        raise NotImplementedError


class OSMDeepSpeedPrecision(DeepSpeedPrecision):
    """Lightning's, without its cast of the batch: what a batch holds is bytes, ids and shares, and no activations."""

    def convert_input(self, data: Any) -> Any:
        """Leaves the batch as it is."""
        return data


class OSMDeepSpeed(SavesTogether, DeepSpeedStrategy, Sharding):
    """ZeRO stages 1 to 3.

    bf16-mixed is torch's autocast over float32 weights, as under every other strategy, and not DeepSpeed's own bf16,
    which would keep the trained weights in bfloat16.
    """

    def __init__(self, stage: int = 2, offload: bool = False, **settings: Any) -> None:
        """Chooses the stage.

        Args:
            stage: what is sharded: the optimizer's state (1), gradients too (2), weights too (3).
            offload: keep weights and the optimizer's state in the machine's memory between uses.
            **settings: Lightning's.
        """
        parts: dict[str, Any] = {"offload_optimizer": offload, "offload_parameters": offload}
        # Told the batch size, Lightning does not make the training loader to find it, before a run has its place back.
        fixed: dict[str, Any] = {"logging_batch_size_per_gpu": 1, "exclude_frozen_parameters": True}
        super().__init__(stage=stage, **parts, **fixed, **settings)
        # The optimizer is the task's AdamW, wherever its state lies.
        cast("dict[str, Any]", self.config)["zero_force_ds_cpu_optimizer"] = False

    @property
    def precision_plugin(self) -> Precision:
        """Ours."""
        return self._precision_plugin or Precision()

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        if isinstance(plugin, DeepSpeedPrecision):
            plugin = OSMDeepSpeedPrecision(cast("Any", plugin.precision))
        self._precision_plugin = plugin

    # Lightning's checks for CUDA, and what DeepSpeed needs of CPU processes ----------------------------------------

    def setup_environment(self) -> None:
        """Starts the processes' group, on any accelerator."""
        if self.parallel_devices is not None and self.root_device.type == "cpu":
            # As on GPUs, a process finds its number among the machine's in its device.
            self.parallel_devices = [torch.device("cpu", index) for index in range(len(self.parallel_devices))]
            atexit.register(leave_group)  # else gloo's threads may abort the interpreter at its end
            do_not_compile()
        super(DeepSpeedStrategy, self).setup_environment()

    def _format_config(self) -> None:
        config = cast("dict[str, Any]", self.config)
        if self.precision_plugin.precision == "bf16-mixed":
            config["bf16"] = {"enabled": False}
            config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
        super()._format_config()

    # Sharding -------------------------------------------------------------------------------------------------------

    @cached_property
    def lockstep(self) -> Lockstep:  # type: ignore[override]
        """Calls are made together at stage 3."""
        return Collective(self.root_device) if self.zero_stage_3 else ALONE

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Not used to shard: under it, every process would draw random weights for all that is loaded afterwards."""
        self._init_config_if_needed()
        yield

    def shard_block(self, block: nn.Module) -> None:
        """Stage 3: gives every process its part of each weight."""
        if self.zero_stage_3:
            import deepspeed

            deepspeed.zero.Init(module=block, config_dict_or_path=self.config, remote_device=self.remote_device)

    def shard_model(self, model: OSM) -> None:
        """Stage 3: the same for the rest."""
        self.shard_block(model)

    # Checkpoints ----------------------------------------------------------------------------------------------------

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Nothing: the engine writes it."""
        return {}

    def save_parts(self, checkpoint: dict[str, Any], folder: Path) -> None:
        """Has the engine write its files, with all that is no tensor of its own among them."""
        rest = {key: value for key, value in checkpoint.items() if key not in {"state_dict", "optimizer_states"}}
        self.deepspeed_engine.save_checkpoint(
            str(folder), client_state={REST: rest}, tag=DEEPSPEED_TAG, exclude_frozen_parameters=True
        )

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Gives the trained parameters, and the optimizer's copies of them, their values."""
        import deepspeed

        for name, parameter in cast("OSMTask", self.lightning_module).osm.trained():
            value = checkpoint["state_dict"][PREFIX + name].to(self.root_device)
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=self.zero_stage_3):
                parameter.data.copy_(value)
            self._put(parameter, value, None)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Gives the optimizer its moments, its number of steps and its settings."""
        (saved,) = checkpoint["optimizer_states"]
        states = list(saved_states(cast("OSMTask", self.lightning_module).osm, saved))
        zero: Any = self.optimizers[0]
        take_settings(zero, saved)
        if not states:
            return
        flats = zero.fp32_partitioned_groups_flat if self.zero_stage_3 else zero.single_partition_of_fp32_groups
        for flat in flats:  # torch's AdamW would make them at its first step
            moments = {moment: torch.zeros_like(flat) for moment in MOMENTS}
            zero.optimizer.state[flat] = {"step": states[0][1]["step"].clone(), **moments}
        if not self.zero_stage_3:
            zero._lazy_init_hp_params_optimizer_state()
        for parameter, state in states:
            for moment in MOMENTS:
                self._put(parameter, state[moment].to(self.root_device), moment)

    def _put(self, parameter: nn.Parameter, value: Tensor, moment: str | None) -> None:
        """Sets this process's part of the optimizer's copy of a parameter, or of one of its moments."""
        zero: Any = self.optimizers[0]
        if not self.zero_stage_3:
            cast("Any", parameter).set_full_hp_param(value, moment)
            return
        size = cast("Any", parameter).ds_tensor.ds_numel
        padded = F.pad(value.flatten(), (0, size * self.world_size - value.numel()))
        zero.set_local_hp_param(padded.narrow(0, size * self.global_rank, size), parameter, moment)

    def _initialize_deepspeed_inference(self, model: nn.Module) -> None:
        """Lightning's, with autocast."""
        config = cast("dict[str, Any]", self.config)
        kept: tuple[str, ...] = ("train_micro_batch_size_per_gpu", "torch_autocast", "zero_allow_untested_optimizer")
        if self.zero_stage_3:
            kept += ("zero_optimization",)
        import deepspeed

        self.model = deepspeed.initialize(
            config={key: config[key] for key in kept if key in config},
            model=model,
            model_parameters=[],
            dist_init_required=False,
        )[0]


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

    # Checkpoints ----------------------------------------------------------------------------------------------------

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """This process's parts of what is trained."""
        options = StateDictOptions(cpu_offload=True, ignore_frozen_params=True)
        return get_model_state_dict(cast("nn.Module", self.model), options=options)

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
        """Gives every trained parameter this process's part of its value."""
        with torch.no_grad():
            for name, parameter in cast("OSMTask", self.lightning_module).osm.trained():
                parameter.copy_(self._part(checkpoint["state_dict"][PREFIX + name], parameter))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Gives the optimizer its parts of the moments, its number of steps and its settings."""
        (saved,) = checkpoint["optimizer_states"]
        optimizer = self.optimizers[0]
        for parameter, state in saved_states(cast("OSMTask", self.lightning_module).osm, saved):
            optimizer.state[parameter] = {
                key: self._part(value, parameter) if value.shape == parameter.shape else value.clone()
                for key, value in state.items()
            }
        take_settings(optimizer, saved)

    def _part(self, value: Tensor, parameter: Tensor) -> Tensor:
        like = cast("DTensor", parameter)
        value = value.to(self.root_device)
        return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


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


def do_not_compile() -> None:
    """Keeps DeepSpeed from compiling its shared-memory communication for CPU processes; gloo does without.

    It takes a compiler and minutes, and a process that is killed meanwhile leaves a lock for which all later runs wait.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def leave_group() -> None:
    """Ends the processes' group."""
    if dist.is_initialized():
        dist.destroy_process_group()


register_strategies()
