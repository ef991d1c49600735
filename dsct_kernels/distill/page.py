"""What the HTML reports are made of: one page without anything from outside, for light and dark, wide and narrow."""

import base64
import html
import io
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from .pictures import pyplot

CSS = """
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #5c6370; --line: #d9dce1; --paper: #ffffff; --card: #f5f6f8;
  --accent: #0072b2; --up: #00664f; --down: #b03a00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --soft: #9aa2ae; --line: #353a42; --paper: #15171a;
  --card: #1e2125; --accent: #56b4e9; --up: #5fd3ac; --down: #ff9a5c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 72rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; margin: .5rem 0 0; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem; }
p { margin: .4rem 0; max-width: 46rem; } .soft, figcaption { color: var(--soft); }
.facts { display: flex; flex-wrap: wrap; gap: .6rem; margin: 1rem 0; }
.facts div { background: var(--card); border-radius: .5rem; padding: .5rem .9rem; min-width: 8rem; }
.facts b { display: block; font-size: 1.4rem; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; margin: .4rem 0; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--paper); }
thead th { color: var(--soft); font-weight: 600; }
.note { font-size: .8rem; }
.wrap td { white-space: normal; text-align: left; overflow-wrap: anywhere; }
td.heat { --c: color-mix(in srgb, var(--accent) calc(var(--v) * 70%), transparent); background: var(--c); }
.up { color: var(--up); } .down { color: var(--down); } .best { font-weight: 700; }
.tiles { display: grid; grid-template-columns: repeat(var(--columns), minmax(0, 1fr)); gap: .8rem;
  max-width: calc(var(--columns) * 16rem); }
.gap { display: block; }
@media (max-width: 46rem) { .tiles { grid-template-columns: 1fr 1fr; } .gap { display: none; } }
figure { margin: 0; } figcaption { font-size: .8rem; overflow-wrap: anywhere; }
figure img { width: 100%; display: block; border-radius: .25rem; image-rendering: pixelated; }
figure img.photo { image-rendering: auto; }
.plot svg { width: 100%; height: auto; min-width: 34rem; max-width: 60rem; color: var(--ink); }
.key { display: flex; flex-wrap: wrap; gap: .2rem 1rem; font-size: .85rem; margin: .4rem 0 .8rem; }
.key i { display: inline-block; width: .9em; height: .9em; margin-right: .35em; border: 1px solid var(--soft);
  border-radius: .15em; vertical-align: -.1em; }
details { margin: .4rem 0; } summary { cursor: pointer; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--card); padding: .6rem; border-radius: .4rem; }
"""

INK = "#010203"  # drawn in this colour, text and axes of a plot take that of the page


def text(value: object) -> str:
    return html.escape(str(value))


def document(title: str, body: Iterable[str]) -> bytes:
    parts = "\n".join(body)
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n{parts}\n</main>\n</body>\n</html>\n"
    )
    return page.encode("utf-8", "backslashreplace")  # a file name need not be valid text


def section(title: str, *body: str) -> str:
    return "\n".join((f"<h2>{text(title)}</h2>", *body))


def paragraph(words: str) -> str:
    return f'<p class="soft">{text(words)}</p>'


def facts(found: Iterable[tuple[str, str]]) -> str:
    cells = "".join(f"<div><span class='soft'>{text(name)}</span><b>{text(value)}</b></div>" for name, value in found)
    return f'<div class="facts">{cells}</div>'


def cell(value: object, kind: str = "", style: str = "") -> str:
    """A table's cell, for `table` to take as it is."""
    attributes = f' class="{kind}"' * bool(kind) + f' style="{style}"' * bool(style)
    return f"<td{attributes}>{text(value)}</td>"


def signed(value: float | None, digits: int = 3) -> str:
    """A cell with a difference, coloured by its sign."""
    if value is None:
        return cell("-")
    return cell(f"{value:+.{digits}f}", "up" if value > 0 else "down" if value < 0 else "")


def heat(value: float | None, words: str) -> str:
    """A cell as dark as its share, 0 to 1."""
    return cell(words) if value is None else cell(words, "heat", f"--v:{value:.3f}")


def table(heads: Sequence[object], rows: Iterable[Sequence[str]], caption: str = "", kind: str = "") -> str:
    """rows: of `cell`, `signed` and `heat`, each a whole <td>."""
    head = "".join(f"<th>{text(h)}</th>" for h in heads)
    body = "\n".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    below = f'<p class="soft note">{text(caption)}</p>' if caption else ""
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>{below}"
    )


def pairs(found: Iterable[tuple[object, object]]) -> str:
    """Names and values, one below the other."""
    return table(("", ""), ([cell(name), cell(value)] for name, value in found), kind="wrap")


def key(colours: Iterable[tuple[str, Sequence[int]]]) -> str:
    spans = (f'<span><i style="background:rgb({r},{g},{b})"></i>{text(name)}</span>' for name, (r, g, b) in colours)
    return f'<div class="key">{"".join(spans)}</div>'


def picture(pixels: np.ndarray, caption: str, photo: bool = False, longest: int = 640) -> str:
    """(H, W, 3) uint8, thinned to `longest`; a photograph as JPEG, anything else as PNG of few colours."""
    from PIL import Image

    thin = -(-max(pixels.shape[:2]) // longest)
    image = Image.fromarray(np.ascontiguousarray(pixels[::thin, ::thin]))
    buffer = io.BytesIO()
    if photo:
        image.save(buffer, "JPEG", quality=85)
    else:
        image.save(buffer, "PNG", optimize=True)
    encoded = base64.b64encode(buffer.getvalue()).decode()
    kind = "jpeg" if photo else "png"
    return (
        f'<figure><img{" class=photo" if photo else ""} alt="{text(caption)}" '
        f'src="data:image/{kind};base64,{encoded}"><figcaption>{text(caption)}</figcaption></figure>'
    )


GAP = '<span class="gap"></span>'  # an empty place, on wide screens only


def tiles(figures: Iterable[str], columns: int) -> str:
    """Side by side in so many columns; on narrow screens in two."""
    return f'<div class="tiles" style="--columns:{columns}">{"".join(figures)}</div>'


def plot(figure: Any) -> str:
    """A matplotlib figure as inline SVG that takes the colour of the page's text. Closes it."""
    plt = pyplot()
    for axis in figure.axes:
        for spine in axis.spines.values():
            spine.set_edgecolor(INK)
        axis.tick_params(colors=INK)
        axis.set_facecolor("none")
        for label in (axis.title, axis.xaxis.label, axis.yaxis.label):
            label.set_color(INK)
        legend = axis.get_legend()
        for label in legend.get_texts() if legend else ():
            label.set_color(INK)
    figure.patch.set_alpha(0)
    buffer = io.StringIO()
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "dsct", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns:xlink="[^"]*"| xmlns="[^"]*"| (?:width|height)="[\d.]+pt"', "", svg)
    svg = svg.replace("xlink:href", "href").replace(INK, "currentColor")
    return f'<div class="scroll plot">{svg}</div>'
