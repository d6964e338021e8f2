"""The frozen LLM: reads [mask tokens, mode, text] and says what comes next (Sec. 3.1).

Gradients go through it, never into it: where the config has LoRA, into the adapters in its blocks (`lora.py`). The
vocabulary projection runs on the positions that are asked for and no others. How tokens are chosen is `naming/`'s
business.
"""

# M masks  P asked positions  Q mask tokens  L text ids  X positions of the LLM  V vocabulary  Z LLM width

from __future__ import annotations

from functools import partial
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from osm_lightning.model.blocks import compile_block, recompute_in_backward
from osm_lightning.model.config import LanguageConfig, LoraConfig
from osm_lightning.model.frozen import OwnsFrozen, Shard, fingerprint, freeze, missing_weights, place, torch_dtype
from osm_lightning.model.instructblip import is_instructblip, open_instructblip
from osm_lightning.model.load_report import LoadReport
from osm_lightning.model.lora import adapters_train, add_adapters, check_targets
from osm_lightning.model.pretrained import load_pretrained
from osm_lightning.model.quantized import check_quantization, load_quantized

LORA = "model.language.lora"
"""The config's name for the adapters."""


class LanguageModel(OwnsFrozen):
    """Any decoder-only causal LM of transformers, frozen."""

    frozen_parts = ("llm",)
    report: LoadReport | None = None
    """What was loaded; None for random weights."""

    def __init__(self, config: LanguageConfig, shard: Shard | None = None, compiled: bool = False) -> None:
        """Loads the weights.

        Args:
            config: which LLM.
            shard: called with every block of it once it has its precision.
            compiled: have torch compile the blocks, where gradients go through them.

        Raises:
            ValueError: the weights are missing, broken or cannot be quantised here, or adapters are for layers that
                the LLM has not.
        """
        super().__init__()
        self.config = config
        if config.quantize is not None:
            check_quantization(config, sharded=shard is not None)
        if config.lora is not None:
            config.lora.check(LORA)
        model, self.report = _load(config)
        if config.lora is not None:
            check_targets(_blocks(model), config.lora.targets, LORA)
        complete = partial(_complete, config.lora, shard)
        if config.quantize is None:
            self.llm = freeze(cast("nn.Module", model))
            blocks = _blocks(model)
            self.identity = place(self.llm, blocks, torch_dtype(config.dtype), complete)
        else:
            self.identity = fingerprint(model)  # of what the folder holds, so that it is the same in any precision
            model = load_quantized(config)
            self.llm = freeze(cast("nn.Module", model))
            blocks = _blocks(model)
            for block in blocks:
                complete(block)
        has_dropout = config.lora is not None and config.lora.dropout > 0
        for block in blocks:
            if compiled:
                compile_block(block, for_gradients_only=True)
            if config.recompute_activations:
                recompute_in_backward(block, has_dropout)
        self.width = int(model.get_input_embeddings().embedding_dim)
        self.vocabulary_size = int(model.get_output_embeddings().out_features)

    def train(self, mode: bool = True) -> Self:
        """Switches the adapters' dropout, and leaves the LLM in `eval`."""
        super().train(mode)
        adapters_train(self.llm, mode)
        return self

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the weights."""
        return cast("torch.dtype", cast("Any", self.llm).dtype)

    def embed(self, ids: Tensor) -> Tensor:
        """int64[..] -> [.., Z], in the LLM's precision."""
        return cast("Tensor", cast("Any", self.llm).get_input_embeddings()(ids))

    def word_embeddings(self) -> Tensor:
        """float32[V, Z], the embedding of every id."""
        embedding = cast("Any", self.llm).get_input_embeddings()
        scale = getattr(embedding, "embed_scale", 1.0)  # Gemma's is part of its embedding
        return cast("Tensor", embedding.weight).detach().float() * scale

    def step_along(self) -> None:
        """Takes a step of naming that nobody needs, in the order of a real one: `hidden`, `logits`, `embed`."""
        one = torch.zeros(1, dtype=torch.int64, device=cast("Any", self.llm).device)
        self.logits(self.hidden(torch.zeros(1, 1, self.width, dtype=self.dtype, device=one.device))[:, -1])
        self.embed(one)

    def new_cache(self) -> Any:
        """An empty key-value cache for `hidden`."""
        from transformers import DynamicCache

        return DynamicCache(config=cast("Any", self.llm).config)

    def hidden(self, inputs_MXZ: Tensor, cache: Any = None) -> Tensor:
        """Runs the decoder over embeddings.

        Rows may be padded on the right without a mask: attention is causal, so that nothing before the padding sees it.

        Args:
            inputs_MXZ: float[M, X, Z].
            cache: a transformers cache, extended in place; None keeps nothing.

        Returns:
            [M, X, Z], in the LLM's precision.
        """
        decoder = cast("Any", self.llm).get_decoder()
        with torch.autocast(inputs_MXZ.device.type, enabled=False):
            out = decoder(
                inputs_embeds=inputs_MXZ.to(self.dtype),
                cache=cache,
                use_cache=cache is not None,
            )
        return cast("Tensor", out.last_hidden_state)

    def logits(self, hidden_PZ: Tensor) -> Tensor:
        """[P, Z] -> float32[P, V], scaled and capped as the LLM's own head does (Cohere, Granite, Gemma)."""
        llm = cast("Any", self.llm)
        with torch.autocast(hidden_PZ.device.type, enabled=False):
            logits_PV = cast("Tensor", llm.get_output_embeddings()(hidden_PZ)).float()
        scale = getattr(llm.config, "logit_scale", None) or 1.0 / (getattr(llm.config, "logits_scaling", None) or 1.0)
        cap = getattr(llm.config, "final_logit_softcapping", None)
        if scale != 1.0:
            logits_PV = logits_PV * scale
        return logits_PV if cap is None else torch.tanh(logits_PV / cap) * cap


def _load(config: LanguageConfig) -> tuple[Any, LoadReport | None]:
    """The LLM as its folder holds it, or with random weights, of which there is nothing to report."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    if config.architecture is not None:
        return LlamaForCausalLM(LlamaConfig(**config.architecture)), None
    missing_weights("language.name", config.name)
    if is_instructblip(config.name):
        return open_instructblip(config.name, "language.name").language_model()
    return load_pretrained(AutoModelForCausalLM, config.name, "language.name", "LLM", allow=config.allow)


def _blocks(model: Any) -> Any:
    """Its transformer blocks.

    Raises:
        ValueError: they are not where Llama and its followers have them.
    """
    blocks = getattr(model.get_decoder(), "layers", None)
    if blocks is None:
        raise ValueError(
            f"the LLM is a {model.config.model_type!r}, whose decoder has no `layers` as Llama's, Qwen's, Mistral's, "
            "Gemma's and most others have. Set model.language.name to one of those."
        )
    return blocks


def _complete(lora: LoraConfig | None, shard: Shard | None, block: nn.Module) -> None:
    """What a block needs once it has its precision: adapters, which are shared out with it."""
    if lora is not None:
        add_adapters(block, lora)
    if shard is not None:
        shard(block)


def quiet_loading() -> None:
    """Turns off transformers' own progress bars and advice; a local model loads in seconds."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
