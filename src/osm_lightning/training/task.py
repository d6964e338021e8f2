"""The LightningModule: what a step computes, what validation measures, what a checkpoint holds.

It decides nothing about the model or the data; it calls them in order and logs what comes out.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, cast

import lightning
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics import MeanMetric

from osm_lightning.batch import AGNOSTIC_NAME, FREE_TEXT, MaskBatch, NamedMask, validation_modes
from osm_lightning.data.module import OSMData
from osm_lightning.data.sample import generator
from osm_lightning.evaluation.naming import NamingAccuracy, ScoreRow
from osm_lightning.model.config import LanguageConfig, QFormerConfig, VisionConfig
from osm_lightning.model.osm import OSM, EncodedImages
from osm_lightning.naming.greedy import MAX_NEW_TOKENS, name_masks
from osm_lightning.training.clip_batches import ClipBatches
from osm_lightning.training.loss import group_loss
from osm_lightning.training.optim import OptimConfig, adamw, warmup_cosine
from osm_lightning.training.sharding import Sharding
from osm_lightning.training.strategies import register_strategies
from osm_lightning.weights.build import build_model
from osm_lightning.weights.checkpoint import CONTENT_KEY, PREFIX, Checkpoint, read_checkpoint
from osm_lightning.weights.trained import check_adapters, check_tensors, copy_into

register_strategies()


class OSMTask(lightning.LightningModule):
    """Trains the mask side of OSM, and names masks."""

    osm: OSM
    scores: nn.ModuleDict
    """Acc and NIV by `dataset/mode`, over all processes."""
    val_losses: nn.ModuleDict
    """Mean loss by dataset, over all processes."""
    config_text: str = ""
    """Resolved config of the run; whoever parsed it sets it, and checkpoints carry it."""
    trust_checkpoint: bool = False
    """Whether folders of parts may be unpickled that do not bear our marker; whoever parsed the command sets it."""

    def __init__(
        self,
        vision: VisionConfig,
        qformer: QFormerConfig,
        language: LanguageConfig,
        modes: list[str],
        optim: OptimConfig = OptimConfig(),
        weights: str | None = None,
        allow: list[str] | None = None,
        supervise_prompt: bool = False,
        sum_datasets: bool = False,
        named_modes: list[str] | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
        score_eos: bool = True,
        compile_blocks: bool = False,
    ) -> None:
        """Remembers the settings; nothing is loaded before `configure_model`.

        Args:
            vision: vision tower and input size.
            qformer: MaskQ-Former and its queries.
            language: LLM.
            modes: modes of the vocabularies, beside the agnostic one.
            optim: optimizer and schedule.
            weights: checkpoint to start the trained parts from. Modes that it lacks start as its agnostic one.
            allow: tensors of it, as patterns with * and ?, that may be missing (they start anew), unknown or of another
                shape, and `vision` or `language` if the frozen part may be another one than it was trained with; all
                else that does not fit ends the command. To go on with another LLM: [language, projection.*,
                modes.embedding].
            supervise_prompt: learn the prompt's tokens too (released behaviour); the paper's loss is on the answer.
            sum_datasets: the loss is the sum of the datasets' losses (released behaviour), and not their weighted mean.
            named_modes: modes in which validation and prediction name masks. None: a source's own mode and the
                agnostic one in validation, the agnostic one in prediction.
            max_new_tokens: ids per name at most.
            score_eos: whether the `score` in predictions.coco.json, which others rank by, includes the probability that
                the name ends (released: no).
            compile_blocks: have torch compile the blocks of all parts for training, but for naming.
        """
        super().__init__()
        self.vision, self.qformer, self.language, self.modes = vision, qformer, language, modes
        self.optim = optim
        self.weights, self.allow = weights, allow or []
        self.supervise_prompt, self.sum_datasets = supervise_prompt, sum_datasets
        self.named_modes, self.max_new_tokens, self.score_eos = named_modes, max_new_tokens, score_eos
        self.compile_blocks = compile_blocks
        self.scores = nn.ModuleDict()
        self.val_losses = nn.ModuleDict()
        self.score_rows: list[ScoreRow] = []

    # Building and checkpoints -------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Builds the model once, under the strategy's context, so that it can be sharded while it is loaded."""
        if hasattr(self, "osm"):
            return
        strategy = self.trainer.strategy
        sharding = strategy if isinstance(strategy, Sharding) else None
        shard = sharding.shard_block if sharding is not None and sharding.lockstep.together else None
        compiled = self.compile_blocks and self.trainer.state.fn == "fit"
        if compiled and sharding is not None:
            sharding.check_compiling()
        checkpoint = None if self.weights is None else read_checkpoint(self.weights, self.trust_checkpoint)
        parts = self.vision, self.qformer, self.language, self.modes
        fill = copy_into if sharding is None else sharding.fill
        osm = build_model(*parts, self._data.codec, checkpoint, shard, compiled, fill, self.allow)
        for report in osm.loads:
            rank_zero_info(report.line())
        if sharding is not None:
            osm.lockstep = sharding.lockstep
            self._data.in_step = osm.lockstep.together
            sharding.shard_model(osm)
        self.osm = osm
        # DDP: every process has loaded the frozen weights itself.
        trained = {name for name, _ in osm.trained()}
        self._ddp_params_and_buffers_to_ignore = [
            f"{PREFIX}{name}" for name, _ in osm.named_parameters() if name not in trained
        ]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leaves out the frozen parts, and adds the config and their identity."""
        kept = {PREFIX + name for name, _ in self.osm.kept()}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in kept}
        checkpoint[CONTENT_KEY] = {"config": self.config_text, "frozen": self.osm.frozen_identity()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Checks that exactly the trained parts arrive, and that the frozen ones are those it was trained with."""
        self.strict_loading = False
        tensors = {key.removeprefix(PREFIX): value for key, value in checkpoint["state_dict"].items()}
        content = Checkpoint(tensors, **checkpoint[CONTENT_KEY])
        # Rows are taken over as they stand; a run outside the command carries no config to compare with.
        if content.config and content.modes != self.osm.modes.names:
            raise ValueError(
                f"the checkpoint's modes are {', '.join(content.modes)}, but model.modes makes them "
                f"{', '.join(self.osm.modes.names)}: a run goes on with the modes that it began with. To start a new "
                "one from what was trained, give --model.weights instead of --ckpt."
            )
        check_adapters(self.osm, content)
        rank_zero_info(check_tensors(self.osm, content.tensors, content.frozen).line())

    # Training -----------------------------------------------------------------------------------------------------

    def on_train_batch_start(self, batch: MaskBatch, batch_index: int) -> None:
        """Seeds the step by its number, so that a resumed run has the dropout that a whole one has."""
        number = self.trainer.fit_loop.total_batch_idx
        torch.manual_seed(int(generator("step", self._data.seed, self.global_rank, number).integers(2**62)))

    def training_step(self, batch: MaskBatch, batch_index: int) -> Tensor:
        """Loss of one mixed batch; not a number, with a warning, if it is not finite.

        The gradient then is not a number either, an infinite loss may have a finite one, and `GradientGuard` has all
        ranks skip the step.
        """
        answers = self.osm(batch, supervise_prompt=self.supervise_prompt)
        loss = group_loss(answers, batch, self._weights(batch.datasets).to(self.device), self.sum_datasets)
        total = loss.total
        if not bool(total.isfinite()):
            warnings.warn(
                f"train/loss is {float(total.detach())} at step {self.global_step}, which is skipped: images "
                f"{', '.join(batch.keys)}.",
                stacklevel=2,
            )
            total = total * math.nan
        groups = [f"train/loss/{dataset}/{mode}" for dataset in batch.datasets for mode in (AGNOSTIC_NAME, "own")]
        present = loss.present_g.tolist()
        self.log_dict({name: loss.mean_g[g] for g, name in enumerate(groups) if present[g]})
        self.log("train/loss", total, prog_bar=True)
        return total

    def configure_callbacks(self) -> list[Callback]:
        """What clips after every batch, where the config asks for that."""
        return [ClipBatches()] if self.optim.clip == "batches" else []

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW, and a schedule that counts optimizer steps.

        Raises:
            ValueError: the run has no end that is known in steps.
        """
        optimizer = adamw(self.osm, self.optim)
        total_steps = self._total_steps()
        if math.isinf(total_steps):
            raise ValueError(
                "trainer.max_epochs is -1 and trainer.max_steps is not set, but the learning rate falls to the end of "
                "the run. Set one of them; trainer.max_time may stop the run before."
            )
        scheduler = warmup_cosine(optimizer, self.optim, int(total_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _total_steps(self) -> float:
        # Lightning's own estimate would make the training loader before a resumed run has its state back.
        epochs, steps, batches = self.trainer.max_epochs, self.trainer.max_steps, self._data.batches_per_epoch
        batches_per_step = self.trainer.accumulate_grad_batches
        by_batches = self.optim.horizon == "batches"
        per_epoch = batches if by_batches else math.ceil(batches / batches_per_step)
        by_epochs = math.inf if epochs in {None, -1} else per_epoch * epochs
        by_steps = math.inf if steps == -1 else steps * (batches_per_step if by_batches else 1)
        return min(by_epochs, by_steps)

    def _weights(self, datasets: Sequence[str]) -> Tensor:
        return torch.tensor([self._data.sources[name].weight for name in datasets])

    # Validation and prediction ------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Makes a metric for every (source, mode), and one for every source's loss."""
        if self.scores:
            return
        for name in self._data.val_names():
            vocabulary = self._data.labels(name).vocabulary
            if vocabulary is None:
                raise ValueError(
                    f"data.sources.{name} has no vocabulary, so that Acc means nothing. Set its `vocabulary`, or "
                    "set its `val` to null."
                )
            self.val_losses[name] = MeanMetric().to(self.device)
            for mode in self._modes_of(name):
                self.scores[f"{name}/{mode}"] = NamingAccuracy(vocabulary).to(self.device)

    def validation_step(self, batch: MaskBatch, batch_index: int, dataloader_idx: int = 0) -> None:
        """Names all masks of the batch's images and counts the right ones."""
        (dataset,) = batch.datasets
        if not batch.num_masks:
            self._keep_in_step(batch, self._modes_of(dataset), with_loss=True)
            return
        keep = batch.class_id_M != FREE_TEXT
        if not bool(keep.all()):
            raise ValueError(f"data.sources.{dataset}: a mask of image {batch.keys[0]} has no class to be measured by.")
        images = self.osm.encode(batch.images_I3SS)
        answers = self.osm(batch, images=images)
        nll = F.cross_entropy(answers.logits_PV, answers.target_P)
        cast("MeanMetric", self.val_losses[dataset]).update(nll, len(answers.target_P))
        named = self._name(batch, images, self._modes_of(dataset))
        for mode in self._modes_of(dataset):
            metric = cast("NamingAccuracy", self.scores[f"{dataset}/{mode}"])
            metric.update([mask.answers[mode].name for mask in named], batch.class_id_M)

    def on_validation_epoch_end(self) -> None:
        """Logs the loss of every source, and Acc, NIV and their companions for every (source, mode)."""
        for dataset, loss in self.val_losses.items():
            self.log(f"val/loss/{dataset}", cast("MeanMetric", loss).compute())
            cast("MeanMetric", loss).reset()
        self.score_rows = []
        for key, metric in self.scores.items():
            dataset, mode = key.split("/")
            values = cast("NamingAccuracy", metric).compute()
            cast("NamingAccuracy", metric).reset()
            self.score_rows.append(ScoreRow.of(dataset, mode, values))
            label = mode if mode == AGNOSTIC_NAME else "own" if mode == self._own_mode(dataset) else mode
            self.log_dict({f"val/{name}/{dataset}/{label}": value.float() for name, value in values.items()})
        if self.score_rows:
            mean = sum(row.acc for row in self.score_rows) / len(self.score_rows)
            self.log("val/acc", mean, prog_bar=True)

    on_test_epoch_start = on_validation_epoch_start
    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end

    def predict_step(self, batch: MaskBatch, batch_index: int) -> list[NamedMask]:
        """Names all masks of the batch's images."""
        modes = self.named_modes or [AGNOSTIC_NAME]
        if not batch.num_masks:
            self._keep_in_step(batch, modes, with_loss=False)
            return []
        return self._name(batch, self.osm.encode(batch.images_I3SS), modes)

    def _keep_in_step(self, batch: MaskBatch, modes: Sequence[str], with_loss: bool) -> None:
        """Where processes share the weights: calls all that the others call, on a made-up mask that counts nowhere."""
        if self.osm.lockstep.together:
            made_up = batch.made_up()
            images = self.osm.encode(made_up.images_I3SS)
            if with_loss:
                self.osm(made_up, images=images)
            self._name(made_up, images, modes)

    def _name(self, batch: MaskBatch, images: EncodedImages, modes: Sequence[str]) -> list[NamedMask]:
        codec = self._data.codec
        return name_masks(self.osm, images, batch, modes, codec.decode, codec.eos_ids, self.max_new_tokens)

    def _own_mode(self, dataset: str) -> str:
        return self._data.sources[dataset].mode or dataset

    def _modes_of(self, dataset: str) -> list[str]:
        return validation_modes(self._own_mode(dataset), self.osm.modes.names, self.named_modes)

    @property
    def _data(self) -> OSMData:
        return cast("OSMData", cast("Any", self.trainer).datamodule)
