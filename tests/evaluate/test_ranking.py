"""The order of models whose worth is known, and the rule on numbers."""

from typing import Any

import pytest
import torch

from gdl_ray.data import Dataset
from gdl_ray.evaluate.classifier import fit_classifier
from gdl_ray.evaluate.ranking import Standing, rank
from tests.bench.impostors import judge


def standing(distance: float, error: float = 0.0, is_memorised: bool = False) -> Standing:
    return Standing(distance=distance, error=error, is_memorised=is_memorised)


def test_the_nearer_is_the_better() -> None:
    rows = {"c": standing(0.3), "a": standing(-0.1), "b": standing(0.2)}
    assert rank(rows) == [(1, "a"), (2, "b"), (3, "c")]
    assert rank({}) == []


def test_what_is_within_two_errors_of_the_first_shares_its_place() -> None:
    # Errors of a difference are 0.05: 0.09 is within two of 0, 0.18 is not, though it is within two of 0.09.
    rows = {name: standing(x, e) for name, x, e in (("a", 0, 0.03), ("b", 0.09, 0.04), ("c", 0.18, 0.04))}
    assert rank(rows) == [(1, "a"), (1, "b"), (3, "c")]


def test_copies_have_no_place() -> None:
    rows = {"z copy": standing(-1, is_memorised=True), "copy": standing(0, is_memorised=True)}
    assert rank(rows | {"noise": standing(9)}) == [(1, "noise"), (None, "copy"), (None, "z copy")]


@pytest.mark.parametrize("split", ["validation", "test"])
def test_impostors_are_ranked_as_they_deserve(digits: Dataset, split: str, fitted: Any) -> None:
    found = judge(digits, fitted, split)
    order = rank({name: judgement.standing for name, judgement in found.items()})
    names = [name for _, name in order]
    assert names == [
        "held-out images",
        "mixture of 40 products",
        "blurred images",
        "uniform noise",
        "copies of training images",
    ]
    places = dict(zip(names, (place for place, _ in order), strict=True))
    assert places["held-out images"] == 1
    assert places["uniform noise"] == 4
    assert places["copies of training images"] is None
    # No distance tells a copy from an image that is new.
    copy, new = (found[name].kernel for name in ("copies of training images", "held-out images"))
    assert abs(copy[0] - new[0]) < 2 * (copy[1] + new[1])


@pytest.fixture(scope="module")
def fitted(digits: Dataset) -> Any:
    torch.set_num_threads(1)
    return fit_classifier(digits)
