"""`osm shards browse`: a page of sampled masks exactly as the model gets them, after augmentation.

The settings are the ones of `osm fit`, parsed by the same parser, but no model is built and no weights are read.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from osm_lightning.commands.browse_cards import replayed_cards, train_cards, val_cards
from osm_lightning.commands.browse_page import write_page

if TYPE_CHECKING:  # imports torch, which --help need not wait for
    from osm_lightning.data.module import OSMData

HELP = "Show sampled masks as the model gets them, on one HTML page."

DEFAULT_NUM = 40
MAX_NUM = 500
"""Images of a page at most."""

USAGE = """\
osm shards browse --config FILE [--config FILE]... [--section.setting VALUE]... --out PAGE.html
                         [--num N] [--epoch N | --val] [--key DATASET/KEY]"""

EPILOG = """\
--config FILE (any number, later ones win) and --section.setting VALUE are those of `osm fit`. No weights are read; the
tokenizers are. Where those are not at hand, look at the masks with --model.language.tokenizer builtin:512
--model.qformer.instruction_tokenizer null.

examples:
  osm shards browse --config configs/joint.yaml --config configs/model/tiny.yaml --config configs/data/scenes.yaml \\
                    --out page.html
  osm shards browse ... --val --out page.html
  osm shards browse ... --key scenes/train-0160 --epoch 2 --out page.html
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's own options. Words that the parser does not know are settings: `run` reads them."""
    parser.usage, parser.epilog = USAGE, EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, required=True, metavar="PAGE.html", help="the page; replaced if it exists")
    parser.add_argument(
        "--num",
        type=int,
        metavar="N",
        help=f"images (default: {DEFAULT_NUM}); with --key, passes of the epoch to replay (default: 1)",
    )
    parser.add_argument("--key", metavar="DATASET/KEY", help="replay one image: data source, and key within its shards")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--epoch", type=int, default=0, metavar="N", help="epoch to draw from, counted from 0 (default)")
    which.add_argument("--val", action="store_true", help="validation: whole images, all masks, the protocol's prompt")


def run(args: argparse.Namespace) -> int:
    """Writes the page.

    Args:
        args: the options of `add_arguments`, and as `settings` the words for the config's parser.

    Raises:
        ValueError: an option or a setting is not what it must be, or there is no such image.
    """
    num = args.num if args.num is not None else 1 if args.key else DEFAULT_NUM
    _check(args.out, num, args.epoch)
    data = read_data(args.settings)
    if args.val:
        cards = list(val_cards(data, num, args.key))
    elif args.key:
        cards = list(replayed_cards(data, args.epoch, args.key, num))
    else:
        cards = list(train_cards(data, args.epoch, num))
    if not cards:
        raise ValueError("there is nothing to show: no data source has a `val` split with images in it.")
    write_page(args.out, cards, _facts(data))
    num_masks = sum(len(card.masks) for card in cards)
    print(f"{args.out}: {len(cards)} images, {num_masks} masks, {args.out.stat().st_size / 1e6:.1f} MB")
    return 0


def _check(out: Path, num: int, epoch: int) -> None:
    if out.suffix != ".html" or out.is_dir():
        raise ValueError(f"--out is {out}, but must name a file that ends in .html: what is there is replaced.")
    if not 1 <= num <= MAX_NUM:
        raise ValueError(f"--num is {num}, but must be from 1 to {MAX_NUM}: browsers are slow to open a larger page.")
    if epoch < 0:
        raise ValueError(f"--epoch is {epoch}, but epochs are counted from 0.")


def read_data(settings: Sequence[str]) -> OSMData:
    """The data module of a config, without its model: fit's own parser hands the data what is the model's to say.

    Raises:
        ValueError: no config is named, or a setting of the data is out of its range.
    """
    if not any(word.split("=")[0] in {"--config", "-c"} for word in settings):
        raise ValueError("no --config is given, so there is no data. Name the configs that `osm fit` is given.")
    from jsonargparse import ArgumentParser, Namespace

    from osm_lightning.cli import OSMCLI
    from osm_lightning.data.module import OSMData
    from osm_lightning.training.task import OSMTask

    class DataOnly(OSMCLI):
        """Parses everything, and builds the data module alone."""

        def before_instantiate_classes(self) -> None:
            """Checks nothing: the model's parts may be missing."""

        def instantiate_classes(self) -> None:
            """Builds the data module from its part of the config, which parsing has completed."""
            parser = ArgumentParser(exit_on_error=False)
            parser.add_class_arguments(OSMData, "data")
            self.datamodule = parser.instantiate(Namespace(data=self.config.data)).data

    cli = DataOnly(
        OSMTask,
        OSMData,
        seed_everything_default=0,
        parser_kwargs={"prog": "osm shards browse", "usage": USAGE},
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
        args=list(settings),
        run=False,
    )
    data = cast("OSMData", cli.datamodule)
    data.num_workers = 0  # batches are made here, where they are looked at
    return data


def _facts(data: OSMData) -> list[tuple[str, str]]:
    """Settings that decide what is on the page."""
    view = data.view
    facts = [
        ("input", f"{view.image_size_px} px, patches of {view.patch_size_px} px"),
        ("context", str(view.context)),
        ("scale, training", f"{view.scale[0]} to {view.scale[1]}"),
        ("smallest mask, training", f"more than {view.min_mask_px} px"),
        ("masks per image", f"{data.masks_per_image} at most, training"),
        ("agnostic share", str(data.agnostic_share)),
        ("tokenizer", data.tokenizer),
        ("seed", str(data.seed)),
    ]
    return facts + [(key, f"{of.shards}, {of.train} / {of.val}") for key, of in data.sources.items()]
