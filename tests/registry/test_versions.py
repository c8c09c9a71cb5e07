"""Runs and versions on a real MLflow server, read back by MLflow's own client."""

from pathlib import Path

import pytest
from mlflow import MlflowClient

from gdl_ray import registry, tracking
from gdl_ray.data import Dataset
from gdl_ray.train import checkpoint
from tests.registry.saved import saved

pytestmark = pytest.mark.slow
SECRET = "s3cret"
SOURCE = "s3://nobody/model"  # of versions that nobody fetches
SCORES = {"validation/bits_per_dim": 1.91, "test/bits_per_dim_lower_bound": 1.93}


def test_a_version_is_fetched_once(mlflow_client: MlflowClient, digits: Dataset, tmp_path: Path) -> None:
    run_id, _ = tracking.start_run("fourth", digits, {}, {})
    version = registry.register(
        run_id, saved(digits, tmp_path / "step-1"), promote=False, scores=SCORES
    ).version
    folder = registry.fetch("digits-vae", version)
    (folder / "mark").touch()
    assert registry.fetch("digits-vae", version) == folder
    assert (folder / "mark").exists()
    described = registry.describe("digits-vae", version)
    assert (described["run_id"], described["metrics"], described["tags"]) == (run_id, SCORES, {})
    (folder / "model.safetensors").write_bytes(b"torn")
    checkpoint.load_family(registry.fetch("digits-vae", version))


def test_a_server_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(registry.RegistryUnavailable, match=r"MLFLOW_TRACKING_URI=http://127.0.0.1:9"):
        tracking.check()
    with pytest.raises(registry.RegistryUnavailable, match=r"127.0.0.1:9"):
        registry.registered()
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with pytest.raises(registry.RegistryUnavailable, match="is not set"):
        tracking.check()


def test_models_are_listed_with_their_aliases_tags_and_newest_version(mlflow_client: MlflowClient) -> None:
    for i in range(101):  # a page of MLflow's has a hundred
        mlflow_client.create_registered_model(f"listed-{i:03d}", tags={"serve.replicas": f"0:{i}"})
    for _ in range(12):  # the newest by number, not by its letters
        mlflow_client.create_model_version("listed-100", SOURCE)
    mlflow_client.set_registered_model_alias("listed-100", "champion", "9")
    mlflow_client.set_registered_model_alias("listed-100", "next", "12")
    models = registry.registered()
    assert models.keys() >= {f"listed-{i:03d}" for i in range(101)}
    assert models["listed-007"] == registry.Registered({}, {"serve.replicas": "0:7"}, 0)
    assert models["listed-100"] == registry.Registered(
        {"champion": 9, "next": 12}, {"serve.replicas": "0:100"}, 12
    )


def test_a_version_that_is_not_there_is_told_from_a_server_that_is_not(
    mlflow_client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow_client.create_registered_model("lonely")
    mlflow_client.create_model_version("lonely", SOURCE, tags={"colour": "red", "test/nats": "2.5"})
    assert registry.exists("lonely", 1)
    assert not any(registry.exists(*missing) for missing in (("lonely", 2), ("lonely", 0), ("nobody", 1)))
    described = registry.describe("lonely", 1)
    assert (described["metrics"], described["tags"]) == ({"test/nats": 2.5}, {"colour": "red"})
    for ask in (registry.describe, registry.fetch):
        with pytest.raises(registry.VersionNotFound, match="lonely has no version 2"):
            ask("lonely", 2)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(registry.RegistryUnavailable):
        registry.exists("lonely", 1)
