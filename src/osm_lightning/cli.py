"""`osm fit | validate | test | predict`: Lightning's CLI, with checkpoints that bring their own config.

Settings come from YAML files that stack and from `--section.name value`; this file adds what belongs to one call (the
run's folder, the checkpoint, images and masks), links settings that must agree, and names everything that is missing
before anything slow begins.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from osm_lightning.batch import AGNOSTIC_NAME, MODE_ALIASES, mode_index, mode_names
from osm_lightning.checkpoint_words import default_run, with_checkpoint
from osm_lightning.data.module import OSMData
from osm_lightning.evaluation.prediction_journal import PredictionJournal
from osm_lightning.evaluation.segments import read_segments
from osm_lightning.expectation import Expectation, add_expected
from osm_lightning.missing_parts import refuse_missing
from osm_lightning.model.language import quiet_loading
from osm_lightning.model_settings import LINKS, language_tokenizer
from osm_lightning.training.callbacks import KeepConfig, Throughput, WriteScores, checkpoints, set_aside
from osm_lightning.training.cluster import check_port, check_tasks, label_messages, meeting, told_once
from osm_lightning.training.engine_state import SavesTogether, WholeFiles, WritesBeside
from osm_lightning.training.guards import GradientGuard
from osm_lightning.training.interrupt import Interrupt, do_not_listen
from osm_lightning.training.task import OSMTask
from osm_lightning.training.watch import WatchRanks
from osm_lightning.training.write_predictions import WritePredictions, naming_plan

TRAINER_DEFAULTS: dict[str, Any] = {
    "max_epochs": 1,  # an epoch is a number of masks (data.masks_per_epoch)
    "gradient_clip_val": 1.0,
    "log_every_n_steps": 10,
    "num_sanity_val_steps": 0,  # naming with untrained weights runs to the token limit: slow, and shows nothing
    "use_distributed_sampler": False,  # the data splits itself by rank, without repeating masks
}


def split_at_commas(text: str | list[str]) -> list[str]:
    """A list written as `a,b`."""
    return text if isinstance(text, list) else [part.strip() for part in text.split(",") if part.strip()]


class OSMCLI(LightningCLI):
    """Lightning's CLI for OSMTask and OSMData."""

    exit_code = 0
    """The command's, where it came to its end."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Links what must agree."""
        for source, target in LINKS:
            parser.link_arguments(source, target)
        parser.link_arguments(
            ("model.language.tokenizer", "model.language.name"), "data.tokenizer", compute_fn=language_tokenizer
        )
        parser.link_arguments("seed_everything", "data.seed")

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Trainer's methods, and those of their arguments that are not settings here."""
        hidden = {"model", "dataloaders", "datamodule", "ckpt_path", "weights_only"}
        return {
            "fit": hidden | {"train_dataloaders", "val_dataloaders"},
            "validate": hidden | {"verbose"},
            "test": hidden | {"verbose"},
            "predict": hidden | {"return_predictions"},
        }

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses the words that `main` was given."""
        self.config = parser.parse_args(args)

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        # The generated usage is a hundred lines, which would stand before every message.
        parser.usage = f"osm {subcommand} [--ckpt CKPT] [--config FILE]... [--section.setting VALUE]..."
        resume = subcommand == "fit"
        parser.add_argument(
            "--ckpt",
            type=str | None,
            default=None,
            help="checkpoint to go on from (with optimizer and step), or `last`; `auto`: the last one in this run's "
            "folder, or a start where there is none"
            if resume
            else "checkpoint whose trained parts and config are used: a .ckpt file, a folder of parts (DeepSpeed, "
            "FSDP2), an exported folder, or `last`",
        )
        parser.add_argument(
            "--trust_checkpoint",
            type=bool,
            default=False,
            help="open a folder of parts that does not bear our osm.json: the code in its files is run",
        )
        if resume:
            parser.add_argument(
                "--async_save",
                type=bool,
                default=False,
                help="write checkpoints beside training; for trainer.strategy auto and ddp",
            )
        if subcommand != "predict":
            parser.add_argument(
                "--run", type=str | None, default=None, help="folder of this run (default: runs/DATE-TIME)"
            )
            if subcommand == "validate":
                add_expected(parser)
            return parser
        parser.add_argument("--images", type=Path, required=True, help="an image, or a folder of images")
        parser.add_argument(
            "--masks",
            type=Path,
            required=True,
            help="COCO panoptic JSON, COCO JSON, list of RLE or polygons (SAM), or folder MASKS/<image>/<id>.png",
        )
        parser.add_argument(
            "--modes", type=split_at_commas, default=[AGNOSTIC_NAME], help="modes to name in, as `agnostic,coco`"
        )
        parser.add_argument("--out", type=Path, required=True, help="folder for names and pictures")
        return parser

    def before_instantiate_classes(self) -> None:
        """Refuses what cannot work, before torch builds anything."""
        self.options = self.config[self.subcommand]
        check_tasks(self.options.trainer)
        if self.subcommand == "predict":
            self._check_prediction()
        if self.subcommand == "validate":
            self.expectation = Expectation(self.options)
        refuse_missing(self.options, with_shards=self.subcommand != "predict")

    def _check_prediction(self) -> None:
        options = self.options
        options.modes = list(dict.fromkeys(MODE_ALIASES.get(mode, mode) for mode in options.modes))
        if not options.modes:
            raise ValueError(f"--modes names no mode. Name some of {', '.join(mode_names(options.model.modes))}.")
        for mode in options.modes:
            mode_index(mode, mode_names(options.model.modes))
        self.segments = read_segments(options.images, options.masks)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Adds loggers, checkpoints and callbacks that every run has."""
        if self.subcommand == "predict":
            kwargs |= {"logger": False}
            trainer = super().instantiate_trainer(**kwargs)
            plan, journal = partial(naming_plan, self.segments, self.options), PredictionJournal(self.options.out)
            self.writing = WritePredictions(self.segments, journal, plan, self.options.model.score_eos)
            trainer.callbacks.append(self.writing)
            return trainer
        self.run_folder = Path(self.options.run or default_run())
        given = self.config_init[self.subcommand].trainer
        if given.logger is None:
            set_aside(self.run_folder / "metrics.csv")
            kwargs["logger"] = [
                make(str(self.run_folder), name="", version="") for make in (CSVLogger, TensorBoardLogger)
            ]
        kwargs["default_root_dir"] = str(self.run_folder)
        trainer = super().instantiate_trainer(**kwargs)
        trainer.callbacks.append(WriteScores(self.run_folder))
        if self.subcommand == "fit":
            optim = self.options.model.optim
            trainer.callbacks += [Throughput(), GradientGuard(optim.max_skipped_in_row, optim.spike_factor)]
            if trainer.loggers:
                trainer.callbacks.append(LearningRateMonitor("step"))
            if not trainer.fast_dev_run:
                interrupt = Interrupt(self.run_folder / "checkpoints" / "last.ckpt")
                interrupt.listen()
                trainer.callbacks.append(interrupt)
        # Lightning wants checkpoint callbacks last.
        trainer.callbacks.sort(key=lambda callback: isinstance(callback, ModelCheckpoint))
        return trainer

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Any]) -> Trainer:
        own = config.get("callbacks") or []
        if self.subcommand == "fit" and not any(isinstance(callback, ModelCheckpoint) for callback in own):
            folder = self.run_folder / "checkpoints"
            callbacks = [*callbacks, *checkpoints(folder)]
        files: CheckpointIO = WholeFiles(self.options.trust_checkpoint)
        if self.subcommand == "fit" and self.options.async_save:
            files = WritesBeside(files)
        plugins = config.get("plugins") or []
        config["plugins"] = [*(plugins if isinstance(plugins, list) else [plugins]), files]
        try:
            trainer = super()._instantiate_trainer(config, [WatchRanks(), *callbacks])
        except (ImportError, MisconfigurationException, TypeError, ValueError) as error:
            raise ValueError(
                f"the settings under `trainer` make no trainer here: {error} configs/trainer/ has what runs on a CPU, "
                "a GPU and many."
            ) from error
        if isinstance(files, WritesBeside) and isinstance(trainer.strategy, SavesTogether):
            raise ValueError(
                f"--async_save is for one file that one process writes, but trainer.strategy "
                f"{type(trainer.strategy).__name__} writes a folder with all of them. Leave it out, or use "
                "trainer.strategy ddp."
            )
        check_port(trainer)
        do_not_listen(trainer)
        return trainer

    def instantiate_classes(self) -> None:
        """Tells the task what belongs to the call."""
        super().instantiate_classes()
        self.model.trust_checkpoint = self.options.trust_checkpoint

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        if subcommand == "fit":
            kwargs["ckpt_path"] = self.options.ckpt
            kwargs["weights_only"] = True
        elif subcommand == "predict":
            kwargs["return_predictions"] = False
        else:
            kwargs["verbose"] = False
        return kwargs

    def before_predict(self) -> None:
        """Hands the modes over."""
        self.model.named_modes = self.options.modes

    def after_predict(self) -> None:
        """Says where the names are."""
        if not self.trainer.is_global_zero:
            return
        num_named, num_images = self.writing.num_named, len(self.segments)
        if num_named < num_images:
            print(f"named {num_named} of {num_images} images; the same command without limits names the rest.")
            return
        skipped = self.segments.num_images_without_masks
        note = f" ({skipped} images without masks were skipped)" if skipped else ""
        print(f"named the masks of {len(self.segments)} images{note}: {self.options.out}/predictions.jsonl, overlay/")

    def after_fit(self) -> None:
        """Says where the run is."""
        if self.trainer.is_global_zero and not self.trainer.fast_dev_run:
            print(f"run folder: {self.run_folder} (checkpoints/last.ckpt, metrics.csv, config.yaml)")

    def after_validate(self) -> None:
        """Says where the scores are.

        Raises:
            ValueError: nothing was validated.
        """
        if not self.model.score_rows:
            raise ValueError("nothing was validated: no source has a `val` split, or trainer limits its batches to 0.")
        if self.trainer.is_global_zero:
            print(f"scores: {self.run_folder}/scores.json")
            self.exit_code = self.expectation.report(self.model.score_rows) if self.subcommand == "validate" else 0

    after_test = after_validate


def main(argv: list[str]) -> int:
    """Runs `osm ARGV` and returns its exit code.

    Raises:
        ValueError: what the user can mend.
    """
    quiet_loading()
    label_messages()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        with meeting(), told_once():
            return OSMCLI(
                OSMTask,
                OSMData,
                save_config_callback=KeepConfig,
                seed_everything_default=0,
                trainer_defaults=TRAINER_DEFAULTS,
                parser_kwargs={"prog": "osm"},
                auto_configure_optimizers=False,
                load_from_checkpoint_support=False,
                args=with_checkpoint(argv),
            ).exit_code
    except SystemExit as stopped:
        if isinstance(stopped.__context__, KeyboardInterrupt):  # Lightning makes it exit code 1
            raise stopped.__context__ from None
        raise
