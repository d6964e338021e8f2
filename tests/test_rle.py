"""RLE against pycocotools, and RLE that lies.

pycocotools decodes runs that stop short into uninitialised memory, and reads past the end of counts that are cut off.
"""

import numpy as np
import pytest
from pycocotools import mask as coco_rle

from osm_lightning.rle import decode_rle, encode_rle

HEIGHT, WIDTH = 8, 16


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools' own
def test_rle_agrees_with_pycocotools() -> None:
    draw = np.random.default_rng(0)
    masks = [np.zeros((5, 7), bool), np.ones((5, 7), bool), np.ones((1, 1), bool), np.eye(400, 300, dtype=bool)]
    masks += [draw.random((draw.integers(1, 40), draw.integers(1, 40))) < draw.random() for _ in range(100)]
    masks += [np.kron(mask, np.ones((9, 70), bool)) for mask in masks[4:40]]  # long runs: several characters a number
    for mask in masks:
        counts = encode_rle(mask)
        theirs = coco_rle.decode({"size": list(mask.shape), "counts": counts.encode()})
        decoded = decode_rle(counts, *mask.shape)
        assert decoded.dtype == np.bool_
        assert np.array_equal(decoded, mask)
        assert np.array_equal(decoded, theirs)


@pytest.mark.parametrize(
    "counts",
    [
        "",
        "1",
        "o2",
        "0",
        "P",
        "0P",
        "PPPPPPP",
        "o" * 5000 + "0",
        "zzz",
        "~",
        "\x00",
        " ",
        "é",
        "漢",
        "O0",
        "oooooo3",
        "m30",
        "漢a3",  # a question mark in its place would be right
        "\ud800a3",
        "T3FV1",  # 100, -10, 38: the right sum
    ],
)
def test_broken_rle_is_refused(counts: str) -> None:
    with pytest.raises(ValueError, match=r"^has (compressed RLE counts|RLE runs)"):
        decode_rle(counts, HEIGHT, WIDTH)


def test_random_rle_never_gives_anything_but_a_mask_or_an_error() -> None:
    draw = np.random.default_rng(0)
    good = encode_rle(draw.random((HEIGHT, WIDTH)) < 0.3)
    refused = 0
    for _ in range(2000):
        letters = list(good)
        for _ in range(draw.integers(1, 4)):
            letters[draw.integers(len(letters))] = chr(draw.integers(0, 256))
        try:
            mask = decode_rle("".join(letters[: draw.integers(len(letters)) + 1]), HEIGHT, WIDTH)
            assert (mask.shape, mask.dtype) == ((HEIGHT, WIDTH), np.bool_)
        except ValueError:
            refused += 1
    assert refused > 1500
