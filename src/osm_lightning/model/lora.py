"""LoRA: small matrices beside linear layers of a frozen part, and all that is trained of it (Hu et al., 2021).

The layers are peft's. What is ours: they go into a block before it is shared out, they stay in float32 whatever the
precision beside them, and their dropout follows the trainer where everything else in a frozen part stays in `eval`.
A block's `q_proj` becomes `q_proj.base_layer`, `q_proj.lora_A.default` and `q_proj.lora_B.default`; the LLM's identity
is taken before.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import nn

from osm_lightning.model.config import LoraConfig

MARKS = (".lora_A.", ".lora_B.")
"""What the name of an adapter's parameter has in it, and no other."""


def is_adapter(name: str) -> bool:
    """Whether a parameter's name is an adapter's."""
    return any(mark in name for mark in MARKS)


def plain_name(name: str) -> str:
    """A tensor's name where no adapter stands beside it."""
    return name.replace(".base_layer.", ".")


def check_targets(blocks: Iterable[nn.Module], targets: Sequence[str], setting: str) -> None:
    """Checks that every target is a linear layer of some block.

    Args:
        blocks: the part's.
        targets: names as `q_proj`, or longer as `self_attn.q_proj`.
        setting: the config's name for the part's LoRA.

    Raises:
        ValueError: one is not; the answer names the layers that there are.
    """
    linear = dict.fromkeys(name for block in blocks for name in _linear_layers(block))
    unknown = [target for target in targets if not any(_means(target, name) for name in linear)]
    if unknown:
        there = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in linear))
        raise ValueError(
            f"{setting}.targets names {', '.join(unknown)}, but the blocks have no such linear layer. Name some of "
            f"{there}."
        )


def add_adapters(block: nn.Module, config: LoraConfig) -> None:
    """Puts adapters beside a block's layers; they start without effect.

    Args:
        block: frozen, and in the precision that it will have. Nothing happens to a block that has no target.
        config: checked.
    """
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model

    targets = [name for name in _linear_layers(block) if any(_means(target, name) for target in config.targets)]
    if not targets:
        return
    made = PeftConfig(
        r=config.rank, lora_alpha=cast("int", config.alpha), lora_dropout=config.dropout, target_modules=targets
    )
    # Within a module of no class that peft knows: of a block that carries its LLM's config it would want the LLM.
    inject_adapter_in_model(made, nn.ModuleDict({"block": block}))
    for parameter in block.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def adapters_train(module: nn.Module, mode: bool) -> None:
    """Switches the adapters' dropout, and nothing of the frozen part beside it."""
    for _, layer in _adapted_layers(module):
        layer.lora_dropout.train(mode)


@torch.no_grad()
def fold_adapters(module: nn.Module) -> int:
    """Adds the adapters to the weights beside them, and leaves plain layers in their place.

    Sums are taken in float32, and rounded to the weights' precision.

    Returns:
        Number of layers that had one.
    """
    found = list(_adapted_layers(module))
    for name, layer in found:
        layer.merge()
        parent, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(parent), attribute, layer.get_base_layer())
    return len(found)


def _linear_layers(block: nn.Module) -> list[str]:
    """Names within a block; those that are quantised are linear layers too."""
    return [name for name, module in block.named_modules() if isinstance(module, nn.Linear)]


def _means(target: str, name: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _adapted_layers(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Names and peft's layers; their attributes are known to it alone."""
    return ((name, layer) for name, layer in module.named_modules() if hasattr(layer, "lora_dropout"))
