"""The classifier: good, the same each time, standardised, and indifferent to what is read beside an image."""

from dataclasses import replace

import pytest
import torch

from gdl_ray.data import Dataset
from gdl_ray.evaluate import classifier as module
from gdl_ray.evaluate.classifier import FEATURES, Classifier, fit_classifier
from gdl_ray.family import DataSpec
from gdl_ray.random import fold, uniform


@pytest.fixture(scope="module")
def fitted(digits: Dataset) -> Classifier:
    torch.set_num_threads(1)
    return fit_classifier(digits)


def test_it_tells_digits_it_has_not_seen(digits: Dataset, fitted: Classifier) -> None:
    split = digits.splits["validation"]
    right = fitted.predict(torch.tensor(split.x)) == torch.tensor(split.y)
    assert right.double().mean() >= 0.95


def test_features_are_in_units_of_the_training_split(digits: Dataset, fitted: Classifier) -> None:
    features = fitted.features(torch.tensor(digits.splits["train"].x))
    assert features.shape == (len(digits.splits["train"]), FEATURES)
    torch.testing.assert_close(features.mean(0), torch.zeros(FEATURES), atol=1e-4, rtol=0)
    torch.testing.assert_close(features.std(0), torch.ones(FEATURES), atol=1e-4, rtol=0)


def test_images_are_read_one_by_one(
    digits: Dataset, fitted: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.tensor(digits.splits["validation"].x)
    features, labels = fitted.features(x), fitted.predict(x)
    monkeypatch.setattr(module, "_CHUNK", 7)
    torch.testing.assert_close(fitted.features(x), features, atol=1e-4, rtol=0)
    assert torch.equal(fitted.predict(x), labels)
    assert not features.requires_grad


def test_weights_are_a_function_of_data_and_seed(digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_STEPS", 20)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = fit_classifier(digits)
    assert torch.equal(torch.get_rng_state(), before)  # it leaves the generator of others alone
    torch.manual_seed(2)
    second, other = fit_classifier(digits), fit_classifier(digits, seed=1)
    assert all(torch.equal(first.state_dict()[name], value) for name, value in second.state_dict().items())
    assert first.fingerprint() == second.fingerprint() != other.fingerprint()


@pytest.mark.parametrize("shape", [(1, 2, 2), (3, 12, 10), (1, 13, 9), (3, 64, 33)])
def test_images_of_any_size_have_features(shape: tuple[int, ...]) -> None:
    spec = DataSpec(name="any", kind="image", shape=shape, levels=256, classes=3)
    x = (uniform(fold(0, torch.arange(5)), shape) * 256).to(torch.uint8)
    features, labels = Classifier(spec).features(x), Classifier(spec).predict(x)
    assert features.shape == (5, FEATURES)
    assert features.isfinite().all()
    assert features.std(0).min() > 0  # it sees the images
    assert labels.shape == (5,)
    assert labels.max() < 3


def test_data_without_labels_are_refused(digits: Dataset) -> None:
    with pytest.raises(ValueError, match="digits: a classifier needs images of two classes or more"):
        fit_classifier(replace(digits, spec=replace(digits.spec, classes=0)))
