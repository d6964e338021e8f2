"""From SmolLM2's GGUF file to a Hugging Face folder: the dequantised model and its tokenizer.

Reading GGUF is transformers' business; this module mends what its reader leaves behind. torch and transformers are
imported in the function, because the table of fetchable parts must load without them.
"""

from __future__ import annotations

from pathlib import Path


def convert(source: Path, out: Path) -> None:
    """Writes config, weights and tokenizer of a SmolLM2 in GGUF so that `from_pretrained` takes them.

    The weights stay float32. A Q4_1 weight is a float16 scale times four bits plus a float16 offset and does not fit
    into bfloat16's eight bits: rounding changed the likeliest next token at 0.6 % of the positions of an English text.
    And float32, though 538 MB, was mapped from the disk in 0.3 s where bfloat16 took 1.2 s to be widened.

    Args:
        source: the GGUF file.
        out: an existing folder.

    Raises:
        ValueError: the file is not a Llama with a tokenizer.
    """
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    read = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    if not isinstance(read, LlamaForCausalLM):
        raise ValueError(f"{source.name} holds a {type(read).__name__}, but SmolLM2 is a LlamaForCausalLM.")

    # What the reader returns calls itself quantised and refuses to be saved; a model of the same plain config does not.
    settings = read.config.to_dict()
    del settings["quantization_config"]
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(read.state_dict())
    model.save_pretrained(out)

    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    # The reader ignores the file's `tokenizer.ggml.pre = smollm`: digits are cut off one by one before anything else,
    # so that "x  12" is x, two spaces, 1, 2, as in training.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(out)
