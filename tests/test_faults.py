"""What goes wrong in a cluster costs time and nothing else; the oracle is a run to which nothing happened."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import boto3  # type: ignore[import-untyped]
import pytest
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

from tests.cluster import Cluster, Job, Result, eventually
from tests.conftest import free_port

pytestmark = pytest.mark.slow
STEPS = 480
REPORT_EVERY, CHECKPOINT_EVERY = 5, 20
ARGUMENTS = ["energy", "--size", "0.5", "--workers", "2", "--steps", str(STEPS)]
ARGUMENTS += ["--report-every", str(REPORT_EVERY), "--checkpoint-every", str(CHECKPOINT_EVERY)]
KEYS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two nodes and MLflow."""
    with tempfile.TemporaryDirectory(prefix="gdl-faults-") as home:
        started = Cluster(Path(home), KEYS)
        try:
            started.up(nodes=2)
            yield started
        finally:
            started.down()


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster) -> Result:
    """The run to which nothing happens."""
    assert cluster.train(*ARGUMENTS, "--name", "undisturbed").wait() == 0
    return cluster.result("undisturbed")


def steps(cluster: Cluster, since: int = 0) -> list[int]:
    """List the steps that were reported by groups of workers after the first so many."""
    return [step for group in cluster.groups()[since:] for step in group]


def start(cluster: Cluster, name: str, *more: str) -> Job:
    """Start a run, and wait until it has a checkpoint and has gone on."""
    since = len(cluster.groups())
    job = cluster.train(*ARGUMENTS, "--name", name, *more)
    eventually(lambda: steps(cluster, since)[-1:] > [CHECKPOINT_EVERY])
    return job


def finish(job: Job) -> str:
    """Wait for the end of a job that must succeed; returns what it printed."""
    assert job.wait() == 0, job.output
    return job.output


def test_a_killed_driver_is_submitted_again(cluster: Cluster, undisturbed: Result) -> None:
    start(cluster, "driver").kill()
    assert "run driver goes on after step" in finish(cluster.train(*ARGUMENTS, "--name", "driver"))
    assert cluster.result("driver") == undisturbed


def test_a_node_that_gave_notice_and_one_that_did_not_are_replaced(
    cluster: Cluster, undisturbed: Result
) -> None:
    since = len(cluster.groups())
    job = start(cluster, "nodes")
    cluster.drain(cluster.nodes[0], deadline_s=30)
    cluster.add_node()
    eventually(lambda: len(cluster.groups()) == since + 2)
    before, after = cluster.groups()[since:]
    assert 0 < after[0] - before[-1] <= REPORT_EVERY  # no step is taken twice
    assert "a node is about to be taken away; going on from step" in job.output
    assert "workers failed" not in job.output
    cluster.kill(cluster.nodes[1])  # one of those that train now
    cluster.kill(cluster.nodes[0])  # gone already, once it was idle
    for _ in range(2 - len(cluster.nodes)):
        cluster.add_node()
    assert "workers failed" in finish(job)
    assert cluster.result("nodes") == undisturbed


def test_a_run_outlives_the_power(cluster: Cluster, undisturbed: Result) -> None:
    start(cluster, "power")
    cluster.cut_power()
    half = cluster.home / "runs" / "power" / f"step-{STEPS:08d}-000000"
    half.mkdir()
    (half / "model.safetensors").write_bytes(bytes(100))
    cluster.up(nodes=2)
    finish(cluster.train(*ARGUMENTS, "--name", "power"))
    assert cluster.result("power") == undisturbed


class Bucket:
    """An S3 server that can go away and come back with all that it held; `address` is that of a bucket."""

    def __init__(self) -> None:
        self._port = free_port()
        self._app = DomainDispatcherApplication(create_backend_app)
        self.address = f"s3://runs?endpoint_override=127.0.0.1:{self._port}&scheme=http&region=us-east-1"
        self.start()
        keys = {name.lower(): value for name, value in KEYS.items()}
        endpoint = f"http://127.0.0.1:{self._port}"
        boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1", **keys).create_bucket(
            Bucket="runs"
        )

    def start(self) -> None:
        self._server = make_server("127.0.0.1", self._port, self._app, threaded=True)
        Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    started = Bucket()
    yield started
    started.stop()


def test_bucket_and_mlflow_may_be_away_meanwhile(
    cluster: Cluster, undisturbed: Result, bucket: Bucket
) -> None:
    since = len(cluster.groups())
    job = start(cluster, "away", "--storage", bucket.address)
    bucket.stop()
    cluster.kill("mlflow")
    reached = steps(cluster, since)[-1]
    eventually(lambda: steps(cluster, since)[-1] > reached + CHECKPOINT_EVERY)
    bucket.start()
    cluster.start_mlflow()
    finish(job)
    assert len(cluster.groups()) == since + 1
    assert cluster.result("away", bucket.address.replace("?", "/away?")) == undisturbed


def test_a_job_without_room_says_what_it_waits_for(cluster: Cluster) -> None:
    job = cluster.train(*ARGUMENTS, "--name", "waiting", "--workers", "3", "--timeout", "2s")
    assert job.wait() == 1
    assert (
        "waiting: --workers 3 need 1 CPU each, and there is room for 2 of 3 (until --timeout 2s)"
        in job.output
    )
    assert "--workers 3 need 1 CPU each, and there is room for 2 of 3 after --timeout 2s" in job.output
