"""Runs and versions on a real MLflow server, read back by MLflow's own client."""

import os
import sys
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from gdl_ray import registry, tracking
from gdl_ray.data import Dataset
from gdl_ray.engine import Engine, seeds_of
from gdl_ray.families import build, preset
from gdl_ray.family import UNLABELLED
from gdl_ray.train import checkpoint
from gdl_ray.train.validation import sample_grid

pytestmark = pytest.mark.slow
SCORES = {"validation/bits_per_dim": 1.91, "test/bits_per_dim": 1.93}


def saved(digits: Dataset, folder: Path, seed: int = 0) -> Path:
    model = build("vae", preset("vae", "digits").model, digits.spec, seed).eval()
    contents = checkpoint.Contents(
        description=checkpoint.describe(model), weights=model.state_dict(), samples_png=sample_grid(model)
    )
    checkpoint.save(folder, contents)
    return folder


def register(run_id: str, directory: Path, promote: bool) -> registry.Version:
    return registry.register(run_id, directory, promote, SCORES)


def test_a_version_is_served_by_mlflow_itself(
    mlflow_client: MlflowClient, digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))  # MLflow adds the code of a version that it loads
    run_id, _ = tracking.start_run("second", digits, {}, {})
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
    drawn = engine.submit(seeds_of(11, 3), torch.tensor([3, UNLABELLED, 7])).future.result(timeout=30).numpy()
    engine.close(drain=True)
    assert (drawn != x).mean() < 0.02  # to rounding: the batch has another shape

    schema = model.metadata.signature
    assert schema.params.params[0].name == "seed"
    assert schema.outputs.inputs[0].shape == (-1, 1, 8, 8)
    with pytest.raises(MlflowException, match="label"):
        model.predict(pd.DataFrame({"lable": [1]}))
    with pytest.raises(ValueError, match=r"label must lie in \[0, 9\]"):
        model.predict(pd.DataFrame({"label": [10]}))


def test_a_version_holds_no_pickle(mlflow_client: MlflowClient, digits: Dataset, tmp_path: Path) -> None:
    run_id, _ = tracking.start_run("third", digits, {}, {})
    version = register(run_id, saved(digits, tmp_path / "step-1"), promote=False)
    uri = f"models:/digits-vae/{version.version}"
    folder = Path(mlflow.artifacts.download_artifacts(uri, dst_path=str(tmp_path / "all")))
    assert not [path for path in folder.rglob("*") if path.suffix in {".pkl", ".pickle", ".pt", ".bin"}]
    assert (folder / "artifacts" / "checkpoint" / "model.safetensors").exists()
    assert not (folder / "artifacts" / "checkpoint" / "resume").exists()


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
    assert (described["run_id"], described["metrics"]) == (run_id, SCORES)
    (folder / "model.safetensors").write_bytes(b"torn")
    checkpoint.load_family(registry.fetch("digits-vae", version))


def test_a_server_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(registry.RegistryUnavailable, match=r"MLFLOW_TRACKING_URI=http://127.0.0.1:9"):
        tracking.check()
    with pytest.raises(registry.RegistryUnavailable, match=r"127.0.0.1:9"):
        registry.champions()
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with pytest.raises(registry.RegistryUnavailable, match="is not set"):
        tracking.check()
