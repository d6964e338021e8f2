"""A tiny random InstructBLIP as the hub has it, and a released checkpoint over it, for tests.

The model is transformers' own class and its files are transformers' own formats; sizes are small. Weights are large and
no norm or bias is neutral, so that every part and every pixel has an effect on the names that come out.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    BertTokenizer,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    LlamaTokenizer,
)
from transformers.convert_slow_tokenizer import import_protobuf

from osm_lightning.instructions import BOX_QUESTIONS, MASK_QUESTIONS, answer, prompt
from osm_lightning.vocabulary import load_vocabulary

WINDOW, PATCH = 56, 14
WINDOWS_A_SIDE = 2
SIDE = WINDOW * WINDOWS_A_SIDE
QUERIES = 8
VISION_WIDTH, QFORMER_WIDTH, LLM_WIDTH = 32, 48, 64
RELEASED_MODES = (
    "coco",
    "lvis",
    "v3det",
    "a847",
    "pc459",
    "partimagenet",
    "pascal_part",
    "ade20k",
    "cityscapes",
    "any",
)

Format = Literal["safetensors", "bin"]


def llama_tokenizer(num_pieces: int = 600) -> LlamaTokenizer:
    """Llama's kind of tokenizer (BPE, byte fallback) with InstructBLIP's special tokens: `</s>` for all but pad."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    bpe.decoder = decoders.Metaspace()
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    bpe.train_from_iterator(
        corpus(), trainers.BpeTrainer(vocab_size=num_pieces, special_tokens=special, show_progress=False)
    )
    trained = json.loads(bpe.to_str())["model"]
    tokens = {"unk_token": "</s>", "bos_token": "</s>", "eos_token": "</s>", "pad_token": "[PAD]"}
    merges = [tuple(merge) for merge in trained["merges"]]
    return LlamaTokenizer(vocab=trained["vocab"], merges=merges, add_bos_token=True, **tokens)


def bert_tokenizer() -> BertTokenizer:
    """A WordPiece tokenizer that knows the words of the questions and the letters."""
    words = {word.strip("?.,").lower() for text in corpus() for word in text.replace(":", " : ").split()}
    letters = "abcdefghijklmnopqrstuvwxyz0123456789?.,:-'()"
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    vocabulary += sorted(word for word in words if len(word) > 1 and word.isalpha())[:400]
    return BertTokenizer(vocab={word: index for index, word in enumerate(dict.fromkeys(vocabulary))})


def corpus() -> list[str]:
    questions = [prompt(question) for question in (*MASK_QUESTIONS, *BOX_QUESTIONS)]
    return questions * 5 + [answer(entry.names[0]) for entry in load_vocabulary("coco")]


def config(vocabulary: int, instruction_vocabulary: int, **text: Any) -> InstructBlipConfig:
    return InstructBlipConfig(
        vision_config={
            "hidden_size": VISION_WIDTH,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": WINDOW,
            "patch_size": PATCH,
        },
        qformer_config={
            "vocab_size": instruction_vocabulary,
            "hidden_size": QFORMER_WIDTH,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "intermediate_size": 64,
            "max_position_embeddings": 64,
            "cross_attention_frequency": 2,
        },
        text_config={
            "model_type": "llama",
            "vocab_size": vocabulary,
            "hidden_size": LLM_WIDTH,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 256,
            "bos_token_id": 2,
            "eos_token_id": 2,
            "pad_token_id": vocabulary - 1,
            **text,
        },
        num_query_tokens=QUERIES,
    )


@torch.no_grad()
def spread(module: nn.Module, seed: int) -> None:
    """Draws all weights anew, in the order of their names."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            is_scale = name.endswith("norm.weight") or "norm1.weight" in name or "norm2.weight" in name
            is_scale = is_scale or name.endswith(("LayerNorm.weight", "layernorm.weight"))
            parameter.copy_(1 + 0.2 * noise if is_scale else 0.2 * noise)
        else:
            parameter.copy_(0.25 * noise)


def instructblip(
    folder: Path, file_format: Format = "safetensors", seed: int = 0, shard: str = "200KB", **text: Any
) -> Path:
    """Writes a tiny random InstructBLIP in several shards, with both tokenizers."""
    llm_tokenizer, qformer_tokenizer = llama_tokenizer(), bert_tokenizer()
    model = InstructBlipForConditionalGeneration(config(len(llm_tokenizer), len(qformer_tokenizer), **text))
    spread(model, seed)
    with torch.no_grad():  # some names end before the limit
        model.language_model.lm_head.weight[llm_tokenizer.eos_token_id] *= 2.5
    folder.mkdir(parents=True)
    model.save_pretrained(folder, max_shard_size=shard)
    if file_format == "bin":
        as_bin(folder)
    llm_tokenizer.save_pretrained(folder)
    qformer_tokenizer.save_pretrained(folder / "qformer_tokenizer")
    return folder


def as_bin(folder: Path) -> None:
    """Turns a folder's safetensors shards into the older `pytorch_model-*.bin`."""
    shards = sorted(folder.glob("model*.safetensors"))
    new_names = {shard.name: f"pytorch_{shard.stem}.bin" for shard in shards}
    for shard in shards:
        torch.save(load_file(shard), folder / new_names[shard.name])
        shard.unlink()
    index = folder / "model.safetensors.index.json"
    if index.exists():
        content = json.loads(index.read_text())
        content["weight_map"] = {name: new_names[shard] for name, shard in content["weight_map"].items()}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(content))
        index.unlink()


def released(folder: Path, modes: tuple[str, ...] = RELEASED_MODES, seed: int = 1) -> dict[str, Tensor]:
    """Trained parts in the released format, all other than the folder's."""
    base = InstructBlipForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    spread(base.qformer, seed)
    spread(base.language_projection, seed + 1)
    generator = torch.Generator().manual_seed(seed + 2)

    def draw(*shape: int, std: float) -> Tensor:
        return std * torch.randn(shape, generator=generator)

    num_tokens = WINDOWS_A_SIDE**2 * ((WINDOW // PATCH) ** 2 + 1)
    context = draw(1, QUERIES, QFORMER_WIDTH, std=1.0)
    state = OrderedDict(
        window_pos_embed=draw(1, num_tokens, VISION_WIDTH, std=1.0),
        mask_query=draw(1, QUERIES, QFORMER_WIDTH, std=1.0),
        context_query=context,
    )
    for mode in modes:
        state[f"qformer_mode_query.{mode}"] = draw(1, 1, QFORMER_WIDTH, std=1.0)
    for mode in modes:
        state[f"mode_query.{mode}"] = draw(1, 1, LLM_WIDTH, std=0.5)
    state["base_model.query_tokens"] = context
    for part in ("qformer", "language_projection"):
        state |= {f"base_model.{part}.{name}": value for name, value in getattr(base, part).state_dict().items()}
    return dict(state)


def save_released(state: dict[str, Tensor], path: Path) -> Path:
    """Writes it as the authors' training script does: wrapped, with a prefix, and with what it takes to resume."""
    wrapped = {f"module.{name}": tensor for name, tensor in state.items()}
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(2))])
    extras = {"epoch": 3, "optimizer_state_dict": optimizer.state_dict(), "lr_scheduler_state_dict": {"last_epoch": 7}}
    torch.save({"model_state_dict": wrapped, **extras}, path)
    return path


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    """Changes a folder's weights, and puts them into one file."""
    tensors: dict[str, Tensor] = {}
    for shard in sorted(folder.glob("model*.safetensors")):
        tensors |= load_file(shard)
        shard.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    changed = {name: tensor.contiguous().clone() for name, tensor in change(tensors).items()}
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def only_sentencepiece(folder: Path) -> Path:
    """Turns a folder's tokenizer into sentencepiece's `tokenizer.model` with the small files that older writers add."""
    sentencepiece_pb2 = import_protobuf()  # sentencepiece's own where that is installed: two would clash
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = sorted(content["model"]["vocab"].items(), key=lambda item: item[1])
    proto = sentencepiece_pb2.ModelProto()
    for piece, index in vocabulary:
        kind = {"<unk>": 2, "<s>": 3, "</s>": 3}.get(piece, 6 if piece.startswith("<0x") else 1)
        proto.pieces.add(piece=piece, score=0.0 if index < 259 else -float(index - 259), type=kind)
    proto.trainer_spec.model_type = 2
    proto.trainer_spec.unk_id, proto.trainer_spec.bos_id, proto.trainer_spec.eos_id = 0, 1, 2
    proto.trainer_spec.byte_fallback = True
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix, proto.normalizer_spec.remove_extra_whitespaces = True, False
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())
    (folder / "tokenizer.json").unlink()
    tokens = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "[PAD]"}
    older = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False, "legacy": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(older))
    (folder / "special_tokens_map.json").write_text(json.dumps(tokens))
    (folder / "added_tokens.json").write_text(json.dumps({"[PAD]": len(vocabulary)}))
    return folder
