"""The page of a report: semantic HTML and plain CSS in one file that asks nobody for anything."""

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from grn_lightning.scripts.judging import KINDS
from grn_lightning.scripts.records import Figure, Picture
from grn_lightning.scripts.report_curves import Chart

GENERATOR = "grn report"
"""Marks a file as one that may be written anew."""

_MAX_PICTURE_BYTES = 4_000_000  # of all pictures together; curves and text need far less
_FEW_PIXELS = 64  # a picture of this height is enlarged without smoothing
_TYPES = {"PNG": "image/png", "GIF": "image/gif"}

_STYLE = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --ink: #1c1e21; --muted: #62676e; --line: #dfe2e6; --panel: #f5f6f8;
  --accent: #1f62d6; --good: #14784f; --bad: #b3402a;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14161a; --ink: #e7e9ec; --muted: #9aa1ab; --line: #2e333b; --panel: #1c1f25;
    --accent: #7fb0ff; --good: #5cc79a; --bad: #f0937d;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 66rem;
  background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  -webkit-text-size-adjust: 100%;
}
h1 {
  margin: 0; font-size: clamp(1.6rem, 4.5vw, 2.3rem); line-height: 1.15; letter-spacing: -.02em; }
h2 { margin: 3.2rem 0 .3rem; font-size: 1.35rem; line-height: 1.25; letter-spacing: -.01em; }
h3 { margin: 1.8rem 0 .3rem; font-size: 1rem; line-height: 1.35; }
p { margin: .3rem 0 .9rem; max-width: 44rem; text-wrap: pretty; }
.muted, figcaption, .meaning { color: var(--muted); }
code, pre { font: .85em/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
code { overflow-wrap: anywhere; }
pre {
  margin: .5rem 0 1rem; padding: .8rem 1rem; overflow-x: auto; background: var(--panel);
  border: 1px solid var(--line); border-radius: .5rem;
}
figure { margin: 0; }
img, svg { display: block; width: 100%; height: auto; }
img { border-radius: .25rem; }
img.pixels { image-rendering: pixelated; }
.grid { display: grid; gap: 1.1rem .8rem; margin: 1.1rem 0 0; padding: 0; list-style: none; }
.samples { grid-template-columns: repeat(auto-fill, minmax(min(6.2rem, 28vw), 1fr)); }
@media (min-width: 50rem) { .samples { grid-template-columns: repeat(6, 1fr); } }
.triples { grid-template-columns: repeat(auto-fill, minmax(min(46%, 17rem), 1fr)); }
.charts {
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); gap: 2rem 1.6rem; }
figcaption { margin-top: .4rem; font-size: .84rem; line-height: 1.35; overflow-wrap: break-word; }
.panels { grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); gap: 1.6rem; }
.panels img, .scroll img { background: #fff; }
.charts figcaption { margin: 0 0 .35rem; color: var(--ink); font-weight: 600; font-size: .9rem; }
.good { color: var(--good); } .bad { color: var(--bad); }
.reading { display: block; }
table { width: 100%; border-collapse: collapse; font-size: .93rem; }
caption { padding: 0 0 .6rem; text-align: left; color: var(--muted); font-size: .88rem; }
th, td {
  padding: .5rem 0; border-top: 1px solid var(--line); text-align: left; vertical-align: top;
  font-weight: 400;
}
@media (max-width: 36rem) {
  .matrix tr { display: grid; grid-template-columns: repeat(3, 1fr); }
  .matrix th[scope=row] { grid-column: 1 / -1; padding-bottom: .1rem; }
  .matrix tbody td { border-top: 0; padding-top: .1rem; }
  .matrix thead td { display: none; }
}
table + table { margin-top: 1.4rem; }
th code { color: var(--muted); font-size: .8em; }
thead td, thead th { padding: 0 0 .35rem; border-top: 0; color: var(--muted); font-size: .84rem; }
td + td, th + td, td + th, th + th { padding-left: .9rem; }
td.number, th.number {
  text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
td.number { font-weight: 600; }
.meaning { display: block; font-size: .84rem; line-height: 1.4; }
.scroll { overflow-x: auto; }
.scroll img { width: auto; max-width: none; margin-top: .6rem; }
details { margin: .4rem 0; } summary { cursor: pointer; color: var(--accent); }
.missing { padding: .7rem 1rem; background: var(--panel); border-radius: .5rem; max-width: none; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.2rem; margin: .6rem 0; }
dt { color: var(--muted); } dd { margin: 0; overflow-wrap: anywhere; }
"""


class Panel(NamedTuple):
    """A picture that is not in a file, and what it says."""

    data: bytes
    """PNG or GIF."""
    caption: str
    """A sentence or two."""


class Page:
    """Collects the parts of a page, from top to bottom."""

    def __init__(self, title: str):
        self.title = title
        self.parts: list[str] = []
        self._picture_bytes = 0
        self._charts = 0
        self.left_out: list[Path] = []

    # --- text -------------------------------------------------------------------------------------

    def add(self, html: str) -> None:
        """Append HTML that is known to be right."""
        self.parts.append(html)

    def heading(self, text: str, *, level: int = 2) -> None:
        """Append a heading."""
        self.add(f"<h{level}>{escape(text)}</h{level}>")

    def paragraph(self, text: str, *, kind: str = "") -> None:
        """Append a paragraph; what stands between backticks is code."""
        pieces = escape(text).split("`")
        marked = "".join(
            f"<code>{piece}</code>" if number % 2 else piece for number, piece in enumerate(pieces)
        )
        self.add(f'<p class="{kind}">{marked}</p>' if kind else f"<p>{marked}</p>")

    def missing(self, what: str, command: str) -> None:
        """Say in one line what is not there and which command makes it."""
        self.paragraph(f"{what}: `{command}` makes it.", kind="missing")

    def code(self, text: str, *, summary: str = "") -> None:
        """Append preformatted text, folded away if it has a summary."""
        block = f"<pre><code>{escape(text.strip())}</code></pre>"
        if summary:
            block = f"<details><summary>{escape(summary)}</summary>{block}</details>"
        self.add(block)

    def facts(self, facts: Iterable[tuple[str, str]]) -> None:
        """Append a list of names and values."""
        rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts)
        self.add(f"<dl>{rows}</dl>")

    def table(
        self,
        header: Sequence[str],
        rows: Iterable[Sequence[str]],
        caption: str = "",
        *,
        kind: str = "",
    ) -> None:
        """Append a table whose columns but the first are numbers; cells are HTML."""
        first, *others = header
        head = f'<td class="muted">{first}</td>'
        head += "".join(f'<th scope="col" class="number">{name}</th>' for name in others)
        lines = []
        for name, *values in rows:
            cells = "".join(f'<td class="number">{value}</td>' for value in values)
            lines.append(f'<tr><th scope="row">{name}</th>{cells}</tr>')
        self.add(
            f"<table{f' class={kind}' if kind else ''}>"
            f"{f'<caption>{escape(caption)}</caption>' if caption else ''}"
            f"{f'<thead><tr>{head}</tr></thead>' if any(header) else ''}"
            f"<tbody>{''.join(lines)}</tbody></table>"
        )

    def figures(self, caption: str, figures: Sequence[Figure]) -> None:
        """Append numbers with protocol and meaning; what is judged alike stands in one row."""
        matrix: dict[str, dict[str, str]] = {}
        rest = []
        for figure in figures:
            kinds = [kind for kind in KINDS if kind in figure.protocol]
            protocol = [part for part in figure.protocol if part not in kinds]
            name = named(figure.name, "; ".join([figure.meaning, *figure.caveats]), protocol)
            if kinds:
                matrix.setdefault(name, {})[kinds[0]] = escape(figure.text)
            else:
                rest.append((name, escape(figure.text)))
        columns = [kind for kind in KINDS if any(kind in row for row in matrix.values())]
        if columns:
            rows = [
                [name, *(row.get(kind, "") for kind in columns)] for name, row in matrix.items()
            ]
            self.table(["", *columns], rows, caption, kind="matrix")
        self.table(["", ""], rest, "" if columns else caption)

    # --- pictures ---------------------------------------------------------------------------------

    def _image(self, file: Path, alt: str) -> str | None:
        """Return an image element with the file inside, or None if the page would get too large."""
        image = self._image_of(file.read_bytes(), alt)
        if image is None:
            self.left_out.append(file)
        return image

    def _image_of(self, data: bytes, alt: str) -> str | None:
        if self._picture_bytes + len(data) > _MAX_PICTURE_BYTES:
            return None
        self._picture_bytes += len(data)
        with Image.open(io.BytesIO(data)) as picture:
            width, height = picture.size
            media_type = _TYPES[str(picture.format)]
        kind = ' class="pixels"' if height <= _FEW_PIXELS else ""
        source = f"data:{media_type};base64,{base64.b64encode(data).decode()}"
        size = f'width="{width}" height="{height}"'
        return f'<img{kind} {size} alt="{escape(alt, quote=True)}" src="{source}">'

    def wide_picture(self, data: bytes, alt: str) -> None:
        """Append a wide picture, PNG or GIF, which scrolls where there is no room."""
        image = self._image_of(data, alt)
        if image is not None:
            self.add(f'<div class="scroll">{image}</div>')

    def panels(self, panels: Iterable[Panel]) -> None:
        """Append a grid of drawings that are pictures."""
        cells = []
        for panel in panels:
            image = self._image_of(panel.data, panel.caption)
            if image is not None:
                caption = f"<figcaption>{escape(panel.caption)}</figcaption>"
                cells.append(f"<figure>{image}{caption}</figure>")
        self.add(f'<div class="grid panels">{"".join(cells)}</div>')

    def folded_picture(self, file: Path, summary: str) -> None:
        """Append a wide picture, folded away, which scrolls where there is no room."""
        image = self._image(file, summary)
        if image is not None:
            self.add(
                f"<details><summary>{escape(summary)}</summary>"
                f'<div class="scroll">{image}</div></details>'
            )

    def pictures(self, root: Path, pictures: Iterable[Picture], *, kind: str) -> None:
        """Append a grid of captioned pictures; `kind` is "samples" or "triples"."""
        cells = []
        for picture in pictures:
            image = self._image(root / picture.file, picture.caption)
            if image is not None:
                caption = escape(picture.caption) + _reading(picture)
                cells.append(f"<li><figure>{image}<figcaption>{caption}</figcaption></figure></li>")
        self.add(f'<ul class="grid {kind}">{"".join(cells)}</ul>')

    def charts(self, charts: Iterable[Chart]) -> None:
        """Append a grid of drawings."""
        cells = []
        for chart in charts:
            self._charts += 1
            svg, own = chart.svg, f"c{self._charts}-"  # ids must be unique on a page
            for mark in ('id="', 'href="#', "url(#"):
                svg = svg.replace(mark, mark + own)
            cells.append(f"<figure><figcaption>{escape(chart.title)}</figcaption>{svg}</figure>")
        self.add(f'<div class="grid charts">{"".join(cells)}</div>')

    # --- the whole --------------------------------------------------------------------------------

    def html(self) -> str:
        """Return the page."""
        body = "\n".join(self.parts)
        return (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f'<meta name="generator" content="{GENERATOR}">\n'
            f"<title>{escape(self.title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
            f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
        )


def named(name: str, meaning: str, protocol: Sequence[str] = ()) -> str:
    """Return a name as HTML, with its protocol beside it and what it means below."""
    code = f"<wbr><code>[{',<wbr>'.join(map(escape, protocol))}]</code>" if protocol else ""
    below = f'<span class="meaning">{escape(meaning)}</span>' if meaning else ""
    return escape(name) + code + below


def _reading(picture: Picture) -> str:
    """Return what the judge made of a sample, with a sign that needs no colour."""
    if picture.is_right is None:
        return ""
    if picture.is_right:
        return ' <span class="good" title="the judge agrees">✓</span>'
    return f'<span class="reading bad">✗ read as {escape(picture.reading)}</span>'
