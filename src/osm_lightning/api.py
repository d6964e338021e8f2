"""Naming from Python: a model from a checkpoint, an image encoded once, its masks named as often as one likes.

It goes the way of `osm predict`, with the same functions: `data/sample.py` makes images and masks what the model sees,
`naming/greedy.py` names. What belongs to many images stays with the command: loaders, processes, journal and files.
"""

# h, w pixels of the image  S side of the input  M masks

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from osm_lightning.batch import AGNOSTIC_NAME, Answer, NamedMask, mode_index
from osm_lightning.data.collate import collate
from osm_lightning.data.sample import PREDICTED, View, whole_image, whole_masks
from osm_lightning.data.text import TextCodec
from osm_lightning.evaluation.predictions import refuse_nan
from osm_lightning.evaluation.segments import GivenMasks, given_segments
from osm_lightning.model import osm as network
from osm_lightning.model_settings import settings_of
from osm_lightning.naming.greedy import name_masks
from osm_lightning.picture import ORIENTATION, as_rgb, decode_image
from osm_lightning.record import Record
from osm_lightning.weights.checkpoint import read_checkpoint

__all__ = ["OSM", "Answer", "NamedMask", "Scene"]

ImageLike = str | Path | Image.Image | NDArray[np.uint8]
"""A file (JPEG, PNG, WebP), a PIL image, or uint8[h, w, 3], RGB."""

AUTOCAST = {
    "32": None,
    "32-true": None,
    "bf16": torch.bfloat16,
    "bf16-mixed": torch.bfloat16,
    "16": torch.float16,
    "16-mixed": torch.float16,
}
"""From Lightning's names of precisions to what matrix products are computed in; None: as the weights are."""


class OSM:
    """A trained model that names masks. Nothing is trained here, and no state is kept between calls."""

    def __init__(self, model: network.OSM, view: View, codec: TextCodec, max_new_tokens: int, precision: str) -> None:
        """Takes the parts of a model; `from_pretrained` makes them.

        Args:
            model: with trained parts.
            view: how images and masks are turned into what the model sees.
            codec: tokenizers.
            max_new_tokens: ids per name at most, where `Scene.name` is not given another number.
            precision: as Lightning calls it.

        Raises:
            ValueError: another precision than those of `AUTOCAST`.
        """
        if precision not in AUTOCAST:
            raise ValueError(
                f"precision is {precision!r}, in which only the trainer computes. Give precision='32-true' or "
                "'bf16-mixed'; names may differ from the trainer's in the last digits of their probability."
            )
        self.model = model.eval().requires_grad_(False)
        self.view, self.codec, self.max_new_tokens = view, codec, max_new_tokens
        self.precision = precision

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: str | Path,
        device: torch.device | str | None = None,
        precision: str | None = None,
        settings: Mapping[str, object] = MappingProxyType({}),
    ) -> OSM:
        """Loads a model.

        Args:
            checkpoint: what `--ckpt` takes: an exported folder, a .ckpt file, a folder of parts, or `last`.
            device: where it computes; None takes CUDA where there is one, else the CPU.
            precision: as `trainer.precision`: `32-true`, `bf16-mixed` or `16-mixed`. None: as it was trained.
            settings: settings of its config that are to be others, as `{"model.vision.name": "/data/vit"}` where frozen
                weights lie elsewhere, or `{"model.language.dtype": "float16"}`.

        Raises:
            ValueError: the checkpoint is none, the machine lacks frozen weights, or they are not those it was trained
                with.
        """
        content = read_checkpoint(checkpoint)
        found = settings_of(content, settings)
        codec = found.codec()
        model = found.build(codec, content)
        namer = cls(model, found.view(), codec, found.model.max_new_tokens, precision or found.precision)
        return namer.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))

    @property
    def modes(self) -> tuple[str, ...]:
        """Names of its modes: agnostic, then one for each vocabulary."""
        return self.model.modes.names

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.model.projection.weight.device

    def to(self, device: torch.device | str) -> OSM:
        """Moves the model. Scenes stay where they were encoded: encode again."""
        self.model.to(device)
        return self

    @torch.inference_mode()
    def encode(self, image: ImageLike) -> Scene:
        """Looks at an image: all that costs as much for one mask as for hundreds.

        Args:
            image: a file, turned upright as its EXIF orientation says (so does `osm predict`); or pixels.

        Raises:
            ValueError: it is no image, or pixels of which it is not clear which way is up.
        """
        key, rgb = _rgb(image)
        image_SS3 = whole_image(rgb, self.view)
        pixels_I3SS = torch.from_numpy(image_SS3).permute(2, 0, 1).unsqueeze(0).to(self.device)
        with self.autocast():
            encoded = self.model.encode(pixels_I3SS)
        return Scene(self, key, rgb.size, image_SS3, encoded)

    def autocast(self) -> torch.autocast:
        """What its precision means on its device; a CPU computes `16-mixed` in bfloat16, as under the trainer."""
        dtype = AUTOCAST[self.precision]
        if dtype == torch.float16 and self.device.type == "cpu":
            dtype = torch.bfloat16
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)


class Scene:
    """An image that a model has looked at; `OSM.encode` makes it."""

    def __init__(
        self, osm: OSM, key: str, size_px: tuple[int, int], image_SS3: NDArray[np.uint8], encoded: network.EncodedImages
    ) -> None:
        """Keeps what masks need of the image.

        Args:
            osm: the model that encoded it.
            key: file name without its ending, or `image`; answers carry it.
            size_px: width and height of the image.
            image_SS3: uint8[S, S, 3], the image as the model sees it.
            encoded: what the model made of it.
        """
        self.key, self.size_px = key, size_px
        self._osm, self._image_SS3, self._encoded = osm, image_SS3, encoded
        self._device = osm.device

    @torch.inference_mode()
    def name(
        self, masks: GivenMasks, modes: Sequence[str] = (AGNOSTIC_NAME,), max_new_tokens: int | None = None
    ) -> list[NamedMask]:
        """Names masks. Only MaskQ-Former and the LLM run; many masks go through them in chunks.

        Args:
            masks: bool[M, h, w], numpy's or torch's, or a list of bool[h, w] or of COCO RLE, on the image's pixels.
            modes: modes to name each in; `OSM.modes` has them.
            max_new_tokens: ids per name at most; None takes the model's setting (12 by the protocol).

        Returns:
            One entry per mask, in their order; its id is its position.

        Raises:
            ValueError: there is no mask, one is of another type or size or has no pixel, the model has no such mode, or
                it has moved to another device.
        """
        osm, (width_px, height_px) = self._osm, self.size_px
        wanted = _modes(modes, osm.modes)
        most = osm.max_new_tokens if max_new_tokens is None else max_new_tokens
        if most < 1:
            raise ValueError(f"max_new_tokens is {most}, but a name has at least 1 id.")
        if self._device != osm.device:
            raise ValueError(
                f"the image was encoded on {self._device}, but the model is on {osm.device}: encode again."
            )
        segments = given_segments(masks, height_px, width_px)
        # Its bytes were read when it was encoded, and are not asked for again.
        record = Record(self.key, b"", "png", height_px, width_px, segments)
        sample = whole_masks(record, self._image_SS3, PREDICTED, osm.view, osm.codec, keep_vanished=True)
        batch = collate([sample], (PREDICTED.dataset,)).to(osm.device)
        decode, eos_ids = osm.codec.decode, osm.codec.eos_ids
        with osm.autocast():
            named = name_masks(osm.model, self._encoded, batch, wanted, decode, eos_ids, most)
        for mask in named:
            refuse_nan(mask)
        return named


def _rgb(image: ImageLike) -> tuple[str, Image.Image]:
    """An image's key, and the image as RGB."""
    if isinstance(image, str | Path):
        path = Path(image)
        if not path.is_file():
            raise ValueError(f"image: there is no file {path}.")
        return path.stem, decode_image(path.read_bytes(), path.name)
    if isinstance(image, Image.Image):
        orientation = image.getexif().get(ORIENTATION, 1)
        if orientation != 1:
            raise ValueError(
                f"the image is to be turned (EXIF orientation {orientation}), so that it is not clear on which pixels "
                "masks lie. Give ImageOps.exif_transpose(image), and masks of that."
            )
        return "image", as_rgb(image)
    pixels: Any = image.cpu().numpy() if isinstance(image, Tensor) else image
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        kind = f"{pixels.dtype}{list(pixels.shape)}" if isinstance(pixels, np.ndarray) else type(pixels).__name__
        raise ValueError(f"image is {kind}. Give a path, a PIL image, or uint8[height, width, 3] in RGB.")
    return "image", Image.fromarray(pixels)


def _modes(modes: Sequence[str], known: tuple[str, ...]) -> list[str]:
    """The modes that are asked for, each once.

    Raises:
        ValueError: there is none, or one that the model lacks.
    """
    if isinstance(modes, str) or not modes:
        raise ValueError(f"modes is {modes!r}. Give a list of some of {', '.join(known)}.")
    for mode in modes:
        mode_index(mode, known)
    return list(dict.fromkeys(modes))
