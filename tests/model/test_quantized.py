"""8 and 4 bits: near to the exact LLM, of its identity, small, and with gradients that go through and into adapters."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional
from transformers import LlamaConfig, LlamaForCausalLM

from osm_lightning.model.config import LanguageConfig, LoraConfig
from osm_lightning.model.language import LanguageModel

WIDTH = 128
ARCHITECTURE = {
    "hidden_size": WIDTH,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 40,
    "initializer_range": 0.1,
}
BITS = pytest.mark.parametrize("bits", ["8bit", "4bit"])
BYTES_PER_WEIGHT = {"8bit": 1 + 4 / WIDTH, "4bit": 1 / 2 + 4 / 64}
"""With a float32 scale for every row of the shortest, or for every 64 weights."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("llm")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**ARCHITECTURE)).save_pretrained(made)
    return made


def language(folder: Path, bits: Any = None, lora: LoraConfig | None = None) -> LanguageModel:
    return LanguageModel(LanguageConfig(name=str(folder), dtype="float32", quantize=bits, lora=lora))


def inputs() -> torch.Tensor:
    return torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1)).requires_grad_()


def through(model: LanguageModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and the gradient at the input of something that they add up to."""
    given = inputs()
    logits = model.logits(model.hidden(given).flatten(0, 1))
    (logits * torch.linspace(-1, 1, logits.shape[-1])).sum().backward()
    assert given.grad is not None
    return logits.detach(), given.grad


def block_bytes(model: LanguageModel) -> int:
    """Of linear layers, with what they are scaled by."""
    blocks = model.llm.model.layers
    return sum(t.nbytes for name, t in blocks.state_dict().items() if "norm" not in name)


@torch.no_grad()
def exactly(rough: LanguageModel, folder: Path) -> LanguageModel:
    """A plain LLM of the weights that a quantised one's stand for."""
    plain = language(folder)
    layers = dict(rough.llm.model.layers.named_modules())
    for name, layer in plain.llm.model.layers.named_modules():
        if isinstance(layer, torch.nn.Linear):
            weight = layers[name].weight
            if hasattr(weight, "SCB"):
                layer.weight.copy_(weight.data * (weight.SCB / 127)[:, None])
            else:
                layer.weight.copy_(functional.dequantize_4bit(weight.data, weight.quant_state))
    return plain


@BITS
def test_they_are_the_exact_weights_rounded_and_computed_with(folder: Path, bits: Any) -> None:
    exact, rough = language(folder), language(folder, bits)
    rounded = exactly(rough, folder)
    # Four bits are unpacked and multiplied in float32; eight meet activations that are rounded to eight as well.
    tolerance = {"4bit": 1e-4, "8bit": 0.05}[bits]
    for one, other, unrounded in zip(through(rounded), through(rough), through(exact), strict=True):
        scale = one.abs().max()
        torch.testing.assert_close(other / scale, one / scale, atol=tolerance, rtol=0)
        assert not torch.allclose(other / scale, unrounded / scale, atol=1e-4), "nothing was quantised"
    wanted = BYTES_PER_WEIGHT[bits] * block_bytes(exact) / 4
    assert block_bytes(rough) == pytest.approx(wanted, rel=0.02)


@BITS
def test_the_identity_is_that_of_the_folder_and_nothing_is_trained(folder: Path, bits: Any) -> None:
    rough = language(folder, bits)
    assert rough.identity == language(folder).identity
    assert not any(parameter.requires_grad for parameter in rough.parameters())
    assert torch.equal(rough.word_embeddings(), language(folder).word_embeddings())


@BITS
def test_adapters_are_trained_beside_quantised_weights(folder: Path, bits: Any) -> None:
    plain, adapted = language(folder, bits), language(folder, bits, LoraConfig(rank=2, dropout=0.0))
    wanted, _ = through(plain)
    assert torch.equal(through(adapted)[0], wanted), "new adapters are felt"
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 2 * ARCHITECTURE["num_hidden_layers"]
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    before = block_bytes(plain)
    for _ in range(3):  # the first step moves the outer matrices alone, as they start at zero
        adapted.zero_grad()
        through(adapted)
        with torch.no_grad():
            for parameter in trained:
                assert parameter.grad is not None
                parameter -= 1e-3 * parameter.grad
    assert all(parameter.grad is not None and parameter.grad.ne(0).any() for parameter in trained)
    assert not torch.equal(through(adapted)[0], wanted)
    frozen = [t for name, t in adapted.llm.model.layers.state_dict().items() if "lora_" not in name]
    assert sum(t.nbytes for t in frozen if t.ndim) < 1.1 * before + 10_000


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_without_bitsandbytes_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, bits: Any) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match=rf"language\.quantize is {bits}, but .*osm_lightning\[quantize\].* to null"):
        LanguageModel(LanguageConfig(name="weights/nothing-here", quantize=bits))


@pytest.mark.parametrize(
    ("settings", "sharded", "reason"),
    [
        ({"name": "weights/x", "architecture": ARCHITECTURE}, False, "asks for random weights"),
        ({"name": "weights/x"}, True, "sharded over processes are not quantised"),
    ],
)
def test_what_cannot_be_quantised_is_refused(settings: dict[str, Any], sharded: bool, reason: str) -> None:
    shard = (lambda _: None) if sharded else None
    with pytest.raises(ValueError, match=rf"language\.quantize is 4bit, but .*{reason}"):
        LanguageModel(LanguageConfig(quantize="4bit", **settings), shard)
