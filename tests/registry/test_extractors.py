"""Classifiers on a real MLflow server, registered and read back."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

from gdl_ray import registry, tracking
from gdl_ray.data import Dataset
from gdl_ray.evaluate.classifier import Classifier
from jobs.models import resolve
from jobs.options import UsageError

pytestmark = pytest.mark.slow


def named(dataset: Dataset, name: str) -> Dataset:
    """The same data under a name that no other test uses."""
    return replace(dataset, spec=replace(dataset.spec, name=name))


def register(dataset: Dataset, seed: int = 0) -> tuple[int, int]:
    torch.manual_seed(seed)
    run_id, _ = tracking.start_run("classifier", dataset, {}, {})
    return registry.register_classifier(
        run_id, dataset, Classifier(dataset.spec), seed, {"test/accuracy": 0.5}
    )


def test_a_classifier_is_found_with_its_weights_and_fetched_once(
    mlflow_client: MlflowClient, digits: Dataset, tmp_path: Path
) -> None:
    dataset = named(digits, "one")
    assert registry.extractor(dataset) is None
    assert register(dataset, seed=3) == (1, 1)
    found = registry.extractor(dataset)
    assert found
    classifier, name = found
    torch.manual_seed(3)
    expected = Classifier(dataset.spec).eval()
    x = torch.tensor(dataset.splits["test"].x[:50])
    assert torch.equal(classifier.features(x), expected.features(x))
    assert name == f"one-classifier@1 {expected.fingerprint()}"
    assert not classifier.training
    (weights,) = (tmp_path / "home" / "models" / "one-classifier").rglob("*.safetensors")
    before = weights.stat().st_mtime_ns
    assert registry.extractor(dataset)
    assert weights.stat().st_mtime_ns == before
    weights.write_bytes(b"torn")
    again = registry.extractor(dataset)
    assert again
    assert again[1] == name
    assert {path.suffix for path in weights.parent.iterdir()} == {".safetensors", ".json"}


def test_it_is_no_model_that_can_be_sampled(mlflow_client: MlflowClient, digits: Dataset) -> None:
    register(named(digits, "hidden"))
    mlflow_client.create_registered_model("hidden-vae")
    assert "hidden-vae" in registry.registered()
    assert "hidden-classifier" not in registry.registered()
    with pytest.raises(UsageError, match="no model 'hidden-classifier' is registered"):
        resolve("hidden-classifier@1")


def test_who_registers_at_once_agrees_on_the_first(mlflow_client: MlflowClient, digits: Dataset) -> None:
    dataset = named(digits, "raced")
    with ThreadPoolExecutor(4) as jobs:
        registered = list(jobs.map(lambda _: register(dataset), range(4)))
    assert sorted(version for version, _ in registered) == [1, 2, 3, 4]
    assert {champion for _, champion in registered} == {1}
    assert mlflow_client.get_registered_model("raced-classifier").aliases == {"champion": "1"}


def test_other_data_of_the_same_name_have_another_classifier(
    mlflow_client: MlflowClient, digits: Dataset
) -> None:
    dataset = named(digits, "renewed-data")
    assert register(dataset) == (1, 1)
    assert register(dataset, seed=1) == (2, 1)
    assert (registry.fitted_with(dataset, 1), registry.fitted_with(dataset, 2)) == (2, None)
    other = replace(dataset, digest="f" * 64)
    assert registry.extractor(other) is None
    assert register(other) == (3, 3)
    assert registry.fitted_with(other, 0) == 3
