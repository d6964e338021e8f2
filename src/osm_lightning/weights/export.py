"""A checkpoint as a folder to share: safetensors, config, tokenizers, the frozen parts' identity and a card.

The optimizer's state stays behind, and so do the frozen weights: who uses the folder needs the same ones, and is told
so when they differ.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from osm_lightning.batch import mode_names
from osm_lightning.data.text import BUILTIN
from osm_lightning.weights.checkpoint import Checkpoint, find_checkpoint, read_checkpoint, write_folder
from osm_lightning.weights.own_tokenizers import OWN, pointed, tokenizers_of


def export(ckpt: str, out: Path, half: bool = False) -> Checkpoint:
    """Writes a checkpoint's shareable form.

    Args:
        ckpt: a `.ckpt` file, a folder that was exported before, or `last`.
        out: the new folder.
        half: keep the tensors as float16, in half the bytes; a model that loads them computes in float32 again.

    Returns:
        What was written.

    Raises:
        ValueError: the checkpoint does not exist or is not one of ours, or the folder exists.
    """
    path = find_checkpoint(ckpt)
    checkpoint = read_checkpoint(path)
    if half:
        checkpoint = replace(checkpoint, tensors={name: tensor.half() for name, tensor in checkpoint.tensors.items()})
    try:
        config, tokenizers = pointed(checkpoint.config)
        checkpoint = replace(checkpoint, config=config)
        card = model_card(checkpoint, out) + scores_of(path)
    except (yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: its config is not that of a run of `osm fit` ({error!r}).") from error
    write_folder(checkpoint, out, card, tokenizers)
    return checkpoint


def model_card(checkpoint: Checkpoint, folder: Path, trained_on: str | None = None) -> str:
    """What the folder's README.md says.

    Args:
        checkpoint: its content.
        folder: where it will stand; the example names it.
        trained_on: on what, where it is not the sources of its config.
    """
    config = yaml.safe_load(checkpoint.config)
    model = config["model"]
    modes = mode_names(model["modes"])
    tensors = checkpoint.tensors.values()
    num_parameters, num_bytes = sum(tensor.numel() for tensor in tensors), sum(tensor.nbytes for tensor in tensors)
    frozen = "\n".join(
        f"| {part} | {_origin(model[part])} | `{identity}` |" for part, identity in checkpoint.frozen.items()
    )
    path = shlex.quote(str(folder))
    return f"""\
# {folder.name}

The trained parts of an OSM model, which names whatever is inside a segmentation mask, with no vocabulary given
(https://arxiv.org/abs/2311.08400). Made with osm_lightning; `config.yaml` is the config of the training run.

| | |
|---|---|
| weights | {num_parameters:,} parameters, {num_bytes:,} bytes (`model.safetensors`) |
| modes | {", ".join(modes)} |
| trained on | {trained_on or ", ".join(config["data"]["sources"])} |
| input | {model["vision"]["image_size_px"]} px in windows of {model["vision"]["window_size_px"]} px |{_adapters(model)}

## Frozen parts

{_whereabouts(model)}
exactly those it was made with; the identity (also in `frozen.json`) is compared when it is loaded.

| part | weights | identity |
|---|---|---|
{frozen}

Tokenizers: {"; ".join(_tokenizers(model))}.

## Use

```
osm predict --ckpt {path} --images IMAGES --masks MASKS --modes {",".join(modes)} --out NAMED
osm validate --ckpt {path}
```

```python
from osm_lightning import OSM

scene = OSM.from_pretrained({json.dumps(str(folder))}).encode("photo.jpg")
scene.name(masks, modes={json.dumps(modes)})  # bool[masks, height, width], or COCO RLE
```

Where the frozen weights lie elsewhere than the table says, add `--model.vision.name` (for an open_clip file
`--model.vision.pretrained`) or `--model.language.name`; in Python, `settings={{"model.vision.name": ...}}`.
"""


def _adapters(model: dict[str, Any]) -> str:
    """The table's rows on LoRA, where there is any."""
    parts = (("Q-Former", "qformer"), ("LLM", "language"))
    loras = [(part, (model.get(key) or {}).get("lora")) for part, key in parts]
    return "".join(
        f"\n| LoRA | rank {lora['rank']} beside the {part}'s {', '.join(lora['targets'])}; folded in by "
        "`osm weights merge` |"
        for part, lora in loras
        if lora is not None
    )


def _whereabouts(model: dict[str, Any]) -> str:
    """Which frozen parts the folder holds, and half a sentence more."""
    if str(model["language"]["name"]).startswith(OWN):
        return "The LLM is in this folder, with the adapters folded in; the vision tower is not. It works with"
    return "They are not in this folder, which works with"


def scores_of(path: Path) -> str:
    """The card's part on scores: those of the run's last validation, where the run's folder is at hand."""
    scores = path.parent.parent / "scores.json"
    if path.is_dir() or not scores.is_file():
        return ""
    content = json.loads(scores.read_text(encoding="utf-8"))
    lines = [
        f"| {row['dataset']} | {row['mode']} | {row['num_masks']} | {row['acc']:.4f} | {row['acc_strict']:.4f} | "
        f"{row['acc_balanced']:.4f} | {row['niv']:.4f} |"
        for row in content["scores"]
    ]
    table = "\n".join(lines)
    return f"""
## Scores

The run's last validation, after {content["step"]} steps, on the `val` splits of `config.yaml` (`osm validate` measures
them again):

| dataset | mode | masks | Acc | strict | balanced | NIV |
|---|---|---|---|---|---|---|
{table}
"""


def _tokenizers(model: dict[str, Any]) -> Iterator[str]:
    """What the card says of each tokenizer."""
    for part, _, name in tokenizers_of(model):
        of = "the LLM's" if part == "language" else "MaskQ-Former's"
        if name.startswith(OWN):
            yield f"{of} is in `{name.removeprefix(OWN)}/`"
        elif name.startswith(BUILTIN):
            yield f"{of} is made by osm_lightning (`{name}`)"
        else:
            yield f"{of} is not in this folder, but `{name}`"


def _origin(part: dict[str, Any]) -> str:
    """Where a frozen part's weights come from, in the config's own words."""
    if part["architecture"] is not None:
        return "random (sizes and seed are in config.yaml)"
    name, pretrained = part["name"], part.get("pretrained")
    if str(name).startswith(OWN):
        return f"`{name.removeprefix(OWN)}/` in this folder"
    return f"`{name}`" if pretrained is None else f"`{name}`, `{pretrained}`"
