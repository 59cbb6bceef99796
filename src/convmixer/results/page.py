"""Self-contained HTML pages: the template, tables that scroll, embedded pictures."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from convmixer.text import html as escape_html

SMALL = 64  # pixels; a picture that is no wider and no higher is not compressed as JPEG


def html_page(title: str, body: str) -> str:
    """Return a whole page.

    Args:
        title: Plain text.
        body: HTML; untrusted text in it is already escaped.
    """
    template = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
    return template.replace("<!-- title -->", escape_html(title)).replace("<!-- body -->", body)


def html_table(heads: Sequence[str], rows: Sequence[Sequence[str]], kind: str) -> str:
    """Return a table that scrolls sideways on a narrow screen.

    Args:
        heads: Texts above the columns; if all are empty, the table has no head.
        rows: Texts of the cells.
        kind: The table's class in the style sheet.
    """
    head = "".join(f"<th>{escape_html(h)}</th>" for h in heads) if any(heads) else ""
    lines = "".join("<tr>" + "".join(_cell(cell, heads[i]) for i, cell in enumerate(row)) + "</tr>" for row in rows)
    table = f'<table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>'
    return f'<div class="scroll" tabindex="0">{table}</div>'  # so that keys scroll it too


def _cell(text: str, head: str) -> str:
    kind = ""
    if head == "verdict":
        kind = f' class="{text[2:].replace(" ", "-")}"'
    label = f' data-head="{escape_html(head)}"' if head else ""
    return f"<td{kind}{label}>{escape_html(text)}</td>"


def figure(title: str, picture: str) -> str:
    """Return a picture (HTML of an img or svg) with its title below."""
    if picture.startswith("<svg "):
        picture = picture.replace("<svg ", f'<svg role="img" aria-label="{escape_html(title)}" ', 1)
    return f"<figure>{picture}<figcaption>{escape_html(title)}</figcaption></figure>"


def embedded(path: Path, title: str) -> str:
    """Return a PNG file as an img element; one with a background is framed in white."""
    with Image.open(path) as image:
        white = image.convert("RGBA").getpixel((0, 0))[3] != 0  # type: ignore[index]
    return _img(path.read_bytes(), "png", title, "white" if white else "")


def thumbnail(image: Image.Image, title: str, side: int) -> str:
    """Return an image as a small img element: PNG up to `SMALL` pixels, else JPEG.

    Args:
        image: An image of any mode and size.
        title: Alternative text of the image, plain.
        side: Largest allowed width and height, pixels.
    """
    small = image.convert("L" if image.mode == "L" else "RGB")
    if max(image.size) > side:
        scale = side / max(image.size)
        small = small.resize(
            (max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.BICUBIC
        )
    kind = "png" if max(image.size) <= SMALL else "jpeg"
    content = io.BytesIO()
    small.save(content, kind, quality=80)
    return _img(content.getvalue(), kind, title, "pixels" if kind == "png" else "")


def _img(content: bytes, kind: str, title: str, style: str) -> str:
    data = base64.b64encode(content).decode()
    return f'<img class="{style}" alt="{escape_html(title)}" src="data:image/{kind};base64,{data}">'
