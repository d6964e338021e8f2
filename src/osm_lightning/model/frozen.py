"""What it means that a part is frozen: no gradient, always in `eval`, and an identity that checkpoints remember."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Self, TypeVar

import torch
from torch import Tensor, nn

from osm_lightning.model.mapped import give_back

ModuleT = TypeVar("ModuleT", bound=nn.Module)

Shard = Callable[[nn.Module], None]
"""Leaves this process with its part of a module's weights."""

SAMPLES = 64
"""Values of each tensor that go into a fingerprint: enough to tell weights apart, and quick for 7 B of them."""


def freeze(module: ModuleT) -> ModuleT:
    """Turns off gradients and switches to `eval`, where `OwnsFrozen` keeps it."""
    module.requires_grad_(False)
    return module.eval()


def place(module: nn.Module, blocks: Iterable[nn.Module], dtype: torch.dtype, shard: Shard | None) -> str:
    """Gives loaded weights their precision, block by block.

    Weights that were just loaded are pages of their file, in the file's precision, and take no memory of this process.
    A block becomes its own only here, its pages are given back, and it is sharded before the next one is touched.

    Args:
        module: frozen.
        blocks: those of its modules that hold nearly all of it.
        dtype: their precision.
        shard: called with every block that has it. What is trained of a block from then on keeps its own precision.

    Returns:
        The module's fingerprint, of the weights as they were loaded.
    """
    saved = module.state_dict(keep_vars=True)
    computed = {id(buffer) for name, buffer in module.named_buffers() if name not in saved}
    parts = [(block, _ids(block)) for block in blocks]
    of_blocks = set().union(*(ids for _, ids in parts))
    names: dict[int, list[str]] = {}
    samples: dict[str, bytes] = {}
    for name, tensor in saved.items():
        if id(tensor) in of_blocks:
            names.setdefault(id(tensor), []).append(name)
        else:
            samples[name] = _sample(name, tensor)
    del saved, tensor  # what is sharded must be held by nobody
    for block, _ in parts:
        samples |= _samples_of(block, names)
        _convert(block, dtype, computed)
        if shard is not None:
            shard(block)
    _convert(module, dtype, computed)
    return _digest(samples)


def _ids(module: nn.Module) -> set[int]:
    return {id(tensor) for tensor in module.state_dict(keep_vars=True).values()}


def _samples_of(block: nn.Module, names: Mapping[int, Sequence[str]]) -> dict[str, bytes]:
    """Samples by the whole module's names, of which tied weights have several."""
    tensors = block.state_dict(keep_vars=True).values()
    return {name: _sample(name, tensor) for tensor in tensors for name in names[id(tensor)]}


def _convert(module: nn.Module, dtype: torch.dtype, computed: Container[int]) -> None:
    """Converts what was loaded, and gives its pages back.

    What is computed stays exact: a rotary embedding's frequencies, once rounded to bfloat16, turn by another angle at
    every position. Where nothing is rounded it goes along: timm's EVA adds a bias of zeros that is no weight, in the
    weights' precision.
    """
    before = [parameter.data for parameter in module.parameters()]
    exact = [
        (name, buffer)
        for name, buffer in module.named_buffers()
        if id(buffer) in computed and not torch.equal(buffer.to(dtype).to(buffer.dtype), buffer)
    ]
    module._apply(lambda tensor: tensor.to(dtype) if _is_frozen_float(tensor) else tensor)
    for name, buffer in exact:
        owner, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(owner), attribute, buffer)
    converted = [old for old in before if old.dtype != dtype]
    if converted:
        give_back(converted)


def _is_frozen_float(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and not tensor.requires_grad


class OwnsFrozen(nn.Module):
    """A module with frozen parts that stay in `eval` when it is switched to training.

    Trainers call `train()` on the whole tree again and again; dropout in a frozen part must stay off.
    """

    frozen_parts: tuple[str, ...] = ()
    """Names of the attributes that are frozen."""

    def train(self, mode: bool = True) -> Self:
        """Switches everything but the frozen parts."""
        super().train(mode)
        for name in self.frozen_parts:
            self.get_submodule(name).eval()
        return self


def fingerprint(module: nn.Module) -> str:
    """Identity of a module's weights: a hash over names, shapes and evenly spaced values as bfloat16.

    The same weights held in another precision (float32 or bfloat16) have the same fingerprint.
    """
    return _digest({name: _sample(name, tensor) for name, tensor in module.state_dict().items()})


def _sample(name: str, tensor: Tensor) -> bytes:
    flat = tensor.detach().reshape(-1)
    step = max(1, flat.numel() // SAMPLES)
    values = flat[::step][:SAMPLES].to("cpu", torch.bfloat16)
    return f"{name}{tuple(tensor.shape)}".encode() + values.view(torch.int16).numpy().tobytes()


def _digest(samples: Mapping[str, bytes]) -> str:
    digest = hashlib.sha256()
    for _, sample in sorted(samples.items()):
        digest.update(sample)
    return digest.hexdigest()[:16]


def torch_dtype(name: str) -> torch.dtype:
    """From a precision's name in a config to torch's."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def is_local(name: str) -> bool:
    """Whether a name of weights can only mean a place on disk: it begins with a dot, a slash or `weights/`."""
    return name.startswith((".", "/", "weights/"))


def first_line(error: Exception) -> str:
    """What a library's error says, without its advice."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def missing_weights(setting: str, name: str) -> None:
    """Refuses a local folder or file of weights that is not there.

    Raises:
        ValueError: naming the setting and the path.
    """
    if is_local(name) and not Path(name).exists():
        raise ValueError(
            f"{setting} is {name!r}, but there is no such file or folder. `osm weights --help` says "
            "what can be fetched."
        )
