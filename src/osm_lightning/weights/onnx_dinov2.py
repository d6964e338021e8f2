"""From an ONNX file with a DINOv2 backbone in it to a Hugging Face `Dinov2Model` folder.

The exporter kept the names of biases, norms and the patch projection, but folded every linear weight into a transposed
constant without a name, and cut the position embedding in two. Both are recovered from the graph and from shapes, never
from the exporter's running numbers. Whatever is not the backbone is left out. torch, transformers and onnx are imported
in the functions, because the table of fetchable parts must load without them.
"""

# Shape letters: E vision width   P patch positions

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from math import isqrt
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from onnx import GraphProto
    from transformers import Dinov2Config

Array = NDArray[np.float32]

PREFIX = "backbone."
"""What the exporter's names of the backbone begin with."""

RENAMED = (
    (".attention.attention.query.", ".attention.q_proj."),
    (".attention.attention.key.", ".attention.k_proj."),
    (".attention.attention.value.", ".attention.v_proj."),
    (".attention.output.dense.", ".attention.o_proj."),
)
"""Transformers' names at the time of the export, and since its version 5."""

SIZING = (
    "embeddings.cls_token",
    "embeddings.patch_embeddings.projection.weight",
    "encoder.layer.0.mlp.fc1.weight",
)
"""The weights whose shapes tell the config."""

HEAD_CHANNELS = 64
"""Channels of an attention head, the same in every size of DINOv2."""

PREPROCESSING = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "rescale_factor": 1 / 255}
"""ImageNet's mean and standard deviation (RGB), as DINOv2 and the detector around this backbone use them."""


def convert(source: Path, out: Path) -> None:
    """Writes config, weights and pixel normalisation so that `Dinov2Model.from_pretrained` takes them.

    Args:
        source: the ONNX file.
        out: an existing folder.

    Raises:
        ValueError: the file has no DINOv2 backbone, or names of the model have no weight and the reverse.
    """
    import onnx
    import torch
    from transformers import Dinov2Model

    state = backbone_state(onnx.load(source).graph)
    model = Dinov2Model(_config(state))
    missing, unexpected = model.state_dict().keys() - state.keys(), state.keys() - model.state_dict().keys()
    if missing or unexpected:
        raise ValueError(
            f"{source.name} is not a Dinov2Model: {len(missing)} weights are missing ({_examples(missing)}) and "
            f"{len(unexpected)} have no place ({_examples(unexpected)}). Use the file that the table names."
        )
    model.load_state_dict({name: torch.tensor(value) for name, value in state.items()})
    model.save_pretrained(out)
    (out / "preprocessor_config.json").write_text(json.dumps(PREPROCESSING, indent=2) + "\n", encoding="utf-8")


def backbone_state(graph: GraphProto) -> dict[str, Array]:
    """The backbone's weights under the names of `Dinov2Model`.

    Raises:
        ValueError: the graph has no backbone, or its position embedding cannot be told.
    """
    from onnx import numpy_helper

    constants: dict[str, Array] = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    weights = _linear_weights(graph, constants.keys())
    state = {name: value for name, value in constants.items() if name.startswith(PREFIX)}
    state |= {name: constants[anonymous].T for name, anonymous in weights.items()}
    named = {_renamed(name.removeprefix(PREFIX)): value for name, value in state.items()}
    lacking = [name for name in SIZING if name not in named]
    if lacking:
        raise ValueError(
            f"the ONNX graph has no {PREFIX}{lacking[0]}, so that it is no DINOv2 backbone or was exported otherwise. "
            "Use the file that the table names."
        )
    named["embeddings.position_embeddings"] = _positions(constants, width=named["embeddings.cls_token"].shape[-1])
    return named


def _linear_weights(graph: GraphProto, constants: Collection[str]) -> dict[str, str]:
    """From the name of each linear weight of the backbone to its anonymous constant, through the bias added after."""
    bias_after: dict[str, str] = {}
    for node in graph.node:
        if node.op_type == "Add":
            bias = next((name for name in node.input if name in constants and name.endswith(".bias")), None)
            bias_after |= {name: bias for name in node.input if bias and name != bias}
    weights = {}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in constants:
            bias = bias_after.get(node.output[0])
            if bias and bias.startswith(PREFIX):
                weights[bias.removesuffix("bias") + "weight"] = node.input[1]
    return weights


def _positions(constants: Mapping[str, Array], width: int) -> Array:
    """float32[1, 1 + P, E], the class token's position, then the patches', which the exporter keeps apart."""
    parts = [
        value
        for name, value in constants.items()
        if not name.startswith(PREFIX) and value.ndim == 3 and value.shape[::2] == (1, width)
    ]
    parts.sort(key=lambda value: value.shape[1])
    if [value.shape[1] == 1 for value in parts] != [True, False] or isqrt(parts[1].shape[1]) ** 2 != parts[1].shape[1]:
        raise ValueError(
            f"the ONNX graph's constants of {width} channels have shapes {[value.shape for value in parts]}, but a "
            f"position embedding is one of [1, 1, {width}] and one of [1, square, {width}]. Use the file that the "
            "table names."
        )
    return np.concatenate(parts, axis=1)


def _config(state: Mapping[str, Array]) -> Dinov2Config:
    from transformers import Dinov2Config

    width, _, _, patch_px = state["embeddings.patch_embeddings.projection.weight"].shape
    grid = isqrt(state["embeddings.position_embeddings"].shape[1] - 1)
    return Dinov2Config(
        hidden_size=width,
        num_hidden_layers=sum(name.endswith("mlp.fc1.weight") for name in state),
        num_attention_heads=width // HEAD_CHANNELS,
        mlp_ratio=state["encoder.layer.0.mlp.fc1.weight"].shape[0] // width,
        patch_size=patch_px,
        image_size=grid * patch_px,
        use_mask_token=False,  # a token of DINOv2's own pre-training, which no export has
    )


def _renamed(name: str) -> str:
    for old, new in RENAMED:
        name = name.replace(old, new)
    return name


def _examples(names: Collection[str]) -> str:
    return ", ".join(sorted(names)[:5]) or "none"
