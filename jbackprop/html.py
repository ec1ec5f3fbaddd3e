"""One self-contained HTML page: no script, no font and no picture comes from elsewhere."""

from __future__ import annotations

import base64
import math
import os
import re
from collections.abc import Iterable, Sequence
from html import escape
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import numpy as np

from jbackprop.files import check_place, replacing

BLUE, ORANGE, SKY, GREEN, GREY = "#0072b2", "#d55e00", "#7fbde4", "#2f8f78", "#8a8a85"
"""Of figures: told apart by those who see no red or no green (Okabe and Ito, 2008)."""

_STYLE = """
:root { color-scheme: light; --ink: #1c1c1a; --dim: #6b6b66; --line: #dcdad4; --soft: #f5f4f0;
        --blue: #0072b2; --orange: #d55e00; --pale: #e9f1f7; }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: #fff;
       max-width: 72rem; margin: 2rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; }
p, figcaption, caption, summary { max-width: 46rem; }
table { border-collapse: collapse; font-size: .84rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--dim); padding-bottom: .4rem; }
th, td { padding: .22rem .7rem .22rem 0; text-align: left; vertical-align: baseline;
         border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--dim); font-weight: 500; }
.n { text-align: right; }
.wide { overflow-x: auto; }
figure { margin: 1rem 0; }
figure svg { max-width: 100%; height: auto; }
figure svg text { font-family: system-ui, sans-serif !important; }
figcaption { color: var(--dim); font-size: .88rem; }
details { margin: .8rem 0; }
summary { cursor: pointer; }
code, pre { font: .84rem/1.4 ui-monospace, monospace; background: var(--soft); }
table.mid td { vertical-align: middle; line-height: 1.25; padding: .3rem .5rem .3rem 0; }
table.mid th { padding-right: .5rem; }
td .name { white-space: normal; width: max-content; min-width: 8rem; max-width: 12.5rem;
           overflow-wrap: break-word; }
td svg { display: block; }
td small, th small { color: var(--dim); font-size: .74rem; font-weight: 400; }
.strong { font-weight: 600; }
.note { color: var(--dim); font-size: .88rem; margin: 0 0 .8rem; }
.lead { color: var(--dim); margin: 0 0 1.2rem; max-width: 60rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(7rem, 1fr)); gap: .7rem;
         margin: 1.2rem 0; padding: 0; }
.tiles div { background: var(--soft); border-radius: .4rem; padding: .6rem .8rem .55rem; }
.tiles dt { color: var(--dim); font-size: .78rem; }
.tiles dd { margin: 0; font-size: 1.35rem; line-height: 1.3; font-variant-numeric: tabular-nums; }
.tiles dd small { display: block; color: var(--dim); font-size: .74rem; line-height: 1.3;
                  overflow-wrap: anywhere; }
.facts { list-style: none; margin: 1rem 0 0; padding: 0; max-width: 60rem; }
.facts li { padding: .28rem 0 .28rem 1.7rem; position: relative; }
.facts li::before { position: absolute; left: .1rem; font-weight: 700; color: var(--blue);
                    content: "\\2022"; }
.facts .look::before { content: "\\25b2"; color: var(--orange); font-size: .8em; top: .42rem; }
.facts .bad { background: #fbeee6; border-radius: .3rem; }
.facts .bad::before { content: "\\2716"; color: var(--orange); left: .4rem; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr));
        column-gap: 2.2rem; }
.pair h2 { margin-top: 1.6rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(7.5rem, 1fr)); gap: .7rem; }
.cards.text { grid-template-columns: repeat(auto-fill, minmax(min(100%, 15rem), 1fr)); }
.cards figure { margin: 0; padding: .55rem; border: 1px solid var(--line); border-radius: .4rem;
                break-inside: avoid; overflow-wrap: anywhere; }
.cards figure.odd { border-color: var(--orange); box-shadow: inset 0 2.5px 0 var(--orange); }
.cards img { width: 100%; image-rendering: pixelated; display: block; margin-bottom: .4rem; }
.cards figcaption { font-size: .8rem; line-height: 1.4; color: var(--ink);
                    font-variant-numeric: tabular-nums; }
.cards figcaption small { color: var(--dim); font-size: .74rem; display: block; }
.cards pre { font-size: .74rem; margin: 0 0 .4rem; padding: .35rem .45rem; overflow: hidden;
             white-space: pre-wrap; border-radius: .2rem; }
.cards pre b { font-weight: 400; float: right; color: var(--dim); }
footer { color: var(--dim); font-size: .8rem; margin: 3rem 0 1rem; }
@media print { html { font-size: 10.5px; } body { font-size: 1rem; max-width: none; margin: 0; }
  h2, .note { break-after: avoid; } figure, tr, .pair section, .facts li { break-inside: avoid; }
  thead { display: table-header-group; } .wide { overflow: visible; }
  .pair { grid-template-columns: 1fr 1fr; column-gap: 1.2rem; } th, td { padding-right: .3rem; }
  .tiles div, .facts .bad { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
"""


class Markup(str):
    """HTML, where the functions below would take any other text to be plain."""

    __slots__ = ()


def page(title: str, *parts: str) -> str:
    """The whole document, of parts made by the functions below."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body>\n<h1>{escape(title)}</h1>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def check_path(path: str | os.PathLike[str]) -> None:
    """Raise unless a page can be written there.

    Raises:
        ValueError: the name does not end in .html.
        OSError: as `jbackprop.files.check_place`.
    """
    if Path(path).suffix not in (".html", ".htm"):
        raise ValueError(f"{path}: the name must end in .html")
    check_place(path)


def write(path: str | os.PathLike[str], text: str) -> None:
    """Write a page, or leave the old one as it is.

    Raises:
        ValueError, OSError: as `check_path`; or the disk is full.
    """
    check_path(path)
    with replacing(path) as file:
        file.write(text.encode())


def heading(text: str, level: int = 2) -> str:
    """A heading."""
    return f"<h{level}>{escape(text)}</h{level}>"


def paragraph(text: str) -> str:
    """A paragraph of plain text."""
    return f"<p>{escape(text)}</p>"


def lead(text: str) -> str:
    """What it is all about, below the title."""
    return f'<p class="lead">{plain(text)}</p>'


def plain(text: str) -> str:
    """The text as HTML; `Markup` is left as it is."""
    return text if isinstance(text, Markup) else escape(text)


def number(value: float) -> str:
    """Three digits of a number, in words where it is none."""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("infinity" if value > 0 else "-infinity")
    if value == 0:
        return "0"
    if 99.95 <= abs(value) < 999_999.5:
        return f"{value:,.0f}"
    if 1e-3 <= abs(value) < 100:
        return f"{value:.3g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def tiles(figures: Iterable[tuple[str, str, str]]) -> str:
    """A row of figures: (what it is, the figure, what to know of it or "")."""
    inside = (
        f"<div><dt>{escape(name)}</dt><dd>{plain(value)}"
        + (f"<small>{escape(note)}</small>" if note else "")
        + "</dd></div>"
        for name, value, note in figures
    )
    return f'<dl class="tiles">{"".join(inside)}</dl>'


def facts(lines: Iterable[tuple[str, str]]) -> str:
    """A list of lines: (kind, text), the kind "plain", "look" (worth a look) or "bad"."""
    words = {"look": "Worth a look: ", "bad": "Broken: "}

    def line(kind: str, text: str) -> str:
        return f'<li class="{kind}" title="{words.get(kind, "")}">{escape(text)}</li>'

    return f'<ul class="facts">{"".join(line(*one) for one in lines)}</ul>'


def pair(*parts: str) -> str:
    """Parts beside each other where the page is wide enough."""
    return f'<div class="pair">{"".join(f"<section>{part}</section>" for part in parts)}</div>'


def note(text: str) -> str:
    """A paragraph that explains what is beside it, in small letters."""
    return f'<p class="note">{plain(text)}</p>'


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    caption: str = "",
    *,
    middle: bool = False,
) -> str:
    """A table; as in `jbackprop.table` a column named ">..." is aligned to the right.

    Cells are plain text, but for those that are `Markup`. With `middle` the cells of a row share
    their middles rather than their base lines: for tall ones.
    """
    sides = [' class="n"' if column.startswith(">") else "" for column in columns]

    def line(cells: Sequence[str], tag: str) -> str:
        inside = (
            f"<{tag}{side}>{plain(_bare(cell) if tag == 'th' else cell)}</{tag}>"
            for cell, side in zip(cells, sides, strict=True)
        )
        return f"<tr>{''.join(inside)}</tr>"

    kind = ' class="mid"' if middle else ""
    head = f"<caption>{escape(caption)}</caption>" if caption else ""
    body = "\n".join(line(row, "td") for row in rows)
    return (
        f'<div class="wide"><table{kind}>{head}<thead>{line(columns, "th")}</thead>\n'
        f"<tbody>{body}</tbody></table></div>"
    )


def _bare(column: str) -> str:
    bare = column.lstrip(">")
    return Markup(bare) if isinstance(column, Markup) else bare


def figure(fig: Any, caption: str, alt: str) -> str:
    """A figure of matplotlib as inline SVG, its words as text that can be searched.

    Args:
        fig: the figure.
        caption: what is seen, below it.
        alt: the same for those who cannot see it.
    """
    from matplotlib import rc_context

    drawn = StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": alt}):
        fig.savefig(drawn, format="svg", metadata={"Date": None}, bbox_inches="tight")
    svg = drawn.getvalue()
    svg = svg[svg.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{escape(alt)}"', 1)
    svg = re.sub(r' id="[A-Za-z][\w.]*_\d+"', "", svg)  # of which several figures have the same
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def bars(
    counts: Sequence[float] | np.ndarray,
    title: str,
    *,
    start: int = 0,
    of: int | None = None,
    size: tuple[int, int] = (104, 26),
    colour: str = BLUE,
) -> Markup:
    """A histogram as small as a word, for a cell of a table.

    Args:
        counts: the bars are as high as their square roots, so that one can see the tails.
        title: what is seen, shown on hovering.
        start, of: the place of the first bar on an axis that has room for `of` bars, which several
            cells share; by default it has room for these alone.
        size: width and height in pixels.
        colour: of the bars.
    """
    width, height = size
    step = width / max(len(counts) if of is None else of, 1)
    most = max([float(c) for c in counts], default=0.0)
    path = ""
    for i, c in enumerate(counts):
        if c > 0:
            tall = max((height - 2) * float(c) / most, 0.7)
            path += (
                f"M{(start + i) * step:.1f} {height - 1}v{-tall:.1f}h{0.9 * step:.2f}v{tall:.1f}z"
            )
    return Markup(
        f'<svg width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img">'
        f"<title>{escape(title)}</title>"
        f'<path d="M0 {height - 0.5}h{width}" stroke="#dcdad4"/><path d="{path}" fill="{colour}"/>'
        "</svg>"
    )


def image(array: np.ndarray, alt: str, low: float, high: float) -> Markup:
    """A picture (H, W), (H, W, 1) or (H, W, 3), dark for high values; pixels stay pixels.

    What is not finite is drawn in orange.

    Args:
        array: the numbers.
        alt: what it is, for those who cannot see it.
        low, high: the numbers that are white and black.
    """
    from matplotlib.image import imsave

    array = np.asarray(array, np.float64)
    share = np.asarray((array - low) / (high - low if high > low else 1))
    if array.ndim == 3 and array.shape[-1] == 3:
        rgb = np.clip(share, 0, 1)
    else:
        rgb = np.repeat(np.clip(1 - share.reshape(array.shape[:2])[..., None], 0, 1), 3, axis=-1)
    there = np.isfinite(rgb).all(axis=-1, keepdims=True)
    rgb = np.where(there, rgb, np.array([0xD5, 0x5E, 0]) / 255)
    out = BytesIO()
    imsave(out, np.round(255 * rgb).astype(np.uint8), format="png")
    data = base64.b64encode(out.getvalue()).decode("ascii")
    return Markup(f'<img alt="{escape(alt)}" src="data:image/png;base64,{data}">')


def cards(items: Iterable[tuple[str, str, bool]], *, text: bool = False) -> str:
    """Small cards in rows: (what is shown, what it says below, whether it stands out).

    With `text` they are wider, as words need it.
    """
    inside = (
        f"<figure{' class=odd' if odd else ''}>{plain(shown)}"
        f"<figcaption>{plain(said)}</figcaption></figure>"
        for shown, said, odd in items
    )
    return f'<div class="cards{" text" if text else ""}">{"".join(inside)}</div>'


def details(summary: str, *parts: str) -> str:
    """Parts that are folded away until one asks for them."""
    return f"<details><summary>{escape(summary)}</summary>\n" + "\n".join(parts) + "\n</details>"
