"""PIL's image operations on whole batches of uint8 images, on any device, each image with its own parameters.

Tables, blends and nearest sampling give exactly PIL's bytes; bilinear, bicubic and resizing differ by at most one
level, because PIL rounds in fixed point. Nothing here is random and nothing waits for the device. Library
convolutions and TF32 products are not used, because they round differently on a GPU.
"""

import contextlib
from collections.abc import Collection, Iterator

import torch
from torch import Tensor

NEAREST, BILINEAR, BICUBIC = 0, 1, 2


def look_up(images: Tensor, tables: Tensor) -> Tensor:
    """Return images (B, C, H, W) with each value looked up in tables (B, C or 1, 256), both uint8."""
    B, C, H, W = images.shape
    values = tables.expand(B, C, 256).gather(2, images.flatten(2).long())
    return values.view(B, C, H, W)


def blend(degenerate: Tensor, images: Tensor, factor: Tensor) -> Tensor:
    """Return degenerate + factor * (images - degenerate), as PIL's blend; factor (B,) may be above 1."""
    base = degenerate.float()
    mixed = base + factor.float()[:, None, None, None] * (images.float() - base)
    return mixed.clamp(0, 255).to(torch.uint8)


def grey(images: Tensor) -> Tensor:
    """Return PIL's mode L of images, (B, 1, H, W)."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.int().split(1, 1)
    return ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16).to(torch.uint8)


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    return blend(torch.zeros_like(images), images, factor)


def color(images: Tensor, factor: Tensor) -> Tensor:
    return blend(grey(images).expand_as(images), images, factor)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    L = grey(images)
    pixels = L.shape[2] * L.shape[3]
    mean = (L.flatten(1).long().sum(1) * 2 + pixels) // (2 * pixels)  # rounded as int(mean + 0.5)
    return blend(mean[:, None, None, None].expand_as(images), images, factor)


def sharpness(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with PIL's SMOOTH of the images, which does not change the border."""
    H, W = images.shape[2:]
    smooth = images.clone()
    if min(H, W) > 2:
        levels = images.int()
        rows = levels[:, :, :-2] + levels[:, :, 1:-1] + levels[:, :, 2:]
        sums = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * levels[:, :, 1:-1, 1:-1]
        smooth[:, :, 1:-1, 1:-1] = ((2 * sums + 13) // 26).to(torch.uint8)
    return blend(smooth, images, factor)


def invert_tables(values: Tensor) -> Tensor:
    return (255 - _levels(values)).expand(len(values), 256).to(torch.uint8)


def posterize_tables(bits: Tensor) -> Tensor:
    """Return the tables that keep that many upper bits, (B, 256)."""
    return (_levels(bits) & ~((1 << (8 - bits.long()[:, None])) - 1)).to(torch.uint8)


def solarize_tables(first: Tensor) -> Tensor:
    """Return the tables that invert the levels from `first` on, (B, 256)."""
    levels = _levels(first)
    return torch.where(first[:, None] > levels, levels, 255 - levels).to(torch.uint8)


def solarize_add_tables(added: Tensor) -> Tensor:
    """Return the tables that add to the levels below 128, (B, 256)."""
    levels = _levels(added)
    return torch.where(levels < 128, (levels + added.long()[:, None]).clamp(max=255), levels).to(torch.uint8)


def _levels(values: Tensor) -> Tensor:
    return torch.arange(256, device=values.device)[None]


def histograms(images: Tensor) -> Tensor:
    """Return how often each level occurs, int64 (B, C, 256)."""
    B, C = images.shape[:2]
    values = images.flatten(2).long()
    return torch.zeros((B, C, 256), dtype=torch.int64, device=images.device).scatter_add_(
        2, values, torch.ones_like(values)
    )


def autocontrast_tables(images: Tensor) -> Tensor:
    """Return the tables that spread each channel from 0 to 255, (B, C, 256)."""
    flat = images.flatten(2).double()
    low, high = flat.amin(2, keepdim=True), flat.amax(2, keepdim=True)
    levels = torch.arange(256, device=images.device, dtype=torch.float64)
    scale = 255.0 / (high - low).clamp(min=1)
    spread = (levels * scale - low * scale).trunc().clamp(0, 255)
    return torch.where(high > low, spread, levels).to(torch.uint8)


def equalize_tables(images: Tensor) -> Tensor:
    """Return the tables that make each channel's levels equally frequent, (B, C, 256)."""
    counts = histograms(images)
    levels = torch.arange(256, device=images.device)
    last = torch.where(counts > 0, levels, -1).amax(2, keepdim=True)
    step = (counts.sum(2, keepdim=True) - counts.gather(2, last)) // 255
    before = counts.cumsum(2) - counts
    spread = ((step // 2 + before) // step.clamp(min=1)).clamp(max=255)
    return torch.where(step > 0, spread, levels).to(torch.uint8)


def affine(
    images: Tensor,
    matrix: Tensor,
    sampling: Tensor,
    fill: Tensor,
    filters: Collection[int] = (NEAREST, BILINEAR, BICUBIC),
) -> Tensor:
    """Return images sampled at the positions of PIL's AFFINE, with `fill` outside the image.

    Args:
        images: (B, C, H, W) uint8.
        matrix: float64 (B, 6), from output to input in pixels, as PIL takes it.
        sampling: (B,), NEAREST, BILINEAR or BICUBIC.
        fill: (C,) uint8.
        filters: The filters that may occur in `sampling`; fewer filters take less time.
    """
    if set(filters) == {NEAREST}:
        return _nearest(images, matrix, fill)
    smooth = _smooth(images, matrix, sampling, fill)
    if NEAREST not in filters:
        return smooth
    return torch.where((sampling == NEAREST)[:, None, None, None], _nearest(images, matrix, fill), smooth)


def _grid(images: Tensor) -> tuple[Tensor, Tensor]:
    H, W = images.shape[2:]
    return torch.arange(W, device=images.device)[None, None], torch.arange(H, device=images.device)[None, :, None]


def _take(images: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Return the pixels (B, C, ...) at columns x and rows y, (B, ...), clamped to the image."""
    B, C, H, W = images.shape
    at = y.clamp(0, H - 1) * W + x.clamp(0, W - 1)
    return images.flatten(2).gather(2, at.flatten(1)[:, None].expand(B, C, -1)).view(B, C, *at.shape[1:])


def _nearest(images: Tensor, matrix: Tensor, fill: Tensor) -> Tensor:
    """Sample the nearest pixel; positions are in 16.16 fixed point, as in PIL."""
    H, W = images.shape[2:]
    a = matrix.double()
    start = torch.stack((a[:, 2] + a[:, 0] * 0.5 + a[:, 1] * 0.5, a[:, 5] + a[:, 3] * 0.5 + a[:, 4] * 0.5), 1)
    fixed = [(v * 65536 + 0.5).floor().long() for v in (start, a)]
    x, y = _grid(images)
    first, steps = fixed[0][:, :, None, None], fixed[1][:, :, None, None]
    across = (first[:, 0] + x * steps[:, 0] + y * steps[:, 1]) >> 16
    down = (first[:, 1] + x * steps[:, 3] + y * steps[:, 4]) >> 16
    inside = ((across >= 0) & (across < W) & (down >= 0) & (down < H))[:, None]
    return torch.where(inside, _take(images, across, down), fill[None, :, None, None])


def _smooth(images: Tensor, matrix: Tensor, sampling: Tensor, fill: Tensor) -> Tensor:
    H, W = images.shape[2:]
    x, y = _grid(images)
    a = matrix.double()[:, :, None, None]
    across = a[:, 0] * (x + 0.5) + a[:, 1] * (y + 0.5) + a[:, 2]
    down = a[:, 3] * (x + 0.5) + a[:, 4] * (y + 0.5) + a[:, 5]
    inside = ((across >= 0) & (across < W) & (down >= 0) & (down < H))[:, None]
    left, top = (across - 0.5).floor(), (down - 0.5).floor()
    cubic = (sampling == BICUBIC)[:, None, None, None]
    columns, rows = _taps(across - 0.5 - left, cubic), _taps(down - 0.5 - top, cubic)
    values = torch.zeros(images.shape, dtype=torch.float32, device=images.device)
    four = torch.arange(-1, 3, device=images.device)[:, None, None]
    for j in range(4):
        taken = _take(images, left.long()[:, None] + four, top.long()[:, None] + (j - 1))  # (B, C, 4, H, W)
        values += rows[:, j, None] * (columns[:, None] * taken).sum(2)
    return torch.where(inside, values.add(1e-3).clamp(0, 255).to(torch.uint8), fill[None, :, None, None])


def _taps(d: Tensor, cubic: Tensor) -> Tensor:
    """Return the weights of four neighbours, (B, 4, H, W), for distances (B, H, W); bicubic has a = -1."""
    linear = torch.stack((torch.zeros_like(d), 1 - d, d, torch.zeros_like(d)), 1)
    square, cube = d * d, d * d * d
    spline = torch.stack((-d + 2 * square - cube, 1 - 2 * square + cube, d + square - cube, -square + cube), 1)
    return torch.where(cubic, spline, linear).float()


def resized_crop(images: Tensor, boxes: Tensor, sampling: Tensor) -> Tensor:
    """Return crops scaled up to the size of the images, by the separable filters of PIL's resize.

    Args:
        images: (B, C, S, S) uint8.
        boxes: (B, 4): top, left, height and width of each crop, inside the image.
        sampling: (B,), BILINEAR or BICUBIC.
    """
    top, left, height, width = boxes.double().unbind(1)
    side = images.shape[3]
    across = _filters(left, width, side, sampling)
    down = _filters(top, height, images.shape[2], sampling)
    with _exact():
        values = torch.einsum("bchw,bxw->bchx", images.float(), across).round().clamp(0, 255)
        return torch.einsum("bchx,byh->bcyx", values, down).round().clamp(0, 255).to(torch.uint8)


@contextlib.contextmanager
def _exact() -> Iterator[None]:
    """Switch TF32 off, because the augmentation of a run in tf32 is still computed in fp32."""
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, False
    try:
        yield
    finally:
        matmul.allow_tf32 = before


def _filters(first: Tensor, length: Tensor, side: int, sampling: Tensor) -> Tensor:
    """Return the weights of all input pixels for each output pixel, (B, side, side)."""
    places = torch.arange(side, device=first.device, dtype=torch.float64)
    center = (places + 0.5)[None, :, None] * (length / side)[:, None, None]
    at = places[None, None] - first[:, None, None]  # in the crop
    d = (at + 0.5 - center).abs()
    linear = (1 - d).clamp(min=0)
    near, far = (1.5 * d - 2.5) * d * d + 1, ((-0.5 * d + 2.5) * d - 4) * d + 2  # a = -0.5
    cubic = torch.where(d < 1, near, torch.where(d < 2, far, 0.0))
    weights = torch.where((sampling == BICUBIC)[:, None, None], cubic, linear)
    weights = torch.where((at >= 0) & (at < length[:, None, None]), weights, 0.0)
    return (weights / weights.sum(2, keepdim=True)).float()


def shifted(images: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Return images (B, C, H, W), each shifted by `down` and `right` pixels, (B,), and mirrored at the border."""
    H, W = images.shape[2:]
    x, y = _grid(images)
    across, along = x + right[:, None, None], y + down[:, None, None]
    return _take(images, _mirror(across, W).expand(-1, H, -1), _mirror(along, H).expand(-1, -1, W))


def _mirror(at: Tensor, side: int) -> Tensor:
    at = at.abs()
    return torch.where(at >= side, 2 * (side - 1) - at, at)
