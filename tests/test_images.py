"""Pictures are read back by the library that did not draw them pixel by pixel."""

import io

import numpy as np
import torch
from PIL import Image

from gdl_ray.images import png_grid


def decode(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


def test_grid_places_each_image_and_spans_black_to_white() -> None:
    x = torch.zeros(3, 1, 40, 32, dtype=torch.uint8)
    x[1], x[2] = 16, 8
    pixels = decode(png_grid(x, levels=17))
    assert pixels.shape == (81, 65)
    assert (pixels[:40, 33:] == 255).all()
    assert (pixels[41:, :32] == 128).all()
    assert (pixels[:40, :32] == 0).all()


def test_small_and_coloured_images_are_magnified() -> None:
    x = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pixels = decode(png_grid(x, levels=256, columns=2))
    assert pixels.shape == (8 * 4, 17 * 4, 3)
    assert np.array_equal(pixels[::4, :32:4], x[0].permute(1, 2, 0).numpy())
