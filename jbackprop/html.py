"""One self-contained HTML page: no script, no font and no picture comes from elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from io import StringIO
from typing import Any

_STYLE = """
:root { color-scheme: light; --ink: #1c1c1a; --dim: #6b6b66; --line: #dcdad4; --soft: #f5f4f0; }
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
figcaption { color: var(--dim); font-size: .88rem; }
details { margin: .8rem 0; }
summary { cursor: pointer; }
code, pre { font: .84rem/1.4 ui-monospace, monospace; background: var(--soft); }
"""


def page(title: str, *parts: str) -> str:
    """The whole document, of parts made by the functions below."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body>\n<h1>{escape(title)}</h1>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def heading(text: str, level: int = 2) -> str:
    """A heading."""
    return f"<h{level}>{escape(text)}</h{level}>"


def paragraph(text: str) -> str:
    """A paragraph of plain text."""
    return f"<p>{escape(text)}</p>"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "") -> str:
    """A table; as in `jbackprop.table` a column named ">..." is aligned to the right."""
    sides = [' class="n"' if column.startswith(">") else "" for column in columns]

    def line(cells: Sequence[str], tag: str) -> str:
        inside = (
            f"<{tag}{side}>{escape(cell.lstrip('>') if tag == 'th' else cell)}</{tag}>"
            for cell, side in zip(cells, sides, strict=True)
        )
        return f"<tr>{''.join(inside)}</tr>"

    head = f"<caption>{escape(caption)}</caption>" if caption else ""
    body = "\n".join(line(row, "td") for row in rows)
    return (
        f'<div class="wide"><table>{head}<thead>{line(columns, "th")}</thead>\n'
        f"<tbody>{body}</tbody></table></div>"
    )


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
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def details(summary: str, *parts: str) -> str:
    """Parts that are folded away until one asks for them."""
    return (
        f"<details><summary>{escape(summary)}</summary>\n" + "\n".join(parts) + "\n</details>"
    )
