"""What a run may switch on works under every strategy; `docs/scaling.md` has the table that this file fills.

Processes are real, and talk over gloo. Tolerances were set before anything was measured.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import Job, run
from tiny_training import TINY
from transformers import LlamaConfig, LlamaForCausalLM

pytestmark = pytest.mark.cluster

EVERY = ["ddp", "deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3", "fsdp2"]

LOSS_ATOL = 1e-3
"""As in test_strategies: of losses near 7."""
SAME_ATOL = 1e-6
"""Where the same operations are to be done in the same order."""
BF16_ATOL = 0.1
"""bfloat16 has 8 bits: 0.4 % of a loss near 7 are 0.03, and 6 steps may add up."""
TINY_CLIP = 1e-7
"""Adam divides by the gradient's size, so that a clip is felt only where it leaves less than Adam's epsilon of 1e-8:
here, spread over 60,000 values, 4e-10 of each."""


def losses(job: Job, timeout_s: float = 300) -> torch.Tensor:
    """float32[ranks, batches]."""
    return torch.tensor([rank["losses"] for rank in run(job, timeout_s)])


def far_apart(what: str, one: torch.Tensor, other: torch.Tensor) -> float:
    """Largest difference, which `pytest -s` shows."""
    assert one.shape == other.shape
    difference = float((one - other).abs().max())
    print(f"\n{what}: at most {difference:.1e}")
    return difference


@pytest.fixture(scope="module")
def unclipped(tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    return losses(Job(tmp_path_factory.mktemp("one"), steps=10, union_of=2, accumulate=2))


@pytest.fixture(scope="module")
def clipped(tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    folder = tmp_path_factory.mktemp("one")
    return losses(Job(folder, steps=10, union_of=2, accumulate=2, clip=TINY_CLIP))


@pytest.mark.parametrize("strategy", EVERY)
def test_gradients_are_accumulated_and_clipped_as_in_one_process(
    strategy: str, unclipped: torch.Tensor, clipped: torch.Tensor, tmp_path: Path
) -> None:
    assert (unclipped - clipped).abs().max() > 100 * LOSS_ATOL, "the clip changes too little for this to say much"
    ranks = losses(Job(tmp_path, strategy, ranks=2, steps=10, accumulate=2, clip=TINY_CLIP))
    assert far_apart(f"{strategy}, clipped", ranks.T.reshape(1, -1), clipped) < LOSS_ATOL


@pytest.mark.parametrize(("strategy", "lets_go"), [*((name, False) for name in EVERY), ("deepspeed_zero3", True)])
def test_computing_activations_again_changes_no_loss(strategy: str, lets_go: bool, tmp_path: Path) -> None:
    settings = {"strategy": strategy, "ranks": 2, "steps": 6, "lets_go": lets_go}
    plain = losses(Job(tmp_path / "plain", **settings))
    again = losses(Job(tmp_path / "again", **settings, language={"recompute_activations": True}))
    assert far_apart(f"{strategy}, computed again", again, plain) < SAME_ATOL


@pytest.mark.parametrize("strategy", ["auto", *EVERY])
def test_mixed_precision_is_near_and_leaves_trained_weights_in_float32(strategy: str, tmp_path: Path) -> None:
    ranks = 1 if strategy == "auto" else 2
    wanted = losses(Job(tmp_path / "float32", strategy, ranks=ranks, steps=6))
    done = run(Job(tmp_path / "mixed", strategy, ranks=ranks, steps=6, trainer={"precision": "bf16-mixed"}))
    mixed = torch.tensor([rank["losses"] for rank in done])
    assert all(map(math.isfinite, mixed.flatten().tolist()))
    assert 0 < far_apart(f"{strategy}, bf16-mixed", mixed, wanted) < BF16_ATOL
    assert [rank["trained_in"] for rank in done] == [{"torch.float32"}] * ranks


@pytest.mark.parametrize("strategy", ["ddp", "deepspeed_zero1", "deepspeed_zero2", "fsdp2"])
def test_compiled_blocks_have_the_losses_of_plain_ones(strategy: str, tmp_path: Path) -> None:
    settings = {"strategy": strategy, "ranks": 2, "steps": 6}
    plain = losses(Job(tmp_path / "plain", **settings))
    compiled = losses(Job(tmp_path / "compiled", **settings, task={"compile_blocks": True}), timeout_s=900)
    assert 0 < far_apart(f"{strategy}, compiled", compiled, plain) < LOSS_ATOL


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings of an LLM in a folder, which can be quantised as random ones cannot."""
    folder = tmp_path_factory.mktemp("llm")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**TINY["language"]["architecture"])).save_pretrained(folder)
    return {"name": str(folder), "architecture": None, "quantize": "8bit"}


@pytest.mark.parametrize("strategy", ["ddp", "deepspeed_zero1", "deepspeed_zero2"])
def test_a_quantised_llm_has_the_losses_of_one_process(strategy: str, llm: dict[str, Any], tmp_path: Path) -> None:
    wanted = losses(Job(tmp_path / "one", steps=4, union_of=2, language=llm))
    ranks = losses(Job(tmp_path / "two", strategy, ranks=2, steps=4, language=llm))
    assert far_apart(f"{strategy}, 8 bits", ranks.T.reshape(1, -1), wanted) < BF16_ATOL


@pytest.mark.parametrize("strategy", ["deepspeed_zero3", "fsdp2"])
def test_strategies_that_share_the_llm_out_refuse_to_quantise_it(
    strategy: str, llm: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(AssertionError, match="sharded over processes are not quantised"):
        run(Job(tmp_path, strategy, ranks=2, steps=1, language=llm))


def test_zero3_refuses_compiled_blocks_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"ValueError: model\.compile_blocks is true, but DeepSpeed ZeRO-3.*fsdp2"):
        run(Job(tmp_path, "deepspeed_zero3", ranks=2, steps=2, task={"compile_blocks": True}))
