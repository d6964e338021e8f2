"""Image files to pixels: any that Pillow knows, upright, in colour and bounded; ordinary JPEGs quickly, and smaller."""

from __future__ import annotations

import io

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

ORIENTATION = ExifTags.Base.Orientation
MAX_IMAGE_PIXELS = 120_000_000
"""Larger images are taken for decompression bombs."""

BROKEN_IMAGE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
"""What Pillow raises for files that it cannot, or will not, decode."""


def decode_jpeg(data: bytes, width_px: int, height_px: int, reduction: int) -> NDArray[np.uint8] | None:
    """Decodes a JPEG of a known size, straight to 1/reduction of it (rounded up) where that is asked for.

    Args:
        data: the file.
        width_px: width that it must have.
        height_px: height that it must have.
        reduction: 1, 2, 4 or 8.

    Returns:
        uint8[h, w, 3], RGB, or None for whatever `decode_image` should look at: no JPEG, one that is turned by EXIF,
        neither grey nor colour, of another size, or broken.
    """
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:  # reads the headers only
            ordinary = image.mode in {"L", "RGB"} and image.getexif().get(ORIENTATION, 1) == 1
            if not ordinary or image.size != (width_px, height_px):
                return None
        least = {"min_height": -(-height_px // reduction), "min_width": -(-width_px // reduction)}
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, **(least if reduction > 1 else {}))
    except BROKEN_IMAGE:
        return None
    return pixels


def as_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as 8-bit RGB; 16 bits of grey are scaled, not cut off."""
    if image.mode in {"I", "I;16", "I;16B"}:
        grey = np.asarray(image).astype(np.float32) / 257.0
        image = Image.fromarray(grey.round().clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def decode_image(data: bytes, name: str) -> Image.Image:
    """Decodes an image of any mode (grey, palette, CMYK, 16 bit, alpha, EXIF rotation) to upright 8-bit RGB.

    Raises:
        ValueError: the bytes are not a JPEG, PNG or WebP that can be decoded in full, or the image is too large.
    """
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as image:
            size = image.size
            if size[0] * size[1] <= MAX_IMAGE_PIXELS:
                return as_rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError as error:
        raise ValueError(f"image {name} cannot be decoded: it is no JPEG, PNG or WebP. Replace the file.") from error
    except BROKEN_IMAGE as error:
        raise ValueError(f"image {name} cannot be decoded ({error}). Replace the file.") from error
    raise ValueError(
        f"image {name} is {size[0]} x {size[1]} px; more than {MAX_IMAGE_PIXELS:,} pixels are refused as a "
        "decompression bomb. Shrink it first."
    )
