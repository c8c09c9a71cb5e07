"""Registering on a real MLflow server."""

import os
import re
from pathlib import Path

import httpx
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


def test_people_find_what_a_model_is_on_its_pages(
    mlflow_client: MlflowClient, digits: Dataset, tmp_path: Path
) -> None:
    """Through the REST interface, as the pages of MLflow ask for it."""
    uri = os.environ["MLFLOW_TRACKING_URI"]
    run_id, _ = tracking.start_run("described", digits, {}, {"git_commit": "0123456789abcdef"})
    directory = saved(digits, tmp_path / "step-1")
    version = registry.register(run_id, directory, promote=True, scores=SCORES).version
    ask = {"name": "digits-vae", "version": str(version)}

    def description() -> str:
        answer = httpx.get(f"{uri}/ajax-api/2.0/mlflow/model-versions/get", params=ask).json()
        return str(answer["model_version"]["description"])

    card = description()
    assert card.startswith(f"# digits-vae, version {version}\n\nVariational autoencoder: ")
    assert "| test/bits_per_dim_lower_bound | 1.93 bits/dim | lower |" in card
    assert "commit `0123456789ab`" in card
    picture = re.search(r"!\[samples\]\((.+)\)", card)
    assert picture
    assert httpx.get(f"{uri}/{picture[1]}").content == (directory / "samples.png").read_bytes()
    model = mlflow_client.get_registered_model("digits-vae")
    assert "Fitted to `digits`" in str(model.description)

    mlflow_client.update_model_version("digits-vae", str(version), card.replace("# digits-vae", "# My"))
    registry.register(run_id, directory, promote=False, scores=SCORES)
    record = {"protocol": {}, "protocol_digest": "a" * 12, "metrics": {"samples/recall": 0.5}}
    registry.write_evaluation("digits-vae", version, record, {})
    assert description().startswith("# My, version")
    assert "| samples/recall | 0.5 | higher |" in description()
    assert "1.93 bits/dim" not in description()
    long = "x" * 4990
    mlflow_client.update_model_version("digits-vae", str(version), long)
    registry.write_evaluation("digits-vae", version, record, {})
    assert description() == long
