"""OSM: a frozen vision tower, MaskQ-Former, a projection and a frozen LLM, put together (Sec. 3).

Composition only. Images are encoded once (`encode`); their masks are turned into tokens in any number of modes
(`mask_tokens`); the LLM reads them with the text (`forward` in training, `naming/` afterwards). No state is kept.
"""

# I images  M masks  S image side, px  N image tokens  Q queries per set  A all queries  L text ids  X LLM positions
# P supervised tokens  R masks that go through the LLM together  V LLM vocabulary  D Q-Former width  Z LLM width

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from osm_lightning.batch import MaskBatch
from osm_lightning.model.blocks import compile_block
from osm_lightning.model.config import LanguageConfig, QFormerConfig, VisionConfig
from osm_lightning.model.frozen import Shard
from osm_lightning.model.language import LanguageModel
from osm_lightning.model.load_report import LoadReport
from osm_lightning.model.lockstep import ALONE, Lockstep
from osm_lightning.model.modes import Modes
from osm_lightning.model.qformer import KeysValues, MaskQFormer
from osm_lightning.model.visibility import Grid, visibility
from osm_lightning.model.vision import VisionEncoder


@dataclass(frozen=True, slots=True)
class EncodedImages:
    """What masks need of their images: keys and values of every Q-Former layer that looks at them."""

    keys_values: list[KeysValues | None]

    def part(self, images: slice) -> EncodedImages:
        """Some of the images; nothing is copied."""
        return EncodedImages([layer and KeysValues(*(of_I[images] for of_I in layer)) for layer in self.keys_values])


class AnswerLogits(NamedTuple):
    """Predictions of the supervised tokens, and nothing of the others. A tuple: engines look for tensors in it."""

    logits_PV: Tensor
    """float32[P, V]."""
    target_P: Tensor
    """int64[P], the ids that are to be predicted."""
    mask_index_P: Tensor
    """int64[P], the mask that each belongs to."""


class OSM(nn.Module):
    """Names the content of masks."""

    loads: list[LoadReport]
    """What was loaded into its parts; whoever loads into it adds to them."""
    lockstep: Lockstep = ALONE
    """How processes that share these weights stay together; whoever shards them sets it."""

    def __init__(
        self,
        vision: VisionConfig,
        qformer: QFormerConfig,
        language: LanguageConfig,
        modes: Sequence[str],
        shard: Shard | None = None,
        compiled: bool = False,
    ) -> None:
        """Builds all parts and loads the frozen ones.

        Args:
            vision: vision tower and input size.
            qformer: MaskQ-Former and its queries.
            language: LLM.
            modes: modes of the vocabularies, beside the agnostic one.
            shard: called with every block of the frozen parts once it is loaded, so that no process holds all of them.
            compiled: have torch compile the blocks of all parts.

        Raises:
            ValueError: weights are missing, or sizes don't fit.
        """
        super().__init__()
        self.vision = VisionEncoder(vision, shard)
        self.qformer = MaskQFormer(qformer, self.vision.width)
        self.language = LanguageModel(language, shard, compiled)
        reports = self.vision.tower.report, self.language.report
        self.loads = [report for report in reports if report is not None]
        self.projection = nn.Linear(qformer.width, self.language.width)
        self.modes = Modes(modes, qformer.width, self.language.width)
        if not qformer.mode_query:
            self.modes.requires_grad_(False)
        self._start_among_words()
        self.grid = Grid.of(vision)
        if compiled:
            for block in self.vision.tower.blocks():
                compile_block(block, for_gradients_only=False)
            for layer in self.qformer.layers:
                compile_block(layer, for_gradients_only=True)

    @torch.no_grad()
    def _start_among_words(self) -> None:
        """Lets mask tokens start where the LLM expects words: around its mean embedding, with its embeddings' spread.

        The released model takes over InstructBLIP's projection; from scratch torch's default makes tokens several
        times as long as any word, to which the LLM hardly reacts.
        """
        words_VZ = self.language.word_embeddings()
        self.projection.bias.copy_(words_VZ.mean(0))
        self.projection.weight.normal_(std=float(words_VZ.std(0).mean()) / self.projection.in_features**0.5)

    def encode(self, images_I3SS: Tensor) -> EncodedImages:
        """uint8[I, 3, S, S] -> what any number of masks of these images need."""
        return EncodedImages(self.qformer.image_keys_values(self.vision(images_I3SS, self.lockstep)))

    def mask_tokens(self, images: EncodedImages, batch: MaskBatch) -> Tensor:
        """What the LLM reads of each mask, before the text.

        Args:
            images: what `encode` made of the batch's images.
            batch: masks, modes and instructions.

        Returns:
            float[M, Q + 1, Z], projected mask tokens, then the mode's embedding (where there are modes).
        """
        config = self.qformer.config
        query_MD, mode_MZ = self.modes(batch.mode_M)
        hidden_MAD = self.qformer(
            query_MD if config.mode_query else None,
            images.keys_values,
            batch.image_index_M,
            visibility(batch.coverage_MGG, batch.context_box_px_M4, self.grid, config),
            batch.instruction_ids_MT,
            batch.instruction_tokens_M,
        )
        tokens_MQZ = self.projection(hidden_MAD[:, : config.num_queries])
        if not config.mode_query:
            return tokens_MQZ
        return torch.cat([tokens_MQZ, mode_MZ.unsqueeze(1).to(tokens_MQZ.dtype)], dim=1)

    def forward(
        self, batch: MaskBatch, supervise_prompt: bool = False, images: EncodedImages | None = None
    ) -> AnswerLogits:
        """Predicts every mask's answer, given its image, mask, mode and prompt.

        Args:
            batch: masks with prompt and answer.
            images: what `encode` made of the batch's images, where it is at hand.
            supervise_prompt: predict the prompt's tokens too (released behaviour), but for a text's first id, which is
                BOS where the tokenizer has one; the paper's loss is on the answer.

        Returns:
            Logits of the supervised tokens: answer and EOS, mask by mask.
        """
        prefix_MQZ = self.mask_tokens(images or self.encode(batch.images_I3SS), batch)
        num_groups = self.language.config.length_groups
        tokens_M = batch.text_tokens_M
        order_M = tokens_M.argsort() if num_groups > 1 else torch.arange(len(tokens_M), device=tokens_M.device)
        groups = order_M.chunk(num_groups)
        made_up = [order_M[:1]] * (self.lockstep.most(len(groups)) - len(groups))
        parts = [self._answer_logits(prefix_MQZ, batch, rows, supervise_prompt) for rows in (*groups, *made_up)]
        return AnswerLogits(*(torch.cat(column) for column in zip(*parts[: len(groups)], strict=True)))

    def _answer_logits(
        self, prefix_MQZ: Tensor, batch: MaskBatch, rows_R: Tensor, supervise_prompt: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, targets and mask indices of some masks (R), whose texts are cut to the longest among them."""
        tokens_R = batch.text_tokens_M[rows_R]
        ids_RL = batch.text_ids_ML[rows_R, : int(tokens_R.max())]
        text_RLZ = self.language.embed(ids_RL)
        hidden_RXZ = self.language.hidden(torch.cat([prefix_MQZ[rows_R].to(text_RLZ.dtype), text_RLZ], dim=1))
        position_L = torch.arange(ids_RL.shape[1], device=ids_RL.device)
        first_R = torch.ones_like(tokens_R) if supervise_prompt else batch.prompt_tokens_M[rows_R]
        supervised_RL = (position_L >= first_R[:, None]) & (position_L < tokens_R[:, None])
        row_P, text_index_P = supervised_RL.nonzero(as_tuple=True)
        # The token at text position t is predicted from the position before it.
        before_P = prefix_MQZ.shape[1] + text_index_P - 1
        return self.language.logits(hidden_RXZ[row_P, before_P]), ids_RL[row_P, text_index_P], rows_R[row_P]

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters of what is trained: position, queries, Q-Former, modes, projection, adapters."""
        return ((name, p) for name, p in self.named_parameters() if p.requires_grad)

    def kept(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters of what a checkpoint holds: what is trained, and all of a Q-Former beside adapters."""
        return ((name, p) for name, p in self.named_parameters() if p.requires_grad or name.startswith("qformer."))

    def kept_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and whole shapes of that, also where this process holds a part; ZeRO-3 keeps them beside."""
        return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in self.kept()}

    def frozen_identity(self) -> dict[str, str]:
        """Fingerprints of the frozen parts as loaded, so that a checkpoint can tell whether it meets the same ones."""
        return {"vision": self.vision.identity, "language": self.language.identity}
