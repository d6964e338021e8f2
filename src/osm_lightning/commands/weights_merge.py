"""The words of `osm weights merge`; the work is in `osm_lightning.weights.merge`."""

from __future__ import annotations

import argparse
from pathlib import Path

DESCRIPTION = """\
Folds the LoRA adapters of a checkpoint into its Q-Former, and into a copy of its LLM, and writes a checkpoint folder
without adapters. Where the LLM had some, the folder holds it (language/, as transformers reads it, with its tokenizer)
and takes as much disk as the LLM. It names as before, up to the rounding of the LLM's precision, and every command
takes it, wherever it is moved; the vision tower is needed as before. All parts of the model are loaded for it; adapters
that were trained beside 8 or 4 bits are folded into the weights that these were made of.
"""

EXAMPLE = """\
example:
  osm weights merge --ckpt last --out models/merged
  osm predict --ckpt models/merged --images IMAGES --masks MASKS --out NAMED
"""


def add_merge(subcommands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the subcommand."""
    parser = subcommands.add_parser(
        "merge",
        help="fold a checkpoint's LoRA adapters into what they are beside",
        description=DESCRIPTION,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--ckpt", required=True, metavar="CKPT", help="a checkpoint with adapters, or `last`")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the new folder")
    parser.set_defaults(run=_merge)


def _merge(args: argparse.Namespace) -> int:
    from osm_lightning.model.language import quiet_loading
    from osm_lightning.model.lora import is_adapter
    from osm_lightning.model_settings import settings_of
    from osm_lightning.weights.checkpoint import read_checkpoint
    from osm_lightning.weights.merge import check_mergeable, merge
    from osm_lightning.weights.own_tokenizers import LANGUAGE_FOLDER

    checkpoint = read_checkpoint(args.ckpt)
    check_mergeable(checkpoint, args.out)
    quiet_loading()
    found = settings_of(checkpoint, {"model.language.quantize": None})
    merged = merge(found.build(found.codec(), checkpoint), checkpoint, args.out)
    num_adapters = sum(map(is_adapter, checkpoint.tensors))
    where = "language/ and model.safetensors" if (args.out / LANGUAGE_FOLDER).exists() else "model.safetensors"
    print(
        f"{args.out}: {num_adapters} tensors of adapters are folded into {where}; it holds {len(merged.tensors)} others"
    )
    return 0
