"""Registering on a real MLflow server."""

from pathlib import Path

import pytest
from mlflow import MlflowClient

from gdl_ray import registry, tracking
from gdl_ray.data import Dataset
from tests.registry.saved import saved

pytestmark = pytest.mark.slow
SCORES = {"validation/bits_per_dim": 1.91, "test/bits_per_dim_lower_bound": 1.93}


def test_a_run_registers_one_version_however_often_it_asks(
    mlflow_client: MlflowClient, digits: Dataset, tmp_path: Path
) -> None:
    run_id, _ = tracking.start_run("registers", digits, {}, {})
    assert registry.registered_by(run_id, "digits-vae") is None
    directory = saved(digits, tmp_path / "step-1")
    version = registry.register(run_id, directory, promote=False, scores=SCORES)
    assert registry.register(run_id, directory, promote=False, scores=SCORES) == version
    assert registry.registered_by(run_id, "digits-vae") == (version, SCORES)
    assert len(mlflow_client.search_model_versions(f"run_id='{run_id}'")) == 1
