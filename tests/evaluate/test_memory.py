"""Neighbours against distances in double precision, z against SciPy, verdicts on sets that are known."""

import io
import math

import numpy as np
import pytest
import scipy.stats
import torch
from PIL import Image
from torch import Tensor

from gdl_ray.data import Dataset
from gdl_ray.evaluate import memory
from gdl_ray.evaluate.memory import Memorisation, mann_whitney_z, memorisation, nearest, neighbours_png
from gdl_ray.random import fold, normal, uniform


def images(seed: int, count: int, shape: tuple[int, ...] = (1, 5, 4), levels: int = 256) -> Tensor:
    return (uniform(fold(seed, torch.arange(count)), shape) * levels).to(torch.uint8)


@pytest.mark.parametrize("shape", [(1, 5, 4), (3, 20, 20)], ids=["few", "more than float32 adds up"])
@pytest.mark.parametrize("distances", [100, 10**6], ids=["in parts", "whole"])
def test_nearest_in_double_precision(
    shape: tuple[int, ...], distances: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_CHUNK_DISTANCES", distances)
    train, x = images(0, 50, shape), images(1, 30, shape)
    train[7], x[3], x[4] = 255, 0, 255  # as far from each other as can be, and a copy
    expected = torch.cdist(x.flatten(1).double(), train.flatten(1).double()).topk(3, largest=False)
    found, rows = nearest(train, x, k=3)
    assert found[4, 0] == 0
    torch.testing.assert_close(found.double(), expected.values, rtol=1e-6, atol=1e-4)
    assert torch.equal(rows, expected.indices)


def test_the_farthest_images_are_as_far_as_they_are() -> None:
    black, white = torch.zeros(2, 1, 64, 64, dtype=torch.uint8), torch.full((1, 1, 64, 64), 255).byte()
    assert nearest(black, white)[0].tolist() == [[255 * 64, 255 * 64]]


def test_a_neighbour_that_differs_by_one_level_is_told_from_a_copy() -> None:
    train = images(0, 40, (1, 28, 28))
    other = train.clone()
    other[:, 0, 5, 5] = torch.where(other[:, 0, 5, 5] > 0, other[:, 0, 5, 5] - 1, 1)
    found, rows = nearest(torch.cat([other, train]), train)
    assert found.tolist() == [[0.0, 1.0]] * 40
    assert torch.equal(rows, torch.arange(40)[:, None] + torch.tensor([40, 0]))


def test_more_neighbours_than_there_are_images_are_refused() -> None:
    with pytest.raises(ValueError, match="k=2 must lie between 1 and the number of training images, 1"):
        nearest(images(0, 1), images(1, 3))


@pytest.mark.parametrize("levels", [0, 4], ids=["continuous", "tied"])
def test_mann_whitney_as_scipy_has_it(levels: int) -> None:
    a, b = normal(fold(0, torch.arange(70)), ()) - 0.3, normal(fold(1, torch.arange(90)), ())
    if levels:
        a, b = (a * levels).round(), (b * levels).round()
    options = {"alternative": "less", "method": "asymptotic", "use_continuity": False}
    p = scipy.stats.mannwhitneyu(a.double().numpy(), b.double().numpy(), **options).pvalue
    assert mann_whitney_z(a, b) == pytest.approx(scipy.stats.norm.ppf(p), rel=1e-6)
    assert mann_whitney_z(b, a) == pytest.approx(-mann_whitney_z(a, b))


def test_equal_values_tell_nothing() -> None:
    assert mann_whitney_z(torch.ones(3), torch.ones(4)) == 0


def judged(digits: Dataset, samples: Tensor) -> Memorisation:
    train, test = (torch.tensor(digits.splits[name].x) for name in ("train", "test"))
    return memorisation(nearest(train, test)[0], nearest(train, samples)[0])


def test_copies_of_the_training_split_are_told_from_images_like_it(digits: Dataset) -> None:
    train, validation = (torch.tensor(digits.splits[name].x) for name in ("train", "validation"))
    copies, new = train[:100], validation[:100]
    assert judged(digits, copies).copied_share == 1
    assert judged(digits, copies).z < -10
    assert judged(digits, copies).is_memorised
    assert judged(digits, new).copied_share <= 0.03
    assert abs(judged(digits, new).z) < 3
    assert not judged(digits, new).is_memorised
    # A copy hides neither behind a little noise nor among nine others.
    noise = 3 * uniform(fold(0, torch.arange(100)), digits.spec.shape) - 1.5
    assert judged(digits, (copies + noise).clamp(0, 16).round().to(torch.uint8)).copied_share > 0.9
    assert judged(digits, torch.cat([copies[:10], new[:90]])).is_memorised
    assert not judged(digits, images(2, 100, (1, 8, 8), 17)).is_memorised


def test_nearer_than_held_out_images_is_not_yet_a_copy() -> None:
    # Data on a wide square; samples from its middle alone are as new, but have neighbours all around.
    train, held_out = (normal(fold(i, torch.arange(2000)), (2,)) for i in (0, 1))
    samples = 0.3 * normal(fold(2, torch.arange(2000)), (2,))
    found = memorisation(*(torch.cdist(x, train).topk(2, largest=False).values for x in (held_out, samples)))
    assert found.z < -10
    assert found.copied_share < 0.03
    assert not found.is_memorised


def test_a_hundredth_of_held_out_images_are_copies_by_chance() -> None:
    held_out = normal(fold(0, torch.arange(1000)), (2,)).abs().sort(1).values
    others = normal(fold(1, torch.arange(1000)), (2,)).abs().sort(1).values
    assert memorisation(held_out, held_out).copied_share == pytest.approx(0.01)
    found = memorisation(held_out, others)
    assert found.copied_share == pytest.approx(0.01, abs=4 * math.sqrt(2 * 0.01 / 1000))


def test_data_that_repeat_themselves_are_not_accused() -> None:
    held_out = torch.tensor([[0.0, 1.0]] * 10 + [[1.0, 1.1]] * 90)  # a tenth is in the training split
    assert memorisation(held_out, held_out).copied_share == pytest.approx(0.1)
    assert not memorisation(held_out, held_out).is_memorised
    assert memorisation(held_out, torch.zeros(50, 2)).is_memorised


def test_pairs_stand_side_by_side() -> None:
    samples, train = images(0, 3, (1, 32, 32), 17), images(1, 3, (1, 32, 32), 17)
    with Image.open(io.BytesIO(neighbours_png(samples, train, 17))) as picture:
        shades = np.asarray(picture).astype(float) / 255 * 16
    # Two pairs in a row, a pixel between any two images.
    for i, (sample, neighbour) in enumerate(zip(samples, train, strict=True)):
        y, x = 33 * (i // 2), 66 * (i % 2)
        for image, left in ((sample, x), (neighbour, x + 33)):
            np.testing.assert_allclose(shades[y : y + 32, left : left + 32], image[0], atol=0.05)
