"""Runs and versions on a real MLflow server, read back by MLflow's own client."""

import os
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from gdl_ray import registry
from gdl_ray.data import Dataset
from gdl_ray.engine import Engine
from gdl_ray.families import build, preset
from gdl_ray.family import UNLABELLED
from gdl_ray.train import checkpoint
from gdl_ray.train.loop import sample_grid

pytestmark = pytest.mark.slow


@pytest.fixture
def client(mlflow_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
    monkeypatch.setenv("GDL_RAY_HOME", str(tmp_path / "home"))
    return MlflowClient(mlflow_server)


def saved(digits: Dataset, folder: Path, seed: int = 0) -> Path:
    model = build("vae", preset("vae", "digits").model, digits.spec, seed).eval()
    checkpoint.save(folder, model, sample_grid(model), {"weights/w": torch.zeros(2)}, {"step": 1})
    return folder


def test_a_run_holds_what_compares_it(client: MlflowClient, digits: Dataset) -> None:
    run_id, page = registry.start_run("first", digits, {"model.latent": "16"}, {"family": "vae"})
    assert run_id in page
    run = registry.Run(run_id)
    grid = sample_grid(build("vae", preset("vae", "digits").model, digits.spec))
    run.log(50, {"train/loss": 3.0}, grid)
    run.log(100, {"train/loss": 2.0})
    run.log(50, {"train/loss": 3.0}, grid)  # what a restarted worker repeats
    run.log_final({"test/bits_per_dim": 1.9})
    run.finish()
    found = client.get_run(run_id)
    assert client.get_experiment(found.info.experiment_id).name == "digits"
    assert (found.info.run_name, found.info.status) == ("first", "FINISHED")
    assert found.data.params == {"model.latent": "16"}
    assert found.data.tags["family"] == "vae"
    history = [(each.step, each.value) for each in client.get_metric_history(run_id, "train/loss")]
    assert history == [(50, 3.0), (100, 2.0)]
    assert [each.step for each in client.get_metric_history(run_id, "test/bits_per_dim")] == [100]
    assert found.inputs
    assert found.inputs.dataset_inputs[0].dataset.digest == digits.digest[:16]
    pictures = [item.path for item in client.list_artifacts(run_id, "images")]
    assert len([path for path in pictures if path.endswith(".png")]) == 1
    assert all("samples" in path for path in pictures)


def test_a_version_is_served_by_mlflow_itself(client: MlflowClient, digits: Dataset, tmp_path: Path) -> None:
    run_id, _ = registry.start_run("second", digits, {}, {})
    directory = saved(digits, tmp_path / "step-1")
    first = registry.register(run_id, directory, promote=False)
    assert (first.name, first.champion) == ("digits-vae", first.version)
    second = registry.register(run_id, saved(digits, tmp_path / "step-2", seed=1), promote=False)
    assert second.champion == first.version
    third = registry.register(run_id, directory, promote=True)
    assert third.champion == third.version
    assert registry.champions() == {"digits-vae": third.version}

    files = {item.name for item in (tmp_path).rglob("*.pkl")}
    assert not files
    mlflow.set_tracking_uri(os.environ["MLFLOW_TRACKING_URI"])
    model = mlflow.pyfunc.load_model("models:/digits-vae@champion")
    labels = pd.DataFrame({"label": [3, -1, 7]})
    x = model.predict(labels, params={"seed": 11})
    assert x.shape == (3, 1, 8, 8)
    assert x.dtype == np.uint8
    assert not np.array_equal(x, model.predict(labels, params={"seed": 12}))

    engine = Engine(checkpoint.load_family(registry.fetch("digits-vae", third.version)))
    drawn = engine.submit(11, torch.tensor([3, UNLABELLED, 7])).future.result(timeout=30).numpy()
    engine.close(drain=True)
    assert (drawn != x).mean() < 0.02  # to rounding: the batch has another shape

    schema = model.metadata.signature
    assert schema.params.params[0].name == "seed"
    assert schema.outputs.inputs[0].shape == (-1, 1, 8, 8)
    with pytest.raises(MlflowException, match="label"):
        model.predict(pd.DataFrame({"lable": [1]}))
    with pytest.raises(ValueError, match=r"label must lie in \[0, 9\]"):
        model.predict(pd.DataFrame({"label": [10]}))


def test_a_version_holds_no_pickle(client: MlflowClient, digits: Dataset, tmp_path: Path) -> None:
    run_id, _ = registry.start_run("third", digits, {}, {})
    version = registry.register(run_id, saved(digits, tmp_path / "step-1"), promote=False)
    uri = f"models:/digits-vae/{version.version}"
    folder = Path(mlflow.artifacts.download_artifacts(uri, dst_path=str(tmp_path / "all")))
    assert not [path for path in folder.rglob("*") if path.suffix in {".pkl", ".pickle", ".pt", ".bin"}]
    assert (folder / "artifacts" / "checkpoint" / "model.safetensors").exists()
    assert not (folder / "artifacts" / "checkpoint" / "resume").exists()


def test_a_version_is_fetched_once(client: MlflowClient, digits: Dataset, tmp_path: Path) -> None:
    run_id, _ = registry.start_run("fourth", digits, {}, {})
    version = registry.register(run_id, saved(digits, tmp_path / "step-1"), promote=False).version
    folder = registry.fetch("digits-vae", version)
    (folder / "mark").touch()
    assert registry.fetch("digits-vae", version) == folder
    assert (folder / "mark").exists()
    assert registry.describe("digits-vae", version)["run_id"] == run_id


def test_a_server_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(registry.RegistryUnavailable, match=r"MLFLOW_TRACKING_URI=http://127.0.0.1:9"):
        registry.check()
    with pytest.raises(registry.RegistryUnavailable, match=r"127.0.0.1:9"):
        registry.champions()
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with pytest.raises(registry.RegistryUnavailable, match="is not set"):
        registry.check()
