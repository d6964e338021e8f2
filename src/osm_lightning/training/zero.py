"""DeepSpeed's ZeRO on CPU processes as on GPUs: it shards OSM while it is loaded, and opens any checkpoint.

What its checkpoints look like is `weights/sharded.py`'s business.
"""

from __future__ import annotations

import atexit
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from lightning.pytorch.plugins.precision import DeepSpeedPrecision, Precision
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from osm_lightning.model.lockstep import ALONE, Lockstep
from osm_lightning.model.osm import OSM
from osm_lightning.training.engine_state import SavesTogether, saved_states, take_settings
from osm_lightning.training.sharding import Collective, Sharding, leave_group
from osm_lightning.weights.checkpoint import PREFIX
from osm_lightning.weights.sharded import BESIDE, DEEPSPEED_TAG, REST

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW remembers of every value."""


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

    def check_compiling(self) -> None:
        """Refuses stage 3, whose hooks fetch and free weights within what would be compiled."""
        if self.zero_stage_3:
            raise ValueError(
                "model.compile_blocks is true, but DeepSpeed ZeRO-3 fetches and frees weights around every linear "
                "layer, so that a block holds nothing whole to compile. Leave it out, or use trainer.strategy fsdp2, "
                "which gathers whole blocks."
            )

    def shard_block(self, block: nn.Module) -> None:
        """Stage 3: gives every process its part of each weight."""
        if self.zero_stage_3:
            import deepspeed

            deepspeed.zero.Init(module=block, config_dict_or_path=self.config, remote_device=self.remote_device)

    def shard_model(self, model: OSM) -> None:
        """Stage 3: the same for the rest."""
        self.shard_block(model)

    def fill(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Stage 3: gathered for it, where it is shared out already, as adapters are with their block."""
        import deepspeed

        shared = hasattr(parameter, "ds_id")
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=shared):
            parameter.data.copy_(value)

    # Checkpoints ----------------------------------------------------------------------------------------------------

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Nothing: the engine writes it."""
        return {}

    def save_parts(self, checkpoint: dict[str, Any], folder: Path) -> None:
        """Has the engine write its files, with all that is no tensor of its own among them."""
        rest = {key: value for key, value in checkpoint.items() if key not in {"state_dict", "optimizer_states"}}
        rest[BESIDE] = self._beside()
        self.deepspeed_engine.save_checkpoint(
            str(folder), client_state={REST: rest}, tag=DEEPSPEED_TAG, exclude_frozen_parameters=True
        )

    def _beside(self) -> dict[str, Tensor]:
        """Whole tensors that a checkpoint holds and nobody trains, of which the engine writes none; on rank 0 alone."""
        import deepspeed

        found = {}
        for name, parameter in self.osm.kept():
            if not parameter.requires_grad:
                with deepspeed.zero.GatheredParameters([parameter], enabled=self.zero_stage_3):
                    if self.is_global_zero:
                        found[PREFIX + name] = parameter.detach().cpu().clone()
        return found

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Gives the parameters that a checkpoint holds, and the optimizer's copies of them, their values."""
        for name, parameter in self.osm.kept():
            value = checkpoint["state_dict"][PREFIX + name].to(self.root_device)
            self.fill(parameter, value)
            if parameter.requires_grad:
                self._put(parameter, value, None)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Gives the optimizer its moments, its number of steps and its settings."""
        (saved,) = checkpoint["optimizer_states"]
        states = list(saved_states(self.osm, saved))
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


def do_not_compile() -> None:
    """Keeps DeepSpeed from compiling its shared-memory communication for CPU processes; gloo does without.

    It takes a compiler and minutes, and a process that is killed meanwhile leaves a lock for which all later runs wait.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
