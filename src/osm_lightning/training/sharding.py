"""What a strategy that shards the weights has to offer: the task asks for this and knows no engine."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from osm_lightning.model.lockstep import ALONE, Lockstep
from osm_lightning.model.osm import OSM


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

    def check_compiling(self) -> None:
        """Called before blocks are compiled that this strategy shards.

        Raises:
            ValueError: it cannot run compiled blocks.
        """

    def shard_block(self, block: nn.Module) -> None:
        """Leaves this process with its part of a frozen block; called while the next ones are not loaded yet."""
        raise NotImplementedError

    def shard_model(self, model: OSM) -> None:
        """Shards all the rest, trained parts included."""
        raise NotImplementedError

    def fill(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Gives a parameter its value, or this process's part of it where it is shared out."""
        raise NotImplementedError


def leave_group() -> None:
    """Ends the processes' group."""
    if dist.is_initialized():
        dist.destroy_process_group()
