"""Samples as pictures."""

import io
import math

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

_MIN_SIDE = 32  # smaller images are magnified: an 8x8 digit is a speck on a screen


def png_grid(x: Tensor, levels: int, columns: int = 0) -> bytes:
    """Lay images out in a grid, row by row.

    Args:
        x: uint8 (B, C, H, W) in [0, levels - 1], with 1 or 3 channels.
        levels: number of levels, shown from black to white.
        columns: images in a row; 0 makes the grid about square.

    Returns:
        A PNG file.
    """
    count, channels, height, width = x.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    cells = torch.zeros(rows * columns, channels, height + 1, width + 1, dtype=torch.uint8)
    cells[:count, :, :height, :width] = _shades(x, levels)
    grid = cells.view(rows, columns, channels, height + 1, width + 1).permute(0, 3, 1, 4, 2)
    pixels = grid.reshape(rows * (height + 1), columns * (width + 1), channels)[:-1, :-1]
    return _png(pixels.numpy(), scale=max(1, math.ceil(_MIN_SIDE / min(height, width))))


def png(image: Tensor, levels: int) -> bytes:
    """Write one image at its own size: uint8 (C, H, W) in [0, levels - 1], with 1 or 3 channels."""
    return _png(_shades(image, levels).permute(1, 2, 0).numpy(), scale=1)


def _shades(x: Tensor, levels: int) -> Tensor:
    return (x.float() * (255 / (levels - 1))).round().to(torch.uint8)


def _png(pixels: npt.NDArray[np.uint8], scale: int) -> bytes:
    image = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
    image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
