"""Blocks whose activations are computed again: the same numbers for less memory, where transformers' switch fails."""

from __future__ import annotations

import pytest
import torch
from test_osm import tiny_batch

from osm_lightning.model.config import LanguageConfig, QFormerConfig, VisionConfig
from osm_lightning.model.language import LanguageModel
from osm_lightning.model.osm import OSM
from osm_lightning.naming.greedy import generate_greedy

WIDTH, BLOCKS = 16, 3


def language_config(recompute: bool) -> LanguageConfig:
    sizes = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": BLOCKS, "num_attention_heads": 2}
    llm = {**sizes, "vocab_size": 30, "initializer_range": 0.3, "attention_dropout": 0.5}
    return LanguageConfig(architecture=llm, dtype="float32", recompute_activations=recompute)


def language(recompute: bool) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(language_config(recompute)).train()


def osm(recompute: bool) -> OSM:
    torch.manual_seed(0)
    vit = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    vision = VisionConfig(
        "dinov2", architecture=vit, image_size_px=16, window_size_px=8, patch_size_px=4, dtype="float32"
    )
    qformer = QFormerConfig(num_layers=2, width=8, num_heads=2, ffn_width=12, num_queries=2, dropout=0.0)
    return OSM(vision, qformer, language_config(recompute), ("coco",)).train()


def kept_bytes(model: LanguageModel) -> int:
    """Bytes of all tensors that stay from forward to backward, weights aside."""
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    inputs = torch.randn(4, 20, WIDTH, generator=torch.Generator().manual_seed(1)).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model.hidden(inputs)
    hidden.sum().backward()
    return sum(kept.values())


def test_loss_and_all_gradients_are_those_without_bit_for_bit() -> None:
    models = [osm(recompute) for recompute in (False, True)]
    losses = [model(tiny_batch()).logits_PV.square().mean() for model in models]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    for (name, one), (_, other) in zip(*(model.trained() for model in models), strict=True):
        assert one.grad is not None, name
        assert torch.equal(one.grad, other.grad), name
    assert models[0].state_dict().keys() == models[1].state_dict().keys()


def test_between_forward_and_backward_a_block_keeps_little_but_its_input() -> None:
    inputs_of_blocks = BLOCKS * 4 * 20 * WIDTH * 4
    plain, again = kept_bytes(language(False)), kept_bytes(language(True))
    assert plain > 8 * inputs_of_blocks, "the LLM keeps too little for this to say much"
    assert again < 3 * inputs_of_blocks


def test_the_switch_of_transformers_does_nothing_in_eval() -> None:
    """Why there is one of our own; once this fails, theirs will do."""
    model = language(False)
    before = kept_bytes(model)
    model.llm.activation_checkpointing_enable()  # type: ignore[operator]
    assert kept_bytes(model) == before


def test_a_block_is_computed_again_in_training_and_not_in_naming() -> None:
    model = language(True)
    calls = []
    model.llm.get_decoder().layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))  # type: ignore[operator]
    inputs = torch.randn(2, 5, WIDTH, requires_grad=True)
    model.hidden(inputs).sum().backward()
    assert len(calls) == 2
    calls.clear()
    named = generate_greedy(model, inputs.detach(), eos_ids=(29,), max_new_tokens=4)
    assert named == generate_greedy(language(False), inputs.detach(), eos_ids=(29,), max_new_tokens=4)
    assert len(calls) == max(min(4, len(one.token_ids) + 1) for one in named)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_under_autocast_the_second_run_has_the_precision_of_the_first(dtype: str) -> None:
    grads = []
    for recompute in (False, True):
        model = language(recompute).to(getattr(torch, dtype))
        inputs = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model.hidden(inputs).float().square().mean()
        loss.backward()
        grads.append(inputs.grad)
    assert torch.equal(*grads)
