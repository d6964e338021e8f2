"""The LLM in 8 or 4 bits, by bitsandbytes."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import Any

import torch

from osm_lightning.model.config import LanguageConfig
from osm_lightning.model.frozen import torch_dtype
from osm_lightning.model.instructblip import is_instructblip
from osm_lightning.model.pretrained import load_pretrained


def check_quantization(config: LanguageConfig, sharded: bool) -> None:
    """Refuses what cannot be quantised here, before anything is loaded.

    Raises:
        ValueError: says what is missing, or what quantised weights don't go with.
    """
    reason = None
    if find_spec("bitsandbytes") is None:
        reason = "the package bitsandbytes is not installed: `pip install 'osm_lightning[quantize]'`"
    elif config.architecture is not None:
        reason = "language.architecture asks for random weights: give language.name"
    elif is_instructblip(config.name):
        reason = "an InstructBLIP's LLM is read tensor by tensor: save its LLM to a folder of its own and name that"
    elif sharded:
        reason = (
            "weights that are sharded over processes are not quantised: use the strategies ddp or deepspeed stage 2"
        )
    if reason is not None:
        raise ValueError(f"language.quantize is {config.quantize}, but {reason}. Or set it to null.")


def load_quantized(config: LanguageConfig) -> Any:
    """The LLM on the current CUDA device, or on the CPU; its embeddings and its vocabulary's projection in `dtype`."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    # It says of every product that 8 bits are made of float16.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)

    dtype = torch_dtype(config.dtype)
    bits = (
        BitsAndBytesConfig(load_in_8bit=True)
        if config.quantize == "8bit"
        else BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    )
    options: dict[str, Any] = {
        "dtype": dtype,
        "quantization_config": bits,
        "device_map": {"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"},
    }
    kind = AutoModelForCausalLM
    return load_pretrained(kind, config.name, "language.name", "LLM", allow=config.allow, **options)[0]
