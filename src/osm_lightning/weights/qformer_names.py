"""Names of InstructBLIP's Q-Former in transformers, and what they are called in `model/qformer.py`.

The layers are the same, so that converting is renaming; no value changes. Strict both ways: every tensor of the source
is used and every tensor of ours is filled. The queries stand outside of it, since transformers keeps them outside of
its Q-Former (`query_tokens`), and which of ours start from them is the caller's business.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from osm_lightning.model.qformer import MaskQFormer

LAYER = {
    "attention.attention.query": "self_attention.query",
    "attention.attention.key": "self_attention.key",
    "attention.attention.value": "self_attention.value",
    "attention.output.dense": "self_attention.output",
    "attention.output.LayerNorm": "self_attention.norm",
    "crossattention.attention.query": "cross_attention.query",
    "crossattention.attention.key": "cross_attention.key",
    "crossattention.attention.value": "cross_attention.value",
    "crossattention.output.dense": "cross_attention.output",
    "crossattention.output.LayerNorm": "cross_attention.norm",
    "intermediate_query.dense": "query_ffn.inner",
    "output_query.dense": "query_ffn.output",
    "output_query.LayerNorm": "query_ffn.norm",
    "intermediate.dense": "text_ffn.inner",
    "output.dense": "text_ffn.output",
    "output.LayerNorm": "text_ffn.norm",
}
"""Parts of a layer: transformers' `encoder.layer.N.` to our `layers.N.`."""

EMBEDDINGS = {
    "embeddings.word_embeddings": "instruction.word",
    "embeddings.position_embeddings": "instruction.position",
    "embeddings.layernorm": "norm",
}
"""Parts before the layers."""

NO_WEIGHT = "embeddings.position_ids"
"""A buffer of 0, 1, 2 ... that older transformers saved among the weights."""

QUERIES = frozenset({"mask_query_QD", "context_query_QD"})
"""Ours, and no part of transformers' Q-Former."""

SHOWN = 5
"""Examples of each kind of problem in an error."""


def convert_qformer(source: Mapping[str, Tensor], qformer: MaskQFormer) -> dict[str, Tensor]:
    """Renames the weights of transformers' `InstructBlipQFormerModel` to ours.

    Args:
        source: its state dict, without a prefix.
        qformer: the module that is to take them; only its names and shapes are read. Where it reads no instruction,
            the source's text parts have no place in it and are left out.

    Returns:
        Everything in the module's state dict but the queries; tensors are the source's own, not copies.

    Raises:
        ValueError: a name is unknown or has no place in the module, a part of the module stays empty, or a shape
            differs; up to five of each are shown.
    """
    target = {name: tensor for name, tensor in qformer.state_dict().items() if name not in QUERIES}
    converted: dict[str, Tensor] = {}
    unused = []
    for name, tensor in source.items():
        ours = our_name(name)
        if ours in target:
            converted[ours] = tensor
        elif name != NO_WEIGHT and not (qformer.instruction is None and ours is not None and _is_text(ours)):
            unused.append(name)
    problems = {
        "names of the source without a place in the model": unused,
        "names of the model that the source does not fill": sorted(target.keys() - converted.keys()),
        "shapes that differ": [
            f"{name} (source {tuple(tensor.shape)}, model {tuple(target[name].shape)})"
            for name, tensor in converted.items()
            if tensor.shape != target[name].shape
        ],
    }
    if any(problems.values()):
        shown = "; ".join(
            f"{len(found)} {kind}: {', '.join(found[:SHOWN])}" for kind, found in problems.items() if found
        )
        raise ValueError(
            f"the Q-Former's weights don't fit the model ({shown}). Give a state dict of transformers' "
            "InstructBlipQFormerModel without a prefix, and the sizes of its config under `qformer`."
        )
    return converted


def our_name(name: str) -> str | None:
    """From a tensor's name in transformers to ours; None for a name that is not known."""
    module, _, parameter = name.rpartition(".")
    if module in EMBEDDINGS:
        return f"{EMBEDDINGS[module]}.{parameter}"
    layer = re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)", module)
    if layer is None or layer[2] not in LAYER:
        return None
    return f"layers.{layer[1]}.{LAYER[layer[2]]}.{parameter}"


def _is_text(ours: str) -> bool:
    return ours.startswith("instruction.") or ".text_ffn." in ours
