"""The frozen LLM: the cache, the padding and the projection change nothing, and gradients only pass through."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from osm_lightning.model.config import LanguageConfig
from osm_lightning.model.language import LanguageModel

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


def tiny_language(dtype: str = "float32") -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(LanguageConfig(architecture=ARCHITECTURE, dtype=dtype))


def test_sizes_are_read_from_the_llm() -> None:
    language = tiny_language()
    assert (language.width, language.vocabulary_size, language.dtype) == (WIDTH, VOCABULARY, torch.float32)


def test_with_and_without_a_cache_the_hidden_states_agree() -> None:
    language = tiny_language()
    inputs = torch.randn(3, 7, WIDTH)
    wanted = language.hidden(inputs)
    cache = DynamicCache()
    parts = [language.hidden(part, cache) for part in inputs.split([4, 1, 2], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), wanted, atol=1e-5, rtol=1e-5)
    assert cache.get_seq_length() == 7


def test_padding_on_the_right_is_not_seen() -> None:
    language = tiny_language()
    inputs = torch.randn(2, 6, WIDTH)
    padded = torch.cat([inputs[:, :4], 100 * torch.randn(2, 2, WIDTH)], dim=1)
    torch.testing.assert_close(language.hidden(padded)[:, :4], language.hidden(inputs)[:, :4])


def test_hidden_and_logits_are_those_of_the_whole_llm() -> None:
    language = tiny_language()
    ids = torch.randint(0, VOCABULARY, (2, 5))
    wanted = language.llm(input_ids=ids).logits
    hidden = language.hidden(language.embed(ids))
    torch.testing.assert_close(language.logits(hidden[1, [0, 3]]), wanted[1, [0, 3]])


def test_gradients_go_through_it_and_not_into_it() -> None:
    language = tiny_language().train()
    assert not any(module.training for module in language.llm.modules())
    assert not any(parameter.requires_grad for parameter in language.parameters())
    inputs = torch.randn(1, 4, WIDTH, requires_grad=True)
    language.logits(language.hidden(inputs)[:, -1]).square().sum().backward()
    assert inputs.grad is not None
    assert inputs.grad.ne(0).any(dim=-1).all()
    assert all(parameter.grad is None for parameter in language.parameters())
    # In eval, so that its own dropout is off.
    assert torch.equal(language.hidden(inputs), language.hidden(inputs))


@pytest.mark.parametrize("autocast", [False, True])
def test_a_half_precision_llm_computes_in_its_own_precision_and_gives_float32_logits(autocast: bool) -> None:
    language = tiny_language("bfloat16")
    assert {parameter.dtype for parameter in language.parameters()} == {torch.bfloat16}
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        hidden = language.hidden(torch.randn(1, 3, WIDTH))
        logits = language.logits(hidden[:, -1])
    assert hidden.dtype == torch.bfloat16
    assert logits.dtype == torch.float32
    assert logits.shape == (1, VOCABULARY)


def test_autocast_leaves_a_float32_llm_alone() -> None:
    language = tiny_language()
    inputs = torch.randn(1, 3, WIDTH)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = language.hidden(inputs)
    assert torch.equal(hidden, language.hidden(inputs))


def test_weights_are_read_from_a_folder_in_the_precision_that_is_asked_for(tmp_path: Path) -> None:
    model = LlamaForCausalLM(LlamaConfig(**ARCHITECTURE))
    model.save_pretrained(tmp_path / "llm")
    language = LanguageModel(LanguageConfig(name=str(tmp_path / "llm"), dtype="bfloat16"))
    loaded = language.llm.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded[name], tensor.bfloat16()), name


def test_a_missing_folder_is_named_before_any_download() -> None:
    with pytest.raises(ValueError, match=r"language\.name is 'weights/nothing-here'"):
        LanguageModel(LanguageConfig(name="weights/nothing-here"))


def test_a_folder_that_lacks_a_layer_is_refused_and_not_filled_with_random_numbers(tmp_path: Path) -> None:
    LlamaForCausalLM(LlamaConfig(**ARCHITECTURE)).save_pretrained(tmp_path)
    for layers, reason in ((3, "9 missing: model.layers.2"), (1, "9 unexpected: model.layers.1")):
        content = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**content, "num_hidden_layers": layers}))
        with pytest.raises(ValueError, match=rf"^language\.name is '{tmp_path}'.*{reason}"):
            LanguageModel(LanguageConfig(name=str(tmp_path)))


def test_what_is_loaded_is_reported_and_a_surprise_is_let_through_by_name(tmp_path: Path) -> None:
    model = LlamaForCausalLM(LlamaConfig(**ARCHITECTURE))
    tensors = {**model.state_dict(), "score.weight": torch.zeros(2, WIDTH), "score.bias": torch.zeros(2)}
    del tensors["model.norm.weight"]
    model.save_pretrained(tmp_path, state_dict=tensors)
    whole = {"allow": ["score.*", "model.norm.weight"]}
    for allow in ([], ["score.*"], ["model.norm.weight", "score.w*"]):
        with pytest.raises(ValueError, match=r"do not fit.*let through by model\.language\.allow"):
            LanguageModel(LanguageConfig(name=str(tmp_path), allow=allow))
    report = LanguageModel(LanguageConfig(name=str(tmp_path), **whole)).report
    assert report is not None
    how_much = f"{report.num_loaded} tensors (float32, {report.num_bytes / 1e6:.1f} MB)"
    allowed = "1 missing: model.norm.weight; 2 unexpected: score.bias, score.weight"
    assert report.line() == f"LLM: {how_much} from {tmp_path}; allowed: {allowed}"
    assert report.num_loaded == len(model.state_dict()) - 1


def test_an_llm_whose_blocks_are_elsewhere_is_named(tmp_path: Path) -> None:
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=VOCABULARY, n_positions=8)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"the LLM is a 'gpt2', whose decoder has no `layers`"):
        LanguageModel(LanguageConfig(name=str(tmp_path)))
