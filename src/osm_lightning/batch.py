"""What crosses the borders between modules: one image's masks, one step's masks, one mask's name.

Plain frozen dataclasses of tensors. Nothing here computes anything but a batch's own layout, and nothing knows
where the pixels came from or what will read them.
"""

# Shape letters: I images  M masks  K masks of one image  S image side, px  G patch-grid side  T instruction ids
# L text ids (prompt, answer, EOS)

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

AGNOSTIC = 0
"""Index of the vocabulary-agnostic mode in every list of modes."""

AGNOSTIC_NAME = "agnostic"
"""Name of that mode."""

MODE_ALIASES = {"any": AGNOSTIC_NAME}
"""Other names of modes: the released code calls the agnostic one `any`."""

FREE_TEXT = -1
"""Class id of a mask whose name is free text and belongs to no vocabulary."""


PADDING = ""
"""Key of an empty image that only fills up a batch, so that processes that share weights have as many each."""


@dataclass(frozen=True, slots=True)
class MaskSample:
    """K masks of one image, after the geometry has been drawn and the text chosen.

    A mask is not a picture here: it is the share that it has of every patch, and its context box. That is all the
    model reads of it, and 1/196 of the pixels at a patch size of 14.
    """

    key: str
    """Key of the image in its shard."""
    dataset: str
    """Name of the data source."""
    image_3SS: Tensor
    """uint8[3, S, S], RGB, padded right and bottom with zeros. A pixel's channels lie together in memory."""
    coverage_KGG: Tensor
    """float16[K, G, G], share of each patch that the mask covers, in [0, 1]."""
    context_box_px_K4: Tensor
    """int32[K, 4], x0, y0, x1, y1 (both ends included) of the mask's box, enlarged by the context ratio."""
    mask_ids: tuple[str, ...]
    """Id of each mask within its image."""
    class_ids: tuple[int, ...]
    """Class of each mask in its dataset's vocabulary, or FREE_TEXT."""
    text_ids: tuple[tuple[int, ...], ...]
    """LLM ids of each mask: prompt, then answer and EOS."""
    prompt_tokens: tuple[int, ...]
    """How many of each mask's text ids are the prompt."""
    instruction_ids: tuple[tuple[int, ...], ...]
    """Q-Former ids of each mask's instruction; empty where the Q-Former takes none."""
    num_vanished: int = 0
    """Masks that were looked at and that the geometry left too few pixels of."""

    @property
    def num_masks(self) -> int:
        """Number of masks K."""
        return len(self.mask_ids)

    def with_vanished(self, num_vanished: int) -> MaskSample:
        """The same sample, with the number of masks that were lost."""
        return replace(self, num_vanished=num_vanished)

    def take(self, num_masks: int) -> MaskSample:
        """Keeps the first masks only, so that a quota can be met exactly."""
        if num_masks >= self.num_masks:
            return self
        cut = slice(0, num_masks)
        per_mask = {
            field.name: getattr(self, field.name)[cut]
            for field in fields(self)
            if field.name not in {"key", "dataset", "image_3SS", "num_vanished"}
        }
        return replace(self, **per_mask)


@dataclass(frozen=True, slots=True)
class MaskBatch:
    """The masks of one step. Masks of one image stand together and point at it by index."""

    images_I3SS: Tensor
    """uint8[I, 3, S, S], RGB, in torch's channels_last layout: as pictures come, so that nothing is transposed."""
    image_index_M: Tensor
    """int64[M], the image of each mask, ascending."""
    coverage_MGG: Tensor
    """float16[M, G, G], share of each patch that the mask covers."""
    context_box_px_M4: Tensor
    """int32[M, 4], x0, y0, x1, y1, both ends included."""
    mode_M: Tensor
    """int64[M], index into the model's modes; AGNOSTIC is 0."""
    dataset_M: Tensor
    """int64[M], index into `datasets`."""
    class_id_M: Tensor
    """int64[M], class in the dataset's vocabulary, or FREE_TEXT."""
    text_ids_ML: Tensor
    """int64[M, L], prompt, answer and EOS, padded on the right with 0."""
    prompt_tokens_M: Tensor
    """int64[M], how many of a row's ids are the prompt."""
    text_tokens_M: Tensor
    """int64[M], how many of a row's ids are not padding."""
    instruction_ids_MT: Tensor
    """int64[M, T], the Q-Former's instruction, padded on the right with 0; T is 0 where it takes none."""
    instruction_tokens_M: Tensor
    """int64[M], how many of a row's instruction ids are not padding."""
    datasets: tuple[str, ...]
    """Names of the data sources that `dataset_M` points at."""
    keys: tuple[str, ...]
    """Key of each image (I)."""
    mask_ids: tuple[str, ...]
    """Id of each mask within its image (M)."""
    num_vanished: int = 0
    """Masks of these images that the geometry left too few pixels of, and that are therefore not here."""
    num_skipped: int = 0
    """Broken images that were passed over on the way to these."""

    @property
    def num_images(self) -> int:
        """Number of images I."""
        return self.images_I3SS.shape[0]

    @property
    def num_masks(self) -> int:
        """Number of masks M."""
        return self.image_index_M.shape[0]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> MaskBatch:
        """Moves every tensor to a device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> MaskBatch:
        """Pins every tensor, for asynchronous copies to a GPU."""
        return self._map(lambda tensor: tensor.pin_memory())

    def made_up(self) -> MaskBatch:
        """One mask on the first image, with one id of prompt and one of answer: work that is like a real mask's."""
        like = self.images_I3SS.device
        one, ids = torch.ones(1, dtype=torch.int64, device=like), torch.zeros(1, 2, dtype=torch.int64, device=like)
        side = self.coverage_MGG.shape[-1]
        return replace(
            self,
            images_I3SS=self.images_I3SS[:1],
            image_index_M=one - 1,
            coverage_MGG=torch.ones(1, side, side, dtype=torch.float16, device=like),
            context_box_px_M4=torch.zeros(1, 4, dtype=torch.int32, device=like),
            mode_M=one - 1,
            dataset_M=one - 1,
            class_id_M=one - 1,
            text_ids_ML=ids,
            prompt_tokens_M=one,
            text_tokens_M=one + 1,
            instruction_ids_MT=ids[:, :1],
            instruction_tokens_M=one,
            keys=("made up",),
            mask_ids=("made up",),
        )

    def part(self, masks: slice) -> tuple[MaskBatch, slice]:
        """Some neighbouring masks with the images that they point at, and which of the images these are."""
        index_m = self.image_index_M[masks]
        first, end = (int(index_m[0]), int(index_m[-1]) + 1) if len(index_m) else (0, self.num_images)
        images = slice(first, end)
        per_mask: dict[str, Any] = {name: getattr(self, name)[masks] for name in PER_MASK}
        per_mask["image_index_M"] = index_m - first
        return replace(self, images_I3SS=self.images_I3SS[images], keys=self.keys[images], **per_mask), images

    def in_mode(self, mode: int) -> MaskBatch:
        """The same masks, all in one mode."""
        return replace(self, mode_M=torch.full_like(self.mode_M, mode))

    def _map(self, function: Callable[[Tensor], Tensor]) -> MaskBatch:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {name: function(value) for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **moved)


PER_MASK = (*(field.name for field in fields(MaskBatch) if "_M" in field.name), "mask_ids")
"""Fields of a batch that have a row per mask."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model said of one mask in one mode; ids, text and probability belong together."""

    name: str
    """The generated name, as decoded, without surrounding white space."""
    token_ids: tuple[int, ...]
    """Generated ids before EOS."""
    logprob: float
    """Natural log of the probability of all generated ids, EOS included where it was generated."""
    logprob_no_eos: float
    """The same without EOS."""


@dataclass(frozen=True, slots=True)
class NamedMask:
    """One mask and its name in every mode that was asked for."""

    image: str
    """Key of the image."""
    mask_id: str
    """Id of the mask within its image."""
    answers: Mapping[str, Answer]
    """From mode to answer."""


def mode_names(names: Sequence[str]) -> tuple[str, ...]:
    """All modes in the order of their indices: agnostic first, then the given ones.

    Raises:
        ValueError: a name stands twice, or is one of the agnostic mode's.
    """
    for name in names:
        if name in {AGNOSTIC_NAME, *MODE_ALIASES}:
            raise ValueError(f"model.modes names {name!r}, which every model has by itself: leave it out.")
        if list(names).count(name) > 1:
            raise ValueError(f"model.modes names {name!r} twice: each mode has one query.")
    return (AGNOSTIC_NAME, *names)


def validation_modes(own: str, modes: Sequence[str], asked: Sequence[str] | None) -> list[str]:
    """Modes in which a source's masks are named in validation.

    Args:
        own: the mode that stands for its vocabulary.
        modes: all modes of the model.
        asked: those that the user wants; None stands for its own, where the model has it, and the agnostic one.
    """
    if asked is not None:
        return list(asked)
    return [own, AGNOSTIC_NAME] if own in modes else [AGNOSTIC_NAME]


def mode_index(name: str, modes: Sequence[str]) -> int:
    """Index of a mode by its name.

    Raises:
        ValueError: the model has no such mode.
    """
    known = MODE_ALIASES.get(name, name)
    if known not in modes:
        raise ValueError(f"mode {name!r} is not one of this model's ({', '.join(modes)}). Use one of these.")
    return tuple(modes).index(known)
