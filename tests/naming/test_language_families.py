"""LLMs of every family that is promised, out of folders with a tokenizer: naming equals the library run naively."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from osm_lightning.data.text import TextCodec, builtin_tokenizer
from osm_lightning.instructions import TEST_QUESTION
from osm_lightning.model.config import LanguageConfig
from osm_lightning.model.language import LanguageModel
from osm_lightning.naming.greedy import generate_greedy

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "initializer_range": 0.5,
}
HEADS = {"head_dim": 8, "num_key_value_heads": 1}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
WINDOWED = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "vicuna, llama 2": ("Llama", {}),
    "llama 3": ("Llama", {"num_key_value_heads": 1, "rope_parameters": LLAMA3_ROPE}),
    "smollm 2": ("Llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "smollm 3": ("SmolLM3", {"num_key_value_heads": 1, "tie_word_embeddings": True, "no_rope_layers": [1, 0]}),
    "qwen 2": ("Qwen2", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "qwen 3": ("Qwen3", HEADS),
    "mistral": ("Mistral", {**HEADS, "sliding_window": 4}),
    "gemma 2": ("Gemma2", {**HEADS, **WINDOWED, "final_logit_softcapping": 5.0}),
    "gemma 3": ("Gemma3", {**HEADS, **WINDOWED}),
}
SPECIAL = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
STEPS = 8


def save_llm(family: str, folder: Path) -> Any:
    """A folder as the hub has it: config, safetensors and a tokenizer. Returns the library's own model."""
    kind, changes = FAMILIES[family]
    torch.manual_seed(0)
    suffix = "TextConfig" if kind == "Gemma3" else "Config"
    config = getattr(transformers, f"{kind}{suffix}")(**{**SIZES, **SPECIAL, **changes})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    model.save_pretrained(folder)
    builtin_tokenizer(300).save_pretrained(folder)
    return model


@torch.no_grad()
def name_naively(model: Any, prefix_XZ: Tensor, eos_id: int) -> tuple[list[int], float]:
    """One row, the whole text anew for every id, no cache."""
    ids: list[int] = []
    logprob = 0.0
    for _ in range(STEPS):
        said = model.get_input_embeddings()(torch.tensor(ids, dtype=torch.int64))
        logits = model(inputs_embeds=torch.cat([prefix_XZ, said])[None], use_cache=False).logits[0, -1]
        best, token = logits.float().log_softmax(-1).max(-1)
        logprob += best.item()
        if int(token) == eos_id:
            break
        ids.append(int(token))
    return ids, logprob


@pytest.mark.parametrize("family", list(FAMILIES))
def test_names_are_those_of_the_library_run_without_a_cache(tmp_path: Path, family: str) -> None:
    model = save_llm(family, tmp_path)
    language = LanguageModel(LanguageConfig(name=str(tmp_path), dtype="float32"))
    assert language.report is not None
    assert language.report.surprises == ()
    codec = TextCodec(str(tmp_path))
    prompt_ids = torch.tensor(codec.encode(TEST_QUESTION, None).text_ids)
    mask_tokens = torch.randn(4, 3, 16) * language.word_embeddings().std()
    prefix = torch.cat([mask_tokens, language.embed(prompt_ids).expand(4, -1, -1)], dim=1)
    wanted = [name_naively(model, row, codec.eos_ids[0]) for row in prefix]
    # An id that one of the rows says in the middle ends it there, so that rows leave the cache at different steps.
    ends = {codec.eos_ids[0], wanted[0][0][2]}
    named = generate_greedy(language, prefix, tuple(ends), STEPS)
    for (ids, logprob), found in zip(wanted, named, strict=True):
        cut = next((n for n, token in enumerate(ids) if token in ends), len(ids))
        assert found.token_ids == ids[:cut]
        if cut == len(ids):
            assert found.logprob == pytest.approx(logprob, abs=1e-4)
    assert len(named[0].token_ids) <= 2


def test_word_embeddings_are_what_the_llm_reads(tmp_path: Path) -> None:
    """Gemma 3's embedding scales what its table holds."""
    save_llm("gemma 3", tmp_path)
    language = LanguageModel(LanguageConfig(name=str(tmp_path), dtype="float32"))
    torch.testing.assert_close(language.word_embeddings(), language.embed(torch.arange(300)))
