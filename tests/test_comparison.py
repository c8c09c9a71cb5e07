"""A comparison on a real platform: families trained, measured, shown in MLflow, and nothing done twice."""

import json
import re
import urllib.request

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from gdl_ray.evaluate.metrics import METRICS, STANDARD_ERROR
from infra.local import Platform
from tests.conftest import start

pytestmark = pytest.mark.long
COMMAND = ["--families", "flow", "gan", "--steps", "60", "--name", "two"]
COMMAND += ["--report-every", "20", "--checkpoint-every", "20", "--usd-per-hour", "3.6"]


def submit(platform: Platform, job: str, *arguments: str) -> str:
    """Run a job to its end; returns what it printed."""
    process = start(platform, *arguments, job=job)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def output(platform: Platform) -> str:
    return submit(platform, "jobs.compare", *COMMAND)


@pytest.fixture(scope="module")
def client(platform: Platform) -> MlflowClient:
    return MlflowClient(platform.urls["mlflow"])


def named(client: MlflowClient, name: str) -> Run:
    (experiment,) = client.search_experiments(filter_string="name = 'digits'")
    (run,) = client.search_runs([experiment.experiment_id], f"attributes.run_name = '{name}'")
    return run


def artifact(platform: Platform, run: Run, name: str) -> bytes:
    """What MLflow's page of a run offers for download."""
    query = f"path={name}&run_uuid={run.info.run_id}"
    with urllib.request.urlopen(f"{platform.urls['mlflow']}/get-artifact?{query}") as answer:
        content: bytes = answer.read()
    return content


def test_the_tables_say_which_family_is_good_at_what(output: str) -> None:
    for title in ("Expressive", "Efficient to train", "Good to sample from", "Interpretable"):
        table = output[output.index(f"{title}: ") :].split("\n\n")[0]
        assert re.search(r"^  flow ", table, re.MULTILINE)
    assert re.search(r"jobs.compare: Good to sample from: (flow|gan) \(kernel ", output)
    assert "training images (copies)" in output


def test_children_of_one_run_have_the_same_metrics(output: str, client: MlflowClient) -> None:
    parent = named(client, "two")
    flow, gan = (named(client, f"two-{family}-0") for family in ("flow", "gan"))
    for child in (flow, gan):
        assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    measured = {name for name in gan.data.metrics if name.removesuffix(STANDARD_ERROR) in METRICS}
    assert "samples/frechet_distance" in measured
    assert measured < flow.data.metrics.keys()
    assert parent.info.status == "FINISHED"
    seconds = flow.data.metrics["efficiency/seconds_to_quality"]
    assert flow.data.metrics["efficiency/usd_to_quality"] == pytest.approx(seconds * 3.6 / 3600)


def test_the_parent_holds_page_picture_and_figures(
    output: str, platform: Platform, client: MlflowClient
) -> None:
    parent = named(client, "two")
    assert artifact(platform, parent, "comparison.png").startswith(b"\x89PNG")
    assert b"<!doctype html>" in artifact(platform, parent, "comparison.html")
    record = json.loads(artifact(platform, parent, "comparison.json"))
    (figures,) = record["families"]["flow"]
    run = named(client, "two-flow-0").data.metrics
    assert figures == {name: run[name] for name in figures}


def test_what_is_done_is_not_done_again(output: str, platform: Platform, client: MlflowClient) -> None:
    before = {name: named(client, name).data.metrics for name in ("two-flow-0", "two-gan-0")}
    again = submit(platform, "jobs.compare", *COMMAND)
    assert again.count("was measured before") == again.count(" is finished") == 2
    tables = [said[said.index("Expressive: ") : said.index("  the page")] for said in (output, again)]
    assert tables[0] == tables[1]
    assert {name: named(client, name).data.metrics for name in before} == before


def test_the_same_version_measured_again_has_the_same_figures(
    output: str, platform: Platform, client: MlflowClient
) -> None:
    before = named(client, "two-flow-0").data.metrics
    said = submit(platform, "jobs.evaluate", "digits-flow@1")
    bits = "test/bits_per_dim_lower_bound_tight"
    line = re.search(rf"{bits} +(\d\.\d+) ± 0\.\d+  bits/dim", said)
    assert line is not None
    assert float(line[1]) == pytest.approx(before[bits], abs=0.01)
    after = named(client, "two-flow-0").data.metrics
    for name, metric in METRICS.items():
        if metric.is_repeatable and name in before:
            assert after[name] == before[name], name
