"""Other ways to run a block that compute the same: compiled, or with its activations computed again in backward.

Both replace a block's `forward` and nothing else. Names, weights and classes stay as they are, and the hooks of engines
that share weights out stay outside: they run once per call, and nobody has to compile them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def compile_block(block: nn.Module, for_gradients_only: bool) -> None:
    """Has torch compile a block at its first call, for any number of rows and any length.

    Args:
        block: what is called often, with all else fixed by its weights.
        for_gradients_only: calls without gradients run as before. Names grow by an id per call and by rows that leave:
            each would meet a graph that was made for others.
    """
    plain = block.forward
    compiled = torch.compile(plain, dynamic=True)

    def run(*args: Any, **kwargs: Any) -> Any:
        forward = compiled if torch.is_grad_enabled() or not for_gradients_only else plain
        return forward(*args, **kwargs)

    block.forward = run


def recompute_in_backward(block: nn.Module, has_dropout: bool) -> None:
    """Has a block keep its inputs only between forward and backward, where it runs once more.

    transformers' own switch does nothing in `eval`, where a frozen LLM stays. Calls without gradients, naming with its
    cache among them, are as before.

    Args:
        block: what is called.
        has_dropout: keep the state of random numbers too, so that the second run drops what the first did. In `eval`
            there is no dropout but that of adapters.
    """
    forward = block.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=has_dropout, **kwargs)

    block.forward = run
