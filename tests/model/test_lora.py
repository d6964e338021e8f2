"""Adapters: not felt before they are trained, in float32 beside any LLM, and folded in they say the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from osm_lightning.model.config import LanguageConfig, LoraConfig
from osm_lightning.model.frozen import freeze
from osm_lightning.model.language import LanguageModel
from osm_lightning.model.lora import add_adapters, fold_adapters, is_adapter

WIDTH, VOCABULARY = 16, 30
ARCHITECTURE = {
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": VOCABULARY,
    "initializer_range": 0.3,
    "attention_dropout": 0.5,
}


def language(lora: LoraConfig | None = None, dtype: Any = "float32", **settings: Any) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(LanguageConfig(architecture=ARCHITECTURE, dtype=dtype, lora=lora, **settings))


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def as_if_trained(model: LanguageModel) -> LanguageModel:
    """Gives the adapters values that are felt."""
    generator = torch.Generator().manual_seed(3)
    for parameter in trained(model).values():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def inputs(rows: int = 3) -> torch.Tensor:
    return torch.randn(rows, 6, WIDTH, generator=torch.Generator().manual_seed(1))


def logits(model: LanguageModel) -> torch.Tensor:
    return model.logits(model.hidden(inputs()).flatten(0, 1))


def test_new_adapters_change_neither_what_the_llm_says_nor_its_identity() -> None:
    plain, adapted = language(), language(LoraConfig(dropout=0.5)).eval()
    assert torch.equal(logits(adapted), logits(plain))
    assert adapted.identity == plain.identity
    assert not torch.equal(logits(as_if_trained(adapted)), logits(plain))


def test_only_adapters_are_trained_and_their_names_are_those_that_checkpoints_know() -> None:
    found = trained(language(LoraConfig(rank=3, targets=["q_proj", "mlp.up_proj"])))
    places = ("self_attn.q_proj", "mlp.up_proj")
    sides = ("lora_A", "lora_B")
    wanted = [
        f"llm.model.layers.{i}.{place}.{side}.default.weight" for i in (0, 1) for place in places for side in sides
    ]
    assert list(found) == wanted
    assert all(map(is_adapter, found))
    assert {tuple(parameter.shape) for parameter in found.values()} == {(3, WIDTH), (WIDTH, 3), (24, 3)}


def test_dropout_of_adapters_follows_the_trainer_and_nothing_else_does() -> None:
    model = as_if_trained(language(LoraConfig(dropout=0.5))).train()
    on = {name for name, module in model.llm.named_modules() if module.training}
    assert on
    assert all(".lora_dropout" in name for name in on)
    assert not torch.equal(logits(model), logits(model))
    model.eval()
    assert not any(module.training for module in model.llm.modules())
    assert torch.equal(logits(model), logits(model))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("autocast", [False, True])
def test_adapters_of_a_half_precision_llm_are_float32_and_so_are_their_gradients(dtype: str, autocast: bool) -> None:
    model = as_if_trained(language(LoraConfig(), dtype)).train()
    frozen = {parameter.dtype for parameter in model.parameters() if not parameter.requires_grad}
    assert frozen == {getattr(torch, dtype)} == {model.dtype}
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        hidden = model.hidden(inputs())
        loss = model.logits(hidden.flatten(0, 1)).square().mean()
    assert hidden.dtype == model.dtype
    loss.backward()
    for name, parameter in trained(model).items():
        assert parameter.dtype == torch.float32, name
        assert parameter.grad is not None, name
        assert parameter.grad.ne(0).any(), name
        assert parameter.grad.isfinite().all(), name


def test_activations_that_are_computed_again_drop_the_same() -> None:
    losses, grads = [], []
    for recompute in (False, True):
        model = as_if_trained(language(LoraConfig(dropout=0.5), recompute_activations=recompute)).train()
        torch.manual_seed(5)
        losses.append(model.hidden(inputs()).square().mean())
        torch.rand(7)  # what is drawn between forward and backward
        losses[-1].backward()
        grads.append([parameter.grad for parameter in trained(model).values()])
    assert torch.equal(*losses)
    for one, other in zip(*grads, strict=True):
        assert torch.equal(one, other)


def test_folded_in_they_say_the_same_and_are_gone() -> None:
    plain = language()
    model = as_if_trained(language(LoraConfig(rank=2, alpha=5.0))).eval()
    wanted = logits(model)
    assert fold_adapters(model.llm) == 4
    torch.testing.assert_close(logits(model), wanted, atol=1e-5, rtol=0)
    before, after = plain.llm.state_dict(), model.llm.state_dict()
    assert before.keys() == after.keys()
    changed = {name.split(".")[-2] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"q_proj", "v_proj"}
    assert not trained(model)


def test_an_llm_of_real_size_gets_few_parameters() -> None:
    """SmolLM2-135M's sizes, without its weights."""
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
    with torch.device("meta"):
        llm = freeze(LlamaForCausalLM(LlamaConfig(**sizes, **heads)))
        num_frozen = sum(parameter.numel() for parameter in llm.parameters())
        for block in llm.model.layers:
            add_adapters(block, LoraConfig())
    num_trained = sum(parameter.numel() for parameter in trained(llm).values())
    assert num_frozen == 134_515_008
    assert num_trained == 30 * 8 * ((576 + 576) + (576 + 192))
    assert num_trained < 0.02 * num_frozen


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, r"model\.language\.lora\.rank is 0, but must be at least 1"),
        ({"alpha": 0.0}, r"model\.language\.lora\.alpha is 0\.0, but must be above 0"),
        ({"dropout": 1.0}, r"model\.language\.lora\.dropout is 1\.0, but must be at least 0 and below 1"),
        ({"targets": []}, r"model\.language\.lora\.targets is empty"),
        (
            {"targets": ["q_proj", "query", "attn.v_proj"]},
            r"lora\.targets names query, attn\.v_proj, but .* q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, "
            r"down_proj\.",
        ),
    ],
)
def test_what_means_nothing_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        language(LoraConfig(**settings))
