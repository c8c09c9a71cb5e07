"""Runs on a real MLflow server, read back by its own client: nothing is lost, nothing is written twice."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric

from gdl_ray import tracking
from gdl_ray.data import Dataset
from gdl_ray.families import build, preset
from gdl_ray.train.validation import sample_grid
from tests.conftest import free_port, mlflow_on

pytestmark = pytest.mark.slow


def opened(run_id: str, uri: str) -> tracking.Run:
    run = tracking.Run(uri)
    run.open(run_id)
    return run


def history(client: MlflowClient, run_id: str, name: str = "train/loss") -> list[tuple[int, float]]:
    return [(each.step, each.value) for each in client.get_metric_history(run_id, name)]


def test_a_run_holds_what_compares_it(mlflow_client: MlflowClient, digits: Dataset) -> None:
    run_id, page = tracking.start_run("first", digits, {"model.latent": "16"}, {"family": "vae"})
    assert run_id in page
    run = opened(run_id, os.environ["MLFLOW_TRACKING_URI"])
    grid = sample_grid(build("vae", preset("vae", "digits").model, digits.spec))
    run.log(50, {"train/loss": 3.0}, grid)
    run.log(100, {"train/loss": 2.0})
    run.log(50, {"train/loss": 3.0}, grid)  # what a restarted worker repeats
    run.log_final({"test/bits_per_dim_lower_bound": 1.9})
    assert run.finish() == 0
    found = mlflow_client.get_run(run_id)
    assert mlflow_client.get_experiment(found.info.experiment_id).name == "digits"
    assert (found.info.run_name, found.info.status) == ("first", "FINISHED")
    assert found.data.params == {"model.latent": "16"}
    assert found.data.tags["family"] == "vae"
    assert history(mlflow_client, run_id) == [(50, 3.0), (100, 2.0)]
    assert history(mlflow_client, run_id, "test/bits_per_dim_lower_bound") == [(100, 1.9)]
    assert found.inputs
    assert found.inputs.dataset_inputs[0].dataset.digest == digits.digest[:16]
    pictures = [item.path for item in mlflow_client.list_artifacts(run_id, "images")]
    assert len([path for path in pictures if path.endswith(".png")]) == 1
    assert all("samples" in path for path in pictures)


def test_another_driver_goes_on_with_the_curve(mlflow_client: MlflowClient, digits: Dataset) -> None:
    """It knows nothing of the first, which died before it ended the run; it repeats some steps."""
    uri = os.environ["MLFLOW_TRACKING_URI"]
    run_id, page = tracking.start_run("cut short", digits, {}, {})
    first = opened(run_id, uri)
    for step in (10, 20, 30):
        first.log(step, {"train/loss": 1 / step})
    assert first.finish("KILLED") == 0
    assert tracking.resume_run(run_id) == page
    second = opened(run_id, uri)
    for step in (20, 30, 40):
        second.log(step, {"train/loss": 1 / step, "train/late": step})
    second.log_final({"test/bits_per_dim_lower_bound": 2.0})
    assert second.finish() == 0
    assert history(mlflow_client, run_id) == [(step, 1 / step) for step in (10, 20, 30, 40)]
    assert history(mlflow_client, run_id, "train/late") == [(20, 20), (30, 30), (40, 40)]
    assert history(mlflow_client, run_id, "test/bits_per_dim_lower_bound") == [(40, 2.0)]


def test_a_run_that_the_server_does_not_have_is_told(mlflow_client: MlflowClient) -> None:
    assert tracking.resume_run("0" * 32) is None


def test_a_batch_sent_twice_is_one(mlflow_client: MlflowClient, digits: Dataset) -> None:
    """What the retries rest on: MLflow may have written a batch whose answer was lost."""
    run_id, _ = tracking.start_run("twice", digits, {}, {})
    for _ in range(2):
        mlflow_client.log_batch(run_id, metrics=[Metric("train/loss", 0.5, 1_700_000_000_000, 7)])
    assert history(mlflow_client, run_id) == [(7, 0.5)]


def test_reports_wait_for_a_server_that_is_away_and_training_does_not(
    digits: Dataset, tmp_path: Path
) -> None:
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    with mlflow_on(port, tmp_path):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MLFLOW_TRACKING_URI", uri)
            run_id, _ = tracking.start_run("patient", digits, {}, {})
        run = opened(run_id, uri)
        run.log(1, {"train/loss": 1.0})
        run._reports.join()
    before = time.monotonic()
    for step in range(2, 50):
        run.log(step, {"train/loss": 1 / step})
    assert time.monotonic() - before < 1  # each of them would wait for seconds
    time.sleep(1)
    assert run._reports.unfinished_tasks
    with mlflow_on(port, tmp_path):
        assert run.finish() == 0
        assert history(MlflowClient(uri), run_id) == [(step, 1 / step) for step in range(1, 50)]


def test_what_the_server_refuses_is_counted(mlflow_client: MlflowClient) -> None:
    run = opened("0" * 32, os.environ["MLFLOW_TRACKING_URI"])
    run.log(1, {"train/loss": 1.0})
    run._reports.join()
    assert run._lost == 2  # what is known of the run, and the report


def test_jobs_that_start_at_once_log_the_same_dataset(mlflow_client: MlflowClient, digits: Dataset) -> None:
    """Four at a time: the server refuses all but the first to write a dataset that is new to it."""
    for number in range(5):
        dataset = replace(digits, digest=f"{number:064d}"[::-1])
        with ThreadPoolExecutor(4) as jobs:
            started = list(jobs.map(lambda _, d=dataset: tracking.start_run("r", d, {}, {})[0], range(4)))
        for run_id in started:
            inputs = mlflow_client.get_run(run_id).inputs
            assert inputs
            assert inputs.dataset_inputs[0].dataset.digest == dataset.digest[:16]


def test_runs_of_a_comparison_are_children_of_its_run(
    mlflow_client: MlflowClient, digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent, _ = tracking.start_parent("comparison", digits, {"budget": "60s"}, {"kind": "comparison"})
    monkeypatch.setenv("GDL_RAY_PARENT_RUN", parent)
    child, _ = tracking.start_run("child", digits, {}, {"family": "vae"})
    other, _ = tracking.start_parent("another comparison", digits, {}, {})
    below = mlflow_client.search_runs(
        [mlflow_client.get_run(parent).info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent}'"
    )
    assert [run.info.run_id for run in below] == [child]
    assert "mlflow.parentRunId" not in mlflow_client.get_run(other).data.tags
    tracking.end_run(parent)
    assert mlflow_client.get_run(parent).info.status == "FINISHED"


def test_artifacts_are_replaced_and_read_back(mlflow_client: MlflowClient, digits: Dataset) -> None:
    run_id, _ = tracking.start_run("files", digits, {}, {})
    assert tracking.read_file(run_id, "tables", "a.md") is None
    tracking.log_files(run_id, "tables", {"a.md": b"first, and longer", "b.bin": b"\x00"})
    tracking.log_files(run_id, "tables", {"a.md": b"second"})
    assert tracking.read_file(run_id, "tables", "a.md") == b"second"
    assert tracking.read_file(run_id, "tables", "b.bin") == b"\x00"


def test_an_experiment_says_what_its_metrics_are(mlflow_client: MlflowClient, digits: Dataset) -> None:
    mlflow_client.create_experiment("older")  # by whom did not write any note
    for name in ("older", "newer"):
        dataset = replace(digits, spec=replace(digits.spec, name=name))
        tracking.start_run("run", dataset, {}, {})
        found = mlflow_client.get_experiment_by_name(name)
        assert found
        note = found.tags["mlflow.note.content"]
        row = next(
            line for line in note.splitlines() if line.startswith("| efficiency/ms_per_sample_batch_64 ")
        )
        assert [cell.strip() for cell in row.split("|")][2:4] == ["ms", "lower"]
        mlflow_client.set_experiment_tag(found.experiment_id, "mlflow.note.content", "mine")
        tracking.start_run("run", dataset, {}, {})
        assert mlflow_client.get_experiment(found.experiment_id).tags["mlflow.note.content"] == "mine"
