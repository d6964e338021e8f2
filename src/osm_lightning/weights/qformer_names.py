"""Names of InstructBLIP's Q-Former in transformers, and what they are called in `model/qformer.py`.

The layers are the same, so that converting is renaming; no value changes. Strict both ways: every tensor of the source
is used and every tensor of ours is filled. The queries stand outside of it, since transformers keeps them outside of
its Q-Former (`query_tokens`), and which of ours start from them is the caller's business.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from osm_lightning.model.load_report import LoadReport
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

THEIR_LAYER = {ours: theirs for theirs, ours in LAYER.items()}
THEIR_EMBEDDINGS = {ours: theirs for theirs, ours in EMBEDDINGS.items()}

QUERIES = frozenset({"mask_query_QD", "context_query_QD"})
"""Ours, and no part of transformers' Q-Former."""


def match_qformer(
    source: Mapping[str, Tensor], qformer: MaskQFormer, origin: str, prefix: str = ""
) -> tuple[dict[str, Tensor], LoadReport]:
    """Renames the weights of transformers' `InstructBlipQFormerModel` to ours.

    Args:
        source: its state dict.
        qformer: the module that is to take them; only its names and shapes are read. Where it reads no instruction,
            the source's text parts have no place in it and are left out.
        origin: where the tensors come from, for the report.
        prefix: what stands before the source's names in its file; the report's names bear it.

    Returns:
        What fits by our names, the source's own tensors and not copies, and the report by the source's names. Where
        nothing surprises, that is everything in the module's state dict but the queries.
    """
    target = {name: tensor.shape for name, tensor in qformer.state_dict().items() if name not in QUERIES}
    reads_text = qformer.instruction is not None
    named = {name: our_name(name) for name in source}
    theirs_of = {ours: prefix + name for name, ours in named.items() if ours is not None}
    strangers = [
        name
        for name, ours in named.items()
        if ours not in target and (reads_text or ours is None or not _is_text(ours))
    ]
    theirs = {prefix + name: source[name] for name, ours in named.items() if ours in target}
    wanted = {theirs_of.get(ours) or prefix + their_name(ours): shape for ours, shape in target.items()}
    report = LoadReport.compare("Q-Former", origin, theirs, wanted, unplaced=[prefix + name for name in strangers])
    fitting = {
        ours: source[name]
        for name, ours in named.items()
        if ours is not None and ours in target and prefix + name not in report.reshaped
    }
    return fitting, report


def our_name(name: str) -> str | None:
    """From a tensor's name in transformers to ours; None for a name that is not known."""
    module, _, parameter = name.rpartition(".")
    if module in EMBEDDINGS:
        return f"{EMBEDDINGS[module]}.{parameter}"
    layer = re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)", module)
    if layer is None or layer[2] not in LAYER:
        return None
    return f"layers.{layer[1]}.{LAYER[layer[2]]}.{parameter}"


def their_name(ours: str) -> str:
    """From a tensor's name in ours to transformers'; the inverse of `our_name`.

    Raises:
        KeyError: it has none: a query.
    """
    module, _, parameter = ours.rpartition(".")
    layer = re.fullmatch(r"layers\.(\d+)\.(.+)", module)
    if layer is not None:
        return f"encoder.layer.{layer[1]}.{THEIR_LAYER[layer[2]]}.{parameter}"
    return f"{THEIR_EMBEDDINGS[module]}.{parameter}"


def _is_text(ours: str) -> bool:
    return ours.startswith("instruction.") or ".text_ffn." in ours
