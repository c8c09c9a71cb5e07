"""A registered model, as MLflow itself loads it from a real server."""

import os
import sys
from dataclasses import replace
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
from gdl_ray.family import UNLABELLED
from gdl_ray.train import checkpoint
from tests.registry.saved import saved

pytestmark = pytest.mark.slow


def test_a_version_is_served_by_mlflow_itself(
    mlflow_client: MlflowClient, digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))  # MLflow adds the code of a version that it loads
    digits = replace(digits, spec=replace(digits.spec, name="served"))  # a model that no other test has
    run_id, _ = tracking.start_run("second", digits, {}, {})
    directory = saved(digits, tmp_path / "step-1")
    first = registry.register(run_id, directory, False, {})
    assert (first.name, first.champion) == ("served-vae", first.version)
    second = registry.register(run_id, saved(digits, tmp_path / "step-2", seed=1), promote=False, scores={})
    assert second.champion == first.version
    third = registry.register(run_id, directory, True, {})
    assert third.champion == third.version
    assert registry.registered()["served-vae"].aliases == {"champion": third.version}

    files = {item.name for item in (tmp_path).rglob("*.pkl")}
    assert not files
    mlflow.set_tracking_uri(os.environ["MLFLOW_TRACKING_URI"])
    model = mlflow.pyfunc.load_model("models:/served-vae@champion")
    labels = pd.DataFrame({"label": [3, -1, 7]})
    x = model.predict(labels, params={"seed": 11})
    assert x.shape == (3, 1, 8, 8)
    assert x.dtype == np.uint8
    assert not np.array_equal(x, model.predict(labels, params={"seed": 12}))

    engine = Engine(checkpoint.load_family(registry.fetch("served-vae", third.version)))
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
    version = registry.register(run_id, saved(digits, tmp_path / "step-1"), False, {})
    uri = f"models:/digits-vae/{version.version}"
    folder = Path(mlflow.artifacts.download_artifacts(uri, dst_path=str(tmp_path / "all")))
    assert not [path for path in folder.rglob("*") if path.suffix in {".pkl", ".pickle", ".pt", ".bin"}]
    assert (folder / "artifacts" / "checkpoint" / "model.safetensors").exists()
    assert not (folder / "artifacts" / "checkpoint" / "resume").exists()
