"""The job that fits a classifier, on a Ray and an MLflow of this machine."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import ray
from mlflow import MlflowClient

from gdl_ray import registry
from gdl_ray.data import load
from gdl_ray.family import DataSpec
from jobs import classifier, train
from jobs.options import UsageError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def one_cpu() -> Iterator[None]:
    ray.init(address="local", num_cpus=1, include_dashboard=False, namespace="gdl_ray")
    yield
    ray.shutdown()


def test_a_classifier_is_fitted_once(
    mlflow_client: MlflowClient, one_cpu: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(["classifier", "--data", "digits"]) == 0
    told = capsys.readouterr().out
    assert "jobs.train: digits-classifier version 1 (champion)  test/accuracy 0.9" in told
    dataset = load("digits", tmp_path / "home" / "data")
    found = registry.extractor(dataset)
    assert found
    name = found[1]
    assert name.removeprefix("digits-classifier@1 ") in told
    version = mlflow_client.get_model_version("digits-classifier", "1")
    run = mlflow_client.get_run(str(version.run_id))
    assert run.info.status == "FINISHED"
    assert run.data.metrics.keys() == {"test/accuracy", "seconds"}
    assert run.data.metrics["test/accuracy"] > 0.95
    assert train.main(["classifier", "--data", "digits"]) == 0
    assert "digits-classifier version 1 is it" in capsys.readouterr().out
    assert classifier.found_or_fitted(dataset, classifier.Demand())[1] == name
    assert len(mlflow_client.search_model_versions("name='digits-classifier'")) == 1


def test_data_without_labels_are_refused(mlflow_client: MlflowClient, tmp_path: Path) -> None:
    dataset = load("digits", tmp_path / "home" / "data")
    spec = DataSpec(name="bare", kind="image", shape=(1, 8, 8), levels=17, classes=0)
    with pytest.raises(UsageError, match="bare: a classifier needs images of two classes or more"):
        classifier.found_or_fitted(replace(dataset, spec=spec), classifier.Demand())
