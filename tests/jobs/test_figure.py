"""The picture of a comparison: that it shows what is there, and does without what is not."""

import io

import numpy as np
import torch
from PIL import Image

from gdl_ray.images import png_grid
from jobs.figure import picture
from jobs.report import Entry

SPEED, DISTANCE = "efficiency/ms_per_sample_batch_64", "samples/frechet_distance"


def family(name: str, bits: dict[str, float], level: int) -> Entry:
    return Entry(
        name=name,
        figures=[{SPEED: 1.0, DISTANCE: 0.5, **bits}],
        curve=[(1.0, 3.0), (2.0, 2.5)] if bits else [],
        samples_png=png_grid(torch.full((20, 1, 8, 8), level, dtype=torch.uint8), 17, columns=10),
    )


ENTRIES = [
    family("vae", {"test/bits_per_dim_lower_bound_tight": 1.9}, 3),
    family("gan", {}, 16),
    Entry(name="training images", figures=[{DISTANCE: 0.3}], is_reference=True),
]


def pixels(entries: list[Entry]) -> "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]":
    return np.asarray(Image.open(io.BytesIO(picture("title", entries))).convert("RGB"))


def test_equal_comparisons_are_equal_files() -> None:
    assert picture("title", ENTRIES) == picture("title", ENTRIES)


def test_families_are_drawn_each_in_its_colour_with_their_samples() -> None:
    drawn = pixels(ENTRIES)
    for colour in ((0x00, 0x72, 0xB2), (0xE6, 0x9F, 0x00)):
        assert (drawn == colour).all(-1).sum() > 50
    shades = [round(255 * level / 16) for level in (3, 16)]
    below = drawn[drawn.shape[0] // 2 :]
    for shade in shades:
        assert (below == shade).all(-1).sum() > 1000


def test_families_without_likelihood_speed_or_distance_are_no_trouble() -> None:
    bare = Entry(name="bare", figures=[{}], samples_png=ENTRIES[0].samples_png)
    assert pixels([bare]).shape[-1] == 3
