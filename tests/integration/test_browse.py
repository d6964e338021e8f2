"""`osm shards browse`: the page shows what training and validation are given, and foreign text stays text."""

from __future__ import annotations

import argparse
import base64
import io
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from shapes_run import ROOT, settings, shapes_record, write_shapes

from osm_lightning.batch import MaskBatch
from osm_lightning.commands import shards_browse
from osm_lightning.commands.browse_cards import _spread, replayed_cards, train_cards, val_cards
from osm_lightning.commands.browse_page import SHOWN_SIDE_PX, Card, ShownMask, render
from osm_lightning.data.module import OSMData
from osm_lightning.instructions import TEST_QUESTION
from osm_lightning.shards.write import ShardWriter

HOSTILE = (
    "<script>alert(1)</script>",
    "\" onmouseover='alert(1)' x=\"",
    "</style></svg></article><img src=//evil.example/x onerror=alert(1)>",
)
TAGS = (
    "html head meta title style body header h1 p details summary dl div dt dd form fieldset legend label "
    "input small svg path main article image h2 span code ul li use g rect h3 bdi"
)
ATTRIBUTES = (
    "lang charset http-equiv content name class id type checked autocomplete aria-hidden aria-label role "
    "d href viewbox width height x y"
)


class Page(HTMLParser):
    """Tags, attributes and shown text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def with_class(self, name: str) -> list[dict[str, str | None]]:
        return [attrs for _, attrs in self.tags if name in (attrs.get("class") or "").split()]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Settings of two sources: shapes with a vocabulary, and the same pictures with names as free text."""
    folder = tmp_path_factory.mktemp("data")
    write_shapes(folder / "shapes")
    for split in ("train", "val"):
        with ShardWriter(folder / "foreign", dataset="foreign", split=split, vocabulary=None) as writer:
            for number in range(5):
                record = shapes_record(f"f{number}", number, 2)
                named = zip(record.segments, HOSTILE, strict=True)
                writer.write(replace(record, segments=tuple(replace(s, class_id=None, name=n) for s, n in named)))
    foreign = ["--data.sources.foreign", f"{{shards: {folder / 'foreign'}, quota: 4, mode: agnostic}}"]
    return [*settings(folder / "shapes"), *foreign, "--data.masks_per_image", "3"]


@pytest.fixture(scope="module")
def data(words: list[str]) -> OSMData:
    return shards_browse.read_data(words)


def browse(*words: object) -> int:
    """The command as its caller runs it: what its parser does not know are settings."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    shards_browse.add_arguments(parser)
    args, rest = parser.parse_known_args([str(word) for word in words])
    args.settings = rest
    return shards_browse.run(args)


def images_of(batches: Iterator[MaskBatch]) -> Iterator[tuple[MaskBatch, torch.Tensor]]:
    """Every image's batch and rows."""
    for batch in batches:
        for image in range(batch.num_images):
            yield batch, (batch.image_index_M == image).nonzero().flatten()


def test_the_page_shows_the_batches_of_the_training_loader(data: OSMData) -> None:
    loader = data.train_dataloader()
    next(iter(loader))  # epoch 0
    images = list(images_of(islice(iter(loader), 2)))
    cards = list(train_cards(data, epoch=1, num=len(images)))
    assert {card.origin for card in cards} == {f"epoch 1, pass 0, step {step}" for step in (0, 1)}
    for card, (batch, rows) in zip(cards, images, strict=True):
        first = int(rows[0])
        assert (card.dataset, card.key) == (
            batch.datasets[batch.dataset_M[first]],
            batch.keys[batch.image_index_M[first]],
        )
        assert (card.image_SS3 == batch.images_I3SS[batch.image_index_M[first]].permute(1, 2, 0).numpy()).all()
        assert [mask.mask_id for mask in card.masks] == [batch.mask_ids[row] for row in rows]
        for mask, row in zip(card.masks, rows.tolist(), strict=True):
            assert (mask.shares_GG == batch.coverage_MGG[row].numpy()).all()
            assert mask.context_box_px == tuple(batch.context_box_px_M4[row].tolist())
            assert mask.mode == data.modes[batch.mode_M[row]]
            text = data.codec.decode(batch.text_ids_ML[row, : batch.text_tokens_M[row]].tolist())
            assert text == f"{mask.prompt} {mask.answer}"
            assert (mask.class_id is None) == (card.dataset == "foreign")
    assert {mask.mode for card in cards for mask in card.masks} == {"agnostic", "shapes"}


def test_a_replay_is_the_draw_of_the_page(data: OSMData) -> None:
    # 5 foreign images, 2 or more of them a step: the third step is in the second pass.
    cards = [card for card in train_cards(data, epoch=3, num=30) if card.dataset == "foreign"]
    assert {"pass 0", "pass 1"} <= {card.origin.split(", ")[1] for card in cards}
    for card in cards:
        options = card.replay.split()
        again = list(replayed_cards(data, int(options[3]), options[1], int(options[5])))[-1]
        assert card.origin.startswith(again.origin)
        assert (again.image_SS3 == card.image_SS3).all()
        assert again.num_vanished == card.num_vanished
        # A step's last image gives no more masks than the quota lacks.
        assert [mask.mask_id for mask in again.masks][: len(card.masks)] == [mask.mask_id for mask in card.masks]
        assert {mask.mode for mask in again.masks} == {None}


def test_validation_shows_whole_images_with_all_masks(data: OSMData) -> None:
    cards = list(val_cards(data, 6, None))
    assert [card.dataset for card in cards] == ["shapes"] * 3 + ["foreign"] * 3
    assert [card.key for card in cards] == ["val-00", "val-02", "val-05", "f0", "f1", "f3"]
    assert {len(card.masks) for card in cards} == {3}
    assert {mask.prompt for card in cards for mask in card.masks} == {f"{TEST_QUESTION} Assistant:"}
    (card,) = val_cards(data, 6, "shapes/val-05")
    assert (card.image_SS3 == cards[2].image_SS3).all()


def test_foreign_text_is_shown_and_does_nothing(words: list[str], tmp_path: Path) -> None:
    out = tmp_path / "new" / "page.html"
    assert browse(*words, "--val", "--out", out) == 0
    assert [path.name for path in out.parent.iterdir()] == ["page.html"]
    check_harmless(html := out.read_text(encoding="utf-8"))
    for name in HOSTILE:
        assert name.lower() in Page(html).text


def check_harmless(html: str) -> None:
    """Nothing but the page's own tags and attributes, and no address but its own."""
    page = Page(html)
    assert {tag for tag, _ in page.tags} <= set(TAGS.split())
    assert {name for _, attrs in page.tags for name in attrs} <= set(ATTRIBUTES.split())
    links = {attrs["href"] for _, attrs in page.tags if "href" in attrs}
    assert links
    assert all(link and link.startswith(("#", "data:image/")) for link in links)
    assert "default-src 'none'" in next(attrs["content"] or "" for _, attrs in page.tags if "http-equiv" in attrs)


def a_card(text: str = "thing", side_px: int = 56) -> Card:
    shares = np.zeros((side_px // 14, side_px // 14), np.float16)
    shares[0, :3] = 1 / 196, 0.5, 1
    mask = ShownMask(text, None, text, text, text, shares, (0, 0, 41, 13))
    return Card(text, text, text, text, np.full((side_px, side_px, 3), 90, np.uint8), 2, (mask,))


@pytest.mark.parametrize("text", [*HOSTILE, "'><svg/onload=x>", "&lt;b&gt;", "a\x00\x1b[2Jb", "\u202ecba", "\ud800"])
def test_no_field_of_a_card_can_break_out(text: str) -> None:
    html = render([a_card(text)], [(text, text)])
    html.encode("utf-8")
    check_harmless(html)
    plain = Page(render([a_card("thing")], [("thing", "thing")]))
    assert [tag for tag, _ in Page(html).tags] == [tag for tag, _ in plain.tags]
    assert all(c.isprintable() or c == "\n" for c in html)


def test_every_touched_patch_is_coloured_and_a_larger_share_deeper() -> None:
    card = a_card()
    (layer,) = Page(render([card], [])).with_class("shares")
    alpha = np.asarray(decoded(layer["href"]))[..., 3]
    assert alpha.shape == (4, 4)
    assert ((alpha > 0) == (card.masks[0].shares_GG > 0)).all()
    assert 50 < alpha[0, 0] < alpha[0, 1] < alpha[0, 2] < 200


def decoded(uri: str | None) -> Image.Image:
    assert uri is not None
    return Image.open(io.BytesIO(base64.b64decode(uri.partition("base64,")[2])))


def test_large_inputs_are_scaled_down_but_not_their_geometry() -> None:
    page = Page(render([a_card(side_px=1120)], []))
    photo = next(attrs for tag, attrs in page.tags if tag == "image" and attrs.get("id") == "i0")
    assert decoded(photo["href"]).size == (SHOWN_SIDE_PX, SHOWN_SIDE_PX)
    rectangles = [attrs for tag, attrs in page.tags if tag == "rect"]
    assert (rectangles[0]["width"], rectangles[0]["height"]) == ("42", "14")
    assert next(attrs["viewbox"] for tag, attrs in page.tags if "viewbox" in attrs) == "0 0 1120 1120"


def test_each_dataset_has_a_filter() -> None:
    html = render([a_card("one"), a_card("two"), replace(a_card("two"), masks=())], [])
    assert [attrs["class"] for tag, attrs in Page(html).tags if tag == "article"] == [
        "card d0 narrow",
        "card d1 narrow",
        "card d1 narrow",
    ]
    for number in (0, 1):
        assert f"body:has(#d{number}:not(:checked)) .d{number} {{ display: none }}" in html
        assert any(attrs.get("id") == f"d{number}" for tag, attrs in Page(html).tags if tag == "input")


def test_few_images_are_shared_among_the_datasets() -> None:
    assert _spread([0, 0, 0, 1, 1, 2], 4) == [0, 1, 3, 5]
    assert _spread([0, 0, 1], 9) == [0, 1, 2]


def test_weights_may_be_missing_and_later_settings_win(words: list[str], tmp_path: Path, monkeypatch, capsys) -> None:
    """The paper's recipe names weights of many GB, which a look at the data does not wait for."""
    monkeypatch.chdir(tmp_path)
    shapes = words[words.index("--data.sources.foreign") + 1].replace("foreign", "shapes").replace("agnostic", "coco")
    given = ["--config", ROOT / "configs" / "joint.yaml", "--data.sources", f"{{shapes: {shapes}}}"]
    given += ["--model.vision.image_size_px", "224", "--model.language.tokenizer", "builtin:512"]
    given += ["--model.qformer.instruction_tokenizer", "null", "--data.masks_per_image", "8"]
    assert browse(*given, "--data.masks_per_image", "1", "--num", "5", "--out", "page.html") == 0
    assert "page.html: 5 images, 5 masks" in capsys.readouterr().out
    assert 'viewBox="0 0 224 224"' in Path("page.html").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "page.txt"], "--out is page.txt, but must name a file that ends in .html"),
        (["--out", "page.html", "--num", "0"], "--num is 0, but must be from 1 to 500"),
        (["--out", "page.html", "--epoch", "-1"], "--epoch is -1"),
        (["--out", "page.html", "--key", "shapes"], "--key is 'shapes', but must be DATASET/KEY"),
        (["--out", "page.html", "--key", "coco/a"], "a data source of the config that has the split: shapes, foreign"),
        (["--out", "page.html", "--key", "shapes/val-00"], r"no such sample; its 16 keys are like train-00, "),
        (
            ["--out", "page.html", "--key", "shapes/train-00", "--data.min_mask_px", "99999"],
            "training passes over this",
        ),
    ],
)
def test_what_cannot_be_shown_is_said(words: list[str], tmp_path: Path, monkeypatch, options, message) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        browse(*words, *options)
    assert not list(tmp_path.iterdir())


def test_without_a_config_or_with_an_epoch_of_validation_it_refuses(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no --config is given"):
        browse("--out", tmp_path / "page.html")
    with pytest.raises(SystemExit):
        browse("--config", "x.yaml", "--out", tmp_path / "page.html", "--val", "--epoch", "1")
