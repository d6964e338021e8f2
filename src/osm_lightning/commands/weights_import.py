"""The words of `osm weights import`; the work is in `osm_lightning.weights.instructblip_import`."""

from __future__ import annotations

import argparse
from pathlib import Path

DESCRIPTION = """\
Makes a checkpoint folder of an InstructBLIP as the hub has it (safetensors or pytorch_model*.bin, config.json, its
tokenizer and qformer_tokenizer/), with the authors' osm_final.pt over it where --released gives it. Sizes are read from
the files. The folder holds what is trained, and refers to InstructBLIP for what is frozen: that must stay where it is.
Every tensor that is missing, unexpected or of another shape is an error, unless --allow names it. Files are read as
plain tensors; code in them is never run.
"""

EXAMPLE = """\
examples:
  osm weights import --instructblip weights/instructblip-vicuna-7b --released osm_final.pt --out models/released
      the released model: `osm predict --ckpt models/released --modes any,coco ...` gives the released names
  osm weights import --instructblip weights/instructblip-vicuna-7b --out models/start
      what the paper's training starts from: `osm fit --ckpt models/start`
"""


def add_import(subcommands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the subcommand."""
    parser = subcommands.add_parser(
        "import",
        help="make a checkpoint of InstructBLIP and the released osm_final.pt",
        description=DESCRIPTION,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--instructblip", required=True, metavar="DIR_OR_ID", help="InstructBLIP's folder or hub id")
    parser.add_argument("--released", type=Path, metavar="FILE", help="the authors' checkpoint, osm_final.pt")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the new folder")
    parser.add_argument(
        "--modes", metavar="A,B", help="modes beside the agnostic one, without --released (default: the paper's six)"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float16",
        help="precision of the frozen parts in use (default: %(default)s, as released; float32 is the paper's)",
    )
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="NAME_PATTERN",
        help="let tensors of these names be missing, unexpected or of another shape; with * and ?, repeatable",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of what is random (default: %(default)s)")
    parser.set_defaults(run=_import)


def _import(args: argparse.Namespace) -> int:
    from osm_lightning.datasets import DATASETS
    from osm_lightning.model.language import quiet_loading
    from osm_lightning.model.load_report import report_table
    from osm_lightning.weights.instructblip_import import import_model

    if args.modes is not None and args.released is not None:
        raise ValueError("--modes has no place beside --released, whose checkpoint brings its own. Leave it out.")
    quiet_loading()
    modes = tuple(DATASETS) if args.modes is None else tuple(filter(None, args.modes.split(",")))
    done = import_model(
        args.instructblip,
        args.out,
        args.released,
        modes=modes,
        dtype=args.dtype,
        allow=args.allow,
        seed=args.seed,
    )
    print(report_table(done.reports))
    num_bytes = sum(tensor.nbytes for tensor in done.checkpoint.tensors.values())
    num_tensors = len(done.checkpoint.tensors)
    print(f"{args.out}: {num_tensors} tensors, {num_bytes / 1e6:.1f} MB; its README.md says what they are")
    return 0
