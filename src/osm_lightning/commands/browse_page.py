"""One HTML page of sampled masks: what the model reads of each, in one file that opens anywhere.

The page runs no script and loads nothing: filters and views are form controls and style rules, and a policy in its head
forbids the browser anything else. Every text on it may come from a foreign file and is shown as text.
"""

# S image side, px  G patch-grid side

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from osm_lightning.whole_file import write_whole

SHOWN_SIDE_PX = 560
"""Larger inputs are scaled down to this: a page of 40 stays at a few MB."""

MAX_CHARACTERS = 300
"""Longer texts are cut."""

FINE_GRID = 40
"""Grids of more patches a side show their lines on enlarged masks only; on small ones they would hide the picture."""

SHARE_COLOUR = (255, 45, 135)
"""Colour of the patch shares: one that few photographs hold."""


@dataclass(frozen=True, slots=True)
class ShownMask:
    """One mask of a card."""

    mask_id: str
    class_id: int | None
    """None where the name is free text."""
    answer: str
    prompt: str
    mode: str | None
    """None where the mode is not the sample's to say."""
    shares_GG: NDArray[np.float16]
    """float16[G, G], share of each patch that the mask covers."""
    context_box_px: tuple[int, int, int, int]
    """x0, y0, x1, y1, both ends included."""


@dataclass(frozen=True, slots=True)
class Card:
    """One image and those of its masks that stand together."""

    dataset: str
    key: str
    origin: str
    """Where the sample comes from: epoch, pass, step."""
    replay: str
    """Options that show it again."""
    image_SS3: NDArray[np.uint8]
    """uint8[S, S, 3], RGB."""
    num_vanished: int
    masks: tuple[ShownMask, ...]


def write_page(path: Path, cards: Sequence[Card], facts: Sequence[tuple[str, str]]) -> None:
    """Writes the page; whoever looks sees the old one or the new one, never a part.

    Args:
        path: the page.
        cards: what is shown, all of one input size and grid; at least one.
        facts: settings that hold for all cards, as (setting, value).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, render(cards, facts))


def render(cards: Sequence[Card], facts: Sequence[tuple[str, str]]) -> str:
    """The page's text; arguments as in `write_page`."""
    datasets = Counter(card.dataset for card in cards)
    number_of = {name: number for number, name in enumerate(datasets)}
    num_masks = sum(len(card.masks) for card in cards)
    num_vanished = sum(card.num_vanished for card in cards)
    side_px = cards[0].image_SS3.shape[0]
    grid_side = next((mask.shares_GG.shape[0] for card in cards for mask in card.masks), 1)
    filters = "\n".join(f"body:has(#d{i}:not(:checked)) .d{i} {{ display: none }}" for i in number_of.values())
    rows = "".join(f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>" for name, value in facts)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{len(cards)} images as the model reads them</title>
<style>{STYLE}{filters}</style>
</head>
<body{' class="fine"' if grid_side > FINE_GRID else ""}>
<header>
<h1>{num_masks:,} masks of {len(cards):,} images, as the model reads them</h1>
<p>Every coloured patch is one that the mask touches; the deeper the colour, the larger the share that it covers. The
dashed line is the context box. Masks that vanished, because scaling and cropping left too few of their pixels:
{num_vanished:,}.</p>
<details><summary>Settings</summary><dl>{rows}</dl></details>
</header>
{_controls(datasets)}
<svg class="defs" aria-hidden="true"><path id="grid" d="{_grid_path(side_px, grid_side)}"/></svg>
<main>
{"".join(_card(card, number, number_of[card.dataset]) for number, card in enumerate(cards))}</main>
</body>
</html>
"""


def _controls(datasets: Counter[str]) -> str:
    boxes = "".join(
        f'<label><input type="checkbox" id="d{i}" checked> {_text(name)} <small>{count}</small></label>'
        for i, (name, count) in enumerate(datasets.items())
    )
    views = "".join(
        f'<label><input type="radio" name="view" id="view-{view}"{" checked" if view == "both" else ""}> {text}</label>'
        for view, text in (("both", "shares on the image"), ("shares", "shares alone"), ("image", "image alone"))
    )
    lines = '<label><input type="checkbox" id="lines" checked> grid</label>'
    lines += '<label><input type="checkbox" id="boxes" checked> context box</label>'
    return (
        f'<form class="controls" autocomplete="off"><fieldset><legend>Images of</legend>{boxes}</fieldset>'
        f"<fieldset><legend>Show</legend>{views}{lines}</fieldset></form>"
    )


def _card(card: Card, number: int, dataset: int) -> str:
    side_px = card.image_SS3.shape[0]
    counts = f"{len(card.masks)} {'mask' if len(card.masks) == 1 else 'masks'}"
    if card.num_vanished:
        counts += f", {card.num_vanished} vanished"
    masks = "".join(_mask(mask, number, side_px) for mask in card.masks)
    if not card.masks:
        nothing = "Nothing is left to ask about: no segment counts, or none has a pixel left."
        masks = f'<li class="mask">{_picture(number, side_px, "input without masks", "")}<p>{nothing}</p></li>'
    narrow = " narrow" if len(card.masks) < 2 else ""
    return f"""<article class="card d{dataset}{narrow}">
<svg class="defs" aria-hidden="true"><image id="i{number}" width="{side_px}" height="{side_px}"
href="{_jpeg(card.image_SS3)}"/></svg>
<h2><span class="chip">{_text(card.dataset)}</span> {_text(card.key)}</h2>
<p class="origin">{_text(card.origin)} · {counts} <code>{_text(card.replay)}</code></p>
<ul class="masks">
{masks}</ul>
</article>
"""


def _mask(mask: ShownMask, image: int, side_px: int) -> str:
    touched, patches = int(np.count_nonzero(mask.shares_GG)), float(mask.shares_GG.sum(dtype=np.float64))
    x0, y0, x1, y1 = mask.context_box_px
    box = f'x="{x0}" y="{y0}" width="{x1 + 1 - x0}" height="{y1 + 1 - y0}"'
    overlay = (
        f'<image class="shares" width="{side_px}" height="{side_px}" href="{_shares_png(mask.shares_GG)}"/>'
        f'<use class="grid" href="#grid"/><g class="box"><rect {box}/><rect {box}/></g>'
    )
    about = [
        ("prompt", _text(mask.prompt)),
        ("class", "free text" if mask.class_id is None else str(mask.class_id)),
        ("mask id", _text(mask.mask_id)),
        ("patches", f"touches {touched:,} of {mask.shares_GG.size:,}, area of {patches:,.1f}"),
        ("context", f"{x0}, {y0} to {x1}, {y1} px"),
    ]
    rows = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in about)
    mode = "" if mask.mode is None else f' <span class="mode">{_text(mask.mode)}</span>'
    return (
        f'<li class="mask">{_picture(image, side_px, f"patches of {mask.answer}", overlay)}'
        f"<h3><bdi>{_text(mask.answer)}</bdi>{mode}</h3><dl>{rows}</dl></li>\n"
    )


def _picture(image: int, side_px: int, label: str, overlay: str) -> str:
    """The input with what lies over it; a press, or the space key, enlarges it."""
    return (
        f'<label class="picture"><input type="checkbox" class="large" aria-label="enlarge: {_text(label)}">'
        f'<svg viewBox="0 0 {side_px} {side_px}" role="img" aria-label="{_text(label)}">'
        f'<use class="photo" href="#i{image}"/>{overlay}</svg></label>'
    )


def _grid_path(side_px: int, grid_side: int) -> str:
    step = side_px / grid_side
    places = [f"{number * step:g}" for number in range(1, grid_side)]
    return "".join(f"M{at} 0V{side_px}M0 {at}H{side_px}" for at in places)


def _jpeg(image_SS3: NDArray[np.uint8]) -> str:
    image = Image.fromarray(image_SS3)
    if image.width > SHOWN_SIDE_PX:
        image = image.resize((SHOWN_SIDE_PX, SHOWN_SIDE_PX), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=85)
    return _data_uri("image/jpeg", out.getvalue())


def _shares_png(shares_GG: NDArray[np.float16]) -> str:
    """One pixel a patch: clear where the mask is not, and never too faint to see where it is."""
    opacity = np.where(shares_GG > 0, 0.25 + 0.35 * shares_GG.astype(np.float32), 0)
    pixels = np.empty((*shares_GG.shape, 4), dtype=np.uint8)
    pixels[..., :3] = SHARE_COLOUR
    pixels[..., 3] = np.round(255 * opacity)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return _data_uri("image/png", out.getvalue())


def _data_uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"


def _text(text: str) -> str:
    """Foreign text as HTML that shows it, in elements and in attributes.

    Characters that cannot be seen are spelt out: controls, lone surrogates (which are not even UTF-8), and marks that
    turn the direction of what follows.
    """
    cut = text if len(text) <= MAX_CHARACTERS else text[:MAX_CHARACTERS] + "…"
    return escape("".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in cut))


POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"

STYLE = """
:root { --paper: #fbfaf8; --sheet: #fff; --ink: #1c1b1a; --soft: #66625d; --line: #e2ded8; --accent: #c2185b;
  --chip: #f3e3ea }
@media (prefers-color-scheme: dark) {
  :root { --paper: #161618; --sheet: #202023; --ink: #ececee; --soft: #a3a1a8; --line: #36363b; --accent: #ff7fb2;
    --chip: #43253a }
}
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1500px; padding: 1rem clamp(.75rem, 2.5vw, 2rem) 3rem; background: var(--paper);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0 }
h2 { font-size: 1.05rem; margin: 0 }
h3 { font-size: 1.1rem; line-height: 1.3; margin: .5rem 0 .25rem }
header p { max-width: 48rem; margin: .25rem 0; color: var(--soft) }
summary { cursor: pointer; width: fit-content }
dl { margin: 0; font-size: .85rem }
dl > div { display: grid; grid-template-columns: 4.6rem 1fr; gap: .5rem }
header dl { margin-top: .5rem }
header dl > div { grid-template-columns: 10rem 1fr }
dt { color: var(--soft) }
dd { margin: 0; font-variant-numeric: tabular-nums }
.controls { position: sticky; top: 0; z-index: 1; display: flex; flex-wrap: wrap; gap: .25rem 2rem; margin: 1rem 0;
  padding: .5rem 0; background: var(--paper); border-bottom: 1px solid var(--line) }
fieldset { display: flex; flex-wrap: wrap; gap: .1rem 1rem; border: 0; margin: 0; padding: 0 }
legend { float: left; color: var(--soft); padding: .2rem 1rem .2rem 0 }
fieldset label { display: inline-flex; align-items: center; gap: .35rem; padding: .2rem 0; cursor: pointer }
input { accent-color: var(--accent); width: 1rem; height: 1rem; margin: 0 }
small { color: var(--soft) }
:focus-visible, .picture:has(:focus-visible) { outline: 3px solid var(--accent); outline-offset: 2px }
.defs { position: absolute; width: 0; height: 0 }
main { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 18rem), 1fr)) }
.card { background: var(--sheet); border: 1px solid var(--line); border-radius: 10px; padding: 1rem; min-width: 0;
  content-visibility: auto; contain-intrinsic-size: auto 30rem }
.card:not(.narrow), .card:has(.large:checked) { grid-column: 1 / -1 }
.chip, .mode { background: var(--chip); color: var(--accent); border-radius: 99px; padding: .1rem .6rem;
  font-size: .8rem; font-weight: 600; white-space: nowrap }
.origin { margin: .2rem 0 .8rem; color: var(--soft); font-size: .85rem }
code { margin-left: .5rem; font-size: .8rem; user-select: all }
.narrow code { display: block; margin: .2rem 0 0 }
.masks { list-style: none; margin: 0; padding: 0; display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 15rem), 1fr)) }
.mask { min-width: 0 }
.mask:has(.large:checked) { grid-column: 1 / -1 }
.mask:has(.large:checked) .picture { max-width: min(100%, 88vh); cursor: zoom-out }
.picture { display: block; position: relative; cursor: zoom-in; border-radius: 6px; overflow: hidden; background: #111 }
.large { position: absolute; opacity: 0; inset: 0; width: 100%; height: 100%; cursor: inherit }
svg { display: block; width: 100% }
.shares { image-rendering: pixelated }
.grid { fill: none; stroke: #fff; stroke-width: 1px; opacity: .28; pointer-events: none }
#grid, rect { vector-effect: non-scaling-stroke }
rect { fill: none; stroke: #000; stroke-width: 3px; opacity: .6 }
rect + rect { stroke: #ffe14d; stroke-width: 2px; stroke-dasharray: 6 4; opacity: 1 }
body:has(#view-shares:checked) .photo, body:has(#view-image:checked) .shares, body:has(#view-image:checked) .grid,
body:has(#lines:not(:checked)) .grid, body:has(#boxes:not(:checked)) .box,
.fine .mask:not(:has(.large:checked)) .grid { display: none }
@media (max-width: 40rem) {
  .controls { position: static }
  .card { padding: .75rem; border-radius: 8px }
  code { display: block; margin: .2rem 0 0 }
}
@media print { .controls { display: none } .card { break-inside: avoid; content-visibility: visible } }
"""
