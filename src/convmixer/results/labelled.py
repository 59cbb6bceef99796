"""Labels drawn into an image: class names and probabilities on a dark band at its lower edge."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from convmixer.results.fonts import as_drawn, font_file

BAND, INK, BAR = (12, 14, 18, 190), (255, 255, 255, 255), (90, 170, 255, 150)
# pixels; smaller pictures are enlarged, larger ones reduced, so that names are legible
LEAST_SIDE, MOST_SIDE = 240, 4096


def with_labels(image: Image.Image, labels: Sequence[tuple[str, float]]) -> Image.Image:
    """Return an image in RGB with one line per label, scaled so that the labels are legible.

    Args:
        image: An image of any mode and size.
        labels: Class names with probabilities, 0 to 1, the likeliest first.
    """
    picture = _sized(image.convert("RGB"))
    width, height = picture.size
    line = max(14, min(height // 14, width // 12))
    names = [as_drawn(name, 40) for name, _ in labels]
    font = ImageFont.truetype(font_file("".join(names)), int(0.72 * line))
    band = Image.new("RGBA", (width, min(height, line * len(labels) + line // 4)), BAND)
    draw = ImageDraw.Draw(band)
    for number, (name, (_, share)) in enumerate(zip(names, labels, strict=True)):
        top = number * line + line // 8
        draw.rectangle((0, top, int(width * share), top + line - 2), fill=BAR)
        percent = f"{100 * share:.1f}%"
        right = width - line // 3 - draw.textlength(percent, font=font)
        middle = top + line / 2
        draw.text((line // 3, middle), _fitting(draw, name, font, right - line), font=font, fill=INK, anchor="lm")
        draw.text((right, middle), percent, font=font, fill=INK, anchor="lm")
    picture.paste(band, (0, height - band.height), band)
    return picture


def _sized(image: Image.Image) -> Image.Image:
    """Return an image whose shorter side is at least LEAST_SIDE, and whose longer side is at most MOST_SIDE."""
    scale = max(1.0, LEAST_SIDE / min(image.size))
    scale = min(scale, MOST_SIDE / max(image.size))
    if scale == 1.0:
        return image
    size = tuple(max(1, round(side * scale)) for side in image.size)
    return image.resize(size, Image.Resampling.NEAREST if scale > 4 else Image.Resampling.BICUBIC)  # type: ignore[arg-type]


def _fitting(draw: ImageDraw.ImageDraw, name: str, font: ImageFont.FreeTypeFont, room: float) -> str:
    """Return a name, shortened until it fits into a width."""
    for most in (40, 30, 20, 12, 8):
        short = as_drawn(name, most)
        if draw.textlength(short, font=font) <= room:
            return short
    return as_drawn(name, 5)
