"""The model as a checkpoint and its config describe it, ready for whoever trains it or asks it."""

from __future__ import annotations

from collections.abc import Sequence

from osm_lightning.data.text import TextCodec
from osm_lightning.model.config import LanguageConfig, QFormerConfig, VisionConfig
from osm_lightning.model.frozen import Shard
from osm_lightning.model.osm import OSM
from osm_lightning.weights.checkpoint import Checkpoint
from osm_lightning.weights.trained import Fill, copy_into, load_trained


def build_model(
    vision: VisionConfig,
    qformer: QFormerConfig,
    language: LanguageConfig,
    modes: Sequence[str],
    codec: TextCodec,
    checkpoint: Checkpoint | None = None,
    shard: Shard | None = None,
    compiled: bool = False,
    fill: Fill = copy_into,
    allow: Sequence[str] = (),
) -> OSM:
    """Builds the model, loads its frozen parts and takes the trained ones over.

    Args:
        vision: vision tower and input size.
        qformer: MaskQ-Former and its queries.
        language: LLM.
        modes: modes of the vocabularies, beside the agnostic one.
        codec: the tokenizers that its texts will come from.
        checkpoint: the trained parts; None leaves them as they are drawn.
        shard: called with every block of the frozen parts once it is loaded.
        compiled: have torch compile the blocks of all parts.
        fill: puts a trained tensor into its parameter, which `shard` may have shared out.
        allow: patterns of trained tensors that are let through although they don't fit.

    Raises:
        ValueError: weights are missing, sizes or tokenizers don't fit, or the checkpoint is of another model.
    """
    model = OSM(vision, qformer, language, modes, shard, compiled)
    check_tokenizers(model, codec)
    if checkpoint is not None:
        model.loads.append(load_trained(model, checkpoint, fill, allow))
    return model


def check_tokenizers(model: OSM, codec: TextCodec) -> None:
    """Checks that the model has a row for every id that the tokenizers give.

    Raises:
        ValueError: it has not.
    """
    qformer = model.qformer.config
    if qformer.instruction_tokenizer and codec.instruction_vocabulary > qformer.instruction_vocabulary:
        raise ValueError(
            f"model.qformer.instruction_vocabulary is {qformer.instruction_vocabulary}, but "
            f"{qformer.instruction_tokenizer} has {codec.instruction_vocabulary} ids: set it to that."
        )
    if codec.language_vocabulary > model.language.vocabulary_size:
        raise ValueError(
            f"the tokenizer has {codec.language_vocabulary} ids, but the LLM's vocabulary holds "
            f"{model.language.vocabulary_size}: they don't belong together. Set model.language.tokenizer."
        )
