"""Runs and versions on a real MLflow server, read back by MLflow's own client."""

import os
import sys
import threading
import time
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
from tests.conftest import free_port, mlflow_on

pytestmark = pytest.mark.slow
SCORES = {"validation/bits_per_dim": 1.91, "test/bits_per_dim": 1.93}


@pytest.fixture
def client(mlflow_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
    monkeypatch.setenv("GDL_RAY_HOME", str(tmp_path / "home"))
    return MlflowClient(mlflow_server)


def saved(digits: Dataset, folder: Path, seed: int = 0) -> Path:
    model = build("vae", preset("vae", "digits").model, digits.spec, seed).eval()
    checkpoint.save(folder, model, sample_grid(model), {"weights/w": torch.zeros(2)}, {"step": 1})
    return folder


def register(run_id: str, directory: Path, promote: bool) -> registry.Version:
    return registry.register(run_id, directory, promote, SCORES)


def test_a_run_holds_what_compares_it(client: MlflowClient, digits: Dataset) -> None:
    run_id, page = registry.start_run("first", digits, {"model.latent": "16"}, {"family": "vae"})
    assert run_id in page
    run = registry.Run(run_id, os.environ["MLFLOW_TRACKING_URI"])
    grid = sample_grid(build("vae", preset("vae", "digits").model, digits.spec))
    run.log(50, {"train/loss": 3.0}, grid)
    run.log(100, {"train/loss": 2.0})
    run.log(50, {"train/loss": 3.0}, grid)  # what a restarted worker repeats
    run.log_final({"test/bits_per_dim": 1.9})
    assert run.finish() == 0
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


def test_a_version_is_served_by_mlflow_itself(
    client: MlflowClient, digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))  # MLflow adds the code of a version that it loads
    run_id, _ = registry.start_run("second", digits, {}, {})
    directory = saved(digits, tmp_path / "step-1")
    first = register(run_id, directory, promote=False)
    assert (first.name, first.champion) == ("digits-vae", first.version)
    second = registry.register(
        run_id, saved(digits, tmp_path / "step-2", seed=1), promote=False, scores=SCORES
    )
    assert second.champion == first.version
    third = register(run_id, directory, promote=True)
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
    version = register(run_id, saved(digits, tmp_path / "step-1"), promote=False)
    uri = f"models:/digits-vae/{version.version}"
    folder = Path(mlflow.artifacts.download_artifacts(uri, dst_path=str(tmp_path / "all")))
    assert not [path for path in folder.rglob("*") if path.suffix in {".pkl", ".pickle", ".pt", ".bin"}]
    assert (folder / "artifacts" / "checkpoint" / "model.safetensors").exists()
    assert not (folder / "artifacts" / "checkpoint" / "resume").exists()


def test_a_version_is_fetched_once(client: MlflowClient, digits: Dataset, tmp_path: Path) -> None:
    run_id, _ = registry.start_run("fourth", digits, {}, {})
    version = registry.register(
        run_id, saved(digits, tmp_path / "step-1"), promote=False, scores=SCORES
    ).version
    folder = registry.fetch("digits-vae", version)
    (folder / "mark").touch()
    assert registry.fetch("digits-vae", version) == folder
    assert (folder / "mark").exists()
    described = registry.describe("digits-vae", version)
    assert (described["run_id"], described["metrics"]) == (run_id, SCORES)
    (folder / "model.safetensors").write_bytes(b"torn")
    checkpoint.load_family(registry.fetch("digits-vae", version))


def test_a_server_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(registry.RegistryUnavailable, match=r"MLFLOW_TRACKING_URI=http://127.0.0.1:9"):
        registry.check()
    with pytest.raises(registry.RegistryUnavailable, match=r"127.0.0.1:9"):
        registry.champions()
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with pytest.raises(registry.RegistryUnavailable, match="is not set"):
        registry.check()


def test_reports_wait_for_a_server_that_is_away(digits: Dataset, tmp_path: Path) -> None:
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    with mlflow_on(port, tmp_path):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MLFLOW_TRACKING_URI", uri)
            run_id, _ = registry.start_run("patient", digits, {}, {})
        run = registry.Run(run_id, uri)
        run.log(1, {"train/loss": 1.0})

    def log() -> None:
        for step in (2, 3):
            run.log(step, {"train/loss": 1 / step})

    logging = threading.Thread(target=log)
    logging.start()
    time.sleep(1)
    assert logging.is_alive()
    with mlflow_on(port, tmp_path):
        logging.join(timeout=60)
        assert run.finish() == 0
        history = MlflowClient(uri).get_metric_history(run_id, "train/loss")
    assert [(each.step, each.value) for each in history] == [(1, 1.0), (2, 0.5), (3, 1 / 3)]


def test_what_the_server_refuses_is_counted(client: MlflowClient) -> None:
    run = registry.Run("0" * 32, os.environ["MLFLOW_TRACKING_URI"])
    run.log(1, {"train/loss": 1.0})
    assert run._lost == 1
