"""The picture of masks and names: colours where masks are, labels that can be told apart."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from PIL import Image, ImageDraw

from osm_lightning.evaluation.overlay import colour_of, draw_overlay

HEIGHT, WIDTH = 480, 640


def disc(x: float, y: float, radius: float) -> np.ndarray:
    ys, xs = np.mgrid[:HEIGHT, :WIDTH]
    return np.hypot(xs - x, ys - y) <= radius


@pytest.fixture
def plates(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, float, float, float]]:
    """Boxes (both corners inside) of the labels, as they are drawn."""
    boxes: list[tuple[float, float, float, float]] = []
    draw = ImageDraw.ImageDraw.rounded_rectangle

    def noted(self: ImageDraw.ImageDraw, box: tuple[float, float, float, float], **options: object) -> None:
        boxes.append(box)
        draw(self, box, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(ImageDraw.ImageDraw, "rounded_rectangle", noted)
    return boxes


def test_masks_are_tinted_and_outlined_and_nothing_else_is_touched() -> None:
    mask = disc(300, 200, 80)
    image = Image.new("RGB", (WIDTH, HEIGHT), (100, 100, 100))
    picture = np.asarray(draw_overlay(image, [mask], [""])).astype(int)
    assert (picture[~mask] == 100).all()
    np.testing.assert_array_equal(picture[200, 220], colour_of(0))
    np.testing.assert_allclose(picture[200, 300], 0.55 * 100 + 0.45 * np.array(colour_of(0)), atol=1)
    assert image.getpixel((300, 200)) == (100, 100, 100)


def test_no_outline_along_the_border_of_the_image() -> None:
    picture = np.asarray(draw_overlay(Image.new("RGB", (WIDTH, HEIGHT)), [disc(0, 0, 200)], [""]))
    np.testing.assert_array_equal(picture[0, 100], picture[50, 50])
    np.testing.assert_array_equal(picture[0, 200], colour_of(0))


def test_small_mask_is_painted_over_the_large_one_around_it() -> None:
    masks = [disc(300, 200, 20), disc(300, 200, 150)]
    picture = np.asarray(draw_overlay(Image.new("RGB", (WIDTH, HEIGHT)), masks, ["", ""]))
    np.testing.assert_array_equal(picture[200, 280], colour_of(0))


def test_label_stands_inside_a_large_mask(plates: list[tuple[float, float, float, float]]) -> None:
    ring = disc(320, 240, 230) & ~disc(320, 240, 140)
    draw_overlay(Image.new("RGB", (WIDTH, HEIGHT)), [ring], ["ring"])
    x0, y0, x1, y1 = plates[0]
    assert ring[round(y0) : round(y1) + 1, round(x0) : round(x1) + 1].all()


def test_label_stands_beside_a_small_mask(plates: list[tuple[float, float, float, float]]) -> None:
    dot = disc(320, 240, 8)
    draw_overlay(Image.new("RGB", (WIDTH, HEIGHT)), [dot], ["traffic light"])
    x0, y0, x1, y1 = plates[0]
    assert not dot[round(y0) : round(y1) + 1, round(x0) : round(x1) + 1].any()
    assert 0 < 232 - y1 < 10


def test_twenty_labels_neither_overlap_nor_leave_the_image(plates: list[tuple[float, float, float, float]]) -> None:
    draw = np.random.default_rng(0)
    masks = [disc(draw.integers(0, WIDTH), draw.integers(0, HEIGHT), radius) for radius in range(5, 105, 5)]
    draw_overlay(Image.new("RGB", (WIDTH, HEIGHT)), masks, ["dining table"] * 20)
    assert len(plates) == 20
    assert all(x0 >= 0 and y0 >= 0 and x1 < WIDTH and y1 < HEIGHT for x0, y0, x1, y1 in plates)
    for one, other in itertools.combinations(plates, 2):
        assert one[2] < other[0] or other[2] < one[0] or one[3] < other[1] or other[3] < one[1]


def test_long_names_and_tiny_images_are_drawn(plates: list[tuple[float, float, float, float]]) -> None:
    picture = draw_overlay(Image.new("RGB", (5, 3)), [np.ones((3, 5), dtype=bool)], ["word " * 50])
    assert picture.size == (5, 3)
    assert plates[0][2] - plates[0][0] < 300


def test_mask_without_pixels_is_left_out(plates: list[tuple[float, float, float, float]]) -> None:
    image = Image.new("RGB", (WIDTH, HEIGHT), (1, 2, 3))
    assert draw_overlay(image, [np.zeros((HEIGHT, WIDTH), dtype=bool)], ["none"]).tobytes() == image.tobytes()
    assert plates == []


def test_mask_of_another_size() -> None:
    with pytest.raises(ValueError, match=r"mask 0 is 640 x 479 px, but the image is 640 x 480 px"):
        draw_overlay(Image.new("RGB", (WIDTH, HEIGHT)), [np.ones((HEIGHT - 1, WIDTH), dtype=bool)], ["cut"])


def test_twenty_colours_differ_and_bear_black_text() -> None:
    colours = np.array([colour_of(index) for index in range(20)], dtype=float)
    apart = np.linalg.norm(colours[:, None] - colours[None], axis=-1) + 1000 * np.eye(20)
    assert apart.min() > 20
    linear = np.where(colours / 255 <= 0.04045, colours / 255 / 12.92, ((colours / 255 + 0.055) / 1.055) ** 2.4)
    contrast = (linear @ [0.2126, 0.7152, 0.0722] + 0.05) / 0.05
    # The contrast that WCAG 2 asks of normal text.
    assert contrast.min() > 4.5
