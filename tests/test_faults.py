"""What may go wrong in a cluster costs time and nothing else. The oracle is a run to which nothing happened."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import Cluster, Job, Result, eventually

pytestmark = pytest.mark.slow
STEPS = 240
EVERY = 20  # steps between checkpoints
ARGUMENTS = ["energy", "--size", "0.5", "--workers", "2", "--steps", str(STEPS)]
ARGUMENTS += ["--report-every", "5", "--checkpoint-every", str(EVERY)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two nodes and MLflow."""
    with tempfile.TemporaryDirectory(prefix="gdl-faults-") as home:
        started = Cluster(Path(home))
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


def start(cluster: Cluster, name: str, *more: str) -> Job:
    """Start a run, and wait until it has a checkpoint and has gone on."""
    before = len(cluster.steps())
    job = cluster.train(*ARGUMENTS, "--name", name, *more)
    eventually(lambda: cluster.steps()[before:][-1:] > [EVERY])
    return job


def finish(job: Job) -> str:
    """Wait for the end of a job that must succeed; returns what it printed."""
    assert job.wait() == 0, job.output
    return job.output


def test_a_killed_driver_is_submitted_again(cluster: Cluster, undisturbed: Result) -> None:
    start(cluster, "driver").kill()
    assert "run driver goes on after step" in finish(cluster.train(*ARGUMENTS, "--name", "driver"))
    assert cluster.result("driver") == undisturbed


def test_a_killed_node_is_replaced(cluster: Cluster, undisturbed: Result) -> None:
    job = start(cluster, "node")
    cluster.kill(cluster.nodes[0])
    cluster.add_node()
    finish(job)
    assert cluster.result("node") == undisturbed


def test_notice_that_a_node_will_go_costs_no_step(cluster: Cluster, undisturbed: Result) -> None:
    before = len(cluster.steps())
    job = start(cluster, "notice")
    leaving = cluster.nodes[0]
    cluster.drain(leaving, deadline_s=30)
    cluster.add_node()
    output = finish(job)
    assert "a node is about to be taken away" in output
    assert "workers failed" not in output
    steps = cluster.steps()[before:]
    assert len(steps) == len(set(steps))
    assert cluster.result("notice") == undisturbed
    cluster.kill(leaving)


def test_a_run_outlives_the_power(cluster: Cluster, undisturbed: Result) -> None:
    start(cluster, "power")
    cluster.cut_power()
    half = cluster.home / "runs" / "power" / f"step-{STEPS:08d}-000000"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"\0" * 100)
    cluster.up(nodes=2)
    finish(cluster.train(*ARGUMENTS, "--name", "power"))
    assert cluster.result("power") == undisturbed
