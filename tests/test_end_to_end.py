"""What the README promises, on a real platform: submit, train, register, serve, sample, follow, withdraw."""

import json
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from mlflow import MlflowClient
from numpy.typing import NDArray

from gdl_ray.client import Client, Preview, ServerProblem
from gdl_ray.families import FAMILIES
from infra.local import Platform
from infra.processes import tree
from tests.conftest import start

pytestmark = pytest.mark.slow
MODEL = "digits-vae"
ARGUMENTS = ["vae", "--data", "digits", "--workers", "2", "--steps", "100"]
ARGUMENTS += ["--report-every", "10", "--checkpoint-every", "50"]


def submit(platform: Platform, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run a job to its end."""
    job = start(platform, *arguments)
    output, _ = job.communicate(timeout=300)
    return subprocess.CompletedProcess(job.args, job.returncode, output)


def eventually(condition: Callable[[], bool], limit_s: float = 60.0) -> float:
    """Wait for a condition; returns the seconds it took."""
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() - begin < limit_s
        time.sleep(0.1)
    return time.monotonic() - begin


@pytest.fixture(scope="module")
def client(platform: Platform) -> Client:
    return Client(platform.urls["serve"])


@pytest.fixture(scope="module")
def trained(platform: Platform) -> str:
    """Output of the job that trained versions 1 and 2."""
    first = submit(platform, *ARGUMENTS, "--name", "first")
    assert first.returncode == 0, first.stdout
    second = submit(platform, *ARGUMENTS, "--seed", "1")
    assert second.returncode == 0, second.stdout
    assert "champion stays 1" in second.stdout
    return first.stdout


def served(client: Client, name: str = MODEL) -> int | None:
    """Version that is champion, once a replica holds it."""
    for entry in client.models():
        if entry["name"] == name and entry["champion"] in [each["version"] for each in entry["served"]]:
            return int(entry["champion"])
    return None


def registry(platform: Platform) -> MlflowClient:
    return MlflowClient(platform.urls["mlflow"])


def test_the_job_says_what_it_did(trained: str) -> None:
    lines = trained.splitlines()
    assert any("step    100  100%" in line for line in lines)
    assert sum("step     50" in line for line in lines) == 1
    assert any(line.startswith(f"jobs.train: {MODEL} version 1 (champion)") for line in lines)


def test_the_run_holds_curves_and_pictures(platform: Platform, trained: str) -> None:
    mlflow = registry(platform)
    experiment = mlflow.get_experiment_by_name("digits")
    assert experiment
    run = next(r for r in mlflow.search_runs([experiment.experiment_id]) if r.info.run_name == "first")
    assert run.info.status == "FINISHED"
    assert run.data.tags["family"] == "vae"
    assert run.data.tags["workers"] == "2"
    assert run.data.params["optimization.batch_size"] == "64"
    steps = [metric.step for metric in mlflow.get_metric_history(run.info.run_id, "train/loss")]
    assert steps == list(range(10, 101, 10))
    assert {"validation/bits_per_dim", "test/bits_per_dim_lower_bound", "examples_per_s"} <= set(
        run.data.metrics
    )
    assert mlflow.list_artifacts(run.info.run_id, "images")


def test_the_champion_becomes_an_endpoint(platform: Platform, client: Client, trained: str) -> None:
    eventually(lambda: served(client) == 1)
    x = client.sample(MODEL, n=16, seed=7)
    assert x.shape == (16, 1, 8, 8)
    assert x.dtype == np.uint8
    assert np.array_equal(x, client.sample(MODEL, n=16, seed=7))
    assert not np.array_equal(x, client.sample(MODEL, n=16, seed=8))
    nats = client.log_likelihood(MODEL, x, samples=10)
    assert ((nats < 0) & (nats > -64 * np.log(17) * 2)).all()
    # Exactly what the README types, form content type and all.
    curl = ["curl", "-sX", "POST", f"{platform.urls['serve']}/v1/models/{MODEL}/sample"]
    body = json.dumps({"n": 64, "seed": 7, "format": "png"})
    assert subprocess.run([*curl, "-d", body], capture_output=True, check=True).stdout[:4] == b"\x89PNG"


def test_bad_requests_are_told_apart(platform: Platform, client: Client, trained: str) -> None:
    eventually(lambda: served(client) == 1)
    url = f"{platform.urls['serve']}/v1/models"
    cases: list[tuple[str, str, Any, int]] = [
        ("POST", "nope/sample", {}, 404),
        ("POST", f"{MODEL}/sample", {"n": 0}, 422),
        ("POST", f"{MODEL}/sample", {"n": 10**9}, 422),
        ("POST", f"{MODEL}/sample", {"seed": "x"}, 422),
        ("POST", f"{MODEL}/sample", {"label": 99}, 422),
        ("POST", f"{MODEL}/sample", b"{" * 10_000_000, 413),
        ("POST", f"{MODEL}/sample", b"{broken", 422),
        ("GET", f"{MODEL}/sample", None, 405),
    ]
    for method, path, body, status in cases:
        content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        response = httpx.request(method, f"{url}/{path}", content=content, timeout=30)
        assert response.status_code == status, (path, response.text[:200])
        assert response.headers["content-type"] == "application/problem+json"
        assert response.json()["status"] == status


def test_a_sample_does_not_depend_on_its_neighbours(client: Client, trained: str) -> None:
    eventually(lambda: served(client) == 1)
    alone = client.sample(MODEL, n=5, seed=3)
    crowd: list[NDArray[Any]] = []

    def ask(seed: int) -> None:
        for _ in range(5):
            crowd.append(client.sample(MODEL, n=5 if seed == 3 else 1 + seed % 9, seed=seed))

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in [3, *range(100, 132)]]
    for thread in threads:
        thread.start()
    mine = [client.sample(MODEL, n=5, seed=3) for _ in range(20)]
    for thread in threads:
        thread.join()
    assert all(np.array_equal(alone, x) for x in mine)


def test_the_endpoint_follows_the_alias_and_loses_nothing(
    platform: Platform, client: Client, trained: str
) -> None:
    eventually(lambda: served(client) == 1)
    before = client.sample(MODEL, n=4, seed=7)
    failures: list[str] = []
    answers: list[int] = []
    stop = threading.Event()

    def load() -> None:
        with httpx.Client(base_url=platform.urls["serve"], timeout=30) as http:
            while not stop.is_set():
                response = http.post(f"/v1/models/{MODEL}/sample", content=b'{"n": 4, "seed": 7}')
                if response.status_code == 200:
                    answers.append(int(response.headers["x-version"]))
                else:
                    failures.append(f"{response.status_code} {response.text}")

    threads = [threading.Thread(target=load) for _ in range(16)]
    for thread in threads:
        thread.start()
    try:
        eventually(lambda: len(answers) > 50)
        registry(platform).set_registered_model_alias(MODEL, "champion", "2")
        assert eventually(lambda: 2 in answers[-50:], limit_s=15) < 15
        time.sleep(1)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert failures == []
    assert set(answers) == {1, 2}
    assert not np.array_equal(before, client.sample(MODEL, n=4, seed=7))


def test_what_loses_its_alias_is_withdrawn(platform: Platform, client: Client, trained: str) -> None:
    registry(platform).delete_registered_model_alias(MODEL, "champion")

    def is_gone() -> bool:
        try:
            client.sample(MODEL, n=1)
        except ServerProblem as problem:
            return problem.status == 404 and "has no champion" in str(problem)
        return False

    eventually(is_gone)
    assert client.sample(f"{MODEL}@2", n=1).shape == (1, 1, 8, 8)


@pytest.mark.parametrize(
    "family",
    # CI has room for the two that train otherwise: with chains that workers share, and in two phases.
    [pytest.param(each, marks=() if each in ("energy", "gan") else pytest.mark.long) for each in FAMILIES],
)
def test_every_family_trains_on_two_workers_and_answers(
    platform: Platform, client: Client, family: str
) -> None:
    arguments = [family, "--workers", "2", "--steps", "10", "--report-every", "5", "--checkpoint-every", "10"]
    job = submit(platform, *arguments, "--size", "0.5", "--promote")
    assert job.returncode == 0, job.stdout
    name = f"digits-{family}"
    assert f"jobs.train: {name} version" in job.stdout
    eventually(lambda: served(client, name) is not None)
    x = client.sample(name, n=6, seed=7, label=3)
    assert x.shape == (6, 1, 8, 8)
    assert x.max() <= 16
    assert np.array_equal(x[:2], client.sample(name, n=2, seed=7, label=3))
    assert client.sample(name, n=2).shape == (2, 1, 8, 8)  # without a label
    ask_for_all(client, name, x[:2])


def ask_for_all(client: Client, name: str, x: NDArray[Any]) -> None:
    """Ask for all that a model says it can, and see that the answers fit each other."""
    operations = set(client.card(name)["operations"])
    if "log_likelihood" in operations:
        nats = client.log_likelihood(name, x)
        assert np.isfinite(nats).all()
        probabilities = client.classify(name, x)
        np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-5)
    if "encode" in operations:
        z = client.encode(name, x)
        assert client.decode(name, z).shape == x.shape
        assert client.interpolate(name, x[0], x[1], steps=3).shape == (3, 1, 8, 8)
    if "complete" in operations:
        known = np.zeros((1, 8, 8), bool)
        known[:, :4] = True
        drawn = client.complete(name, x, known, n=2, seed=7)
        np.testing.assert_array_equal(drawn[:, :, :4], x.repeat(2, 0)[:, :, :4])
    *previews, last = client.stream(name, n=3, seed=7)
    np.testing.assert_array_equal(last.x, client.sample(name, n=3, seed=7))
    assert all(isinstance(preview, Preview) and 0 < preview.share < 1 for preview in previews)
    assert bool(previews) == (name in MANY_STEPS)


MANY_STEPS = {f"digits-{name}" for name in ("autoregressive", "flow", "energy", "diffusion", "hierarchical")}


def replicas(platform: Platform, name: str) -> list[psutil.Process]:
    """Find the processes of a model's own replicas."""
    found = []
    for process in tree(platform.processes["ray"]):
        with suppress(psutil.NoSuchProcess):
            if process.name().startswith("ray::ServeRepl") and f"model-{name}" in " ".join(process.cmdline()):
                found.append(process)
    return found


def test_a_model_may_have_replicas_of_its_own_and_one_may_die(platform: Platform, client: Client) -> None:
    name = "digits-gan"
    registry(platform).set_registered_model_tag(name, "serve.replicas", "2")
    expected = client.sample(name, n=4, seed=7)
    eventually(lambda: len(replicas(platform, name)) == 2)
    eventually(lambda: sum(each["replicas"] for each in entry_of(client, name)["served"]) >= 2)
    killed = replicas(platform, name)[0]
    answers = []
    for i in range(200):
        if i == 20:
            killed.kill()
        answers.append(client.sample(name, n=4, seed=7))
    assert all(np.array_equal(expected, answer) for answer in answers)
    eventually(lambda: len({process.pid for process in replicas(platform, name)} - {killed.pid}) == 2)
    registry(platform).delete_registered_model_tag(name, "serve.replicas")
    eventually(lambda: not replicas(platform, name))
    assert np.array_equal(expected, client.sample(name, n=4, seed=7))


def entry_of(client: Client, name: str) -> dict[str, Any]:
    return next(entry for entry in client.models() if entry["name"] == name)


def history(platform: Platform, name: str, metric: str) -> list[tuple[int, float]]:
    """Steps and values of a metric, as MLflow has them."""
    mlflow = registry(platform)
    (run,) = mlflow.search_runs(["1"], filter_string=f"attributes.run_name = '{name}'")
    return [(each.step, each.value) for each in mlflow.get_metric_history(run.info.run_id, metric)]


def train_workers(platform: Platform) -> list[psutil.Process]:
    """Find the processes of Ray Train's workers; others may end meanwhile."""
    found = []
    for process in tree(platform.processes["ray"]):
        with suppress(psutil.NoSuchProcess):
            if process.name().startswith("ray::RayTrainWork"):
                found.append(process)
    return found


def test_a_killed_worker_costs_time_and_nothing_else(platform: Platform, trained: str) -> None:
    """SIGKILL amid training: the same numbers as the run `first`, none of them logged twice."""
    job = start(platform, *ARGUMENTS, "--name", "killed")
    saved = platform.home / "runs" / "killed"
    # The folder, not the job's log, which arrives a second late: training may be over by then.
    eventually(lambda: any(saved.glob("step-00000050-*/manifest.json")), limit_s=120)
    workers = train_workers(platform)
    assert len(workers) == 2
    workers[0].kill()
    rest, _ = job.communicate(timeout=300)
    assert job.returncode == 0, rest
    for metric in ("train/loss", "validation/bits_per_dim", "test/bits_per_dim_lower_bound"):
        assert history(platform, "killed", metric) == history(platform, "first", metric)


def test_checkpoints_are_validated_apart_while_training_goes_on(platform: Platform, trained: str) -> None:
    arguments = [
        "vae",
        "--steps",
        "100",
        "--report-every",
        "10",
        "--checkpoint-every",
        "50",
        "--name",
        "apart",
    ]
    job = submit(platform, *arguments, "--validate-apart")
    assert job.returncode == 0, job.stdout
    apart = dict(history(platform, "apart", "validation/bits_per_dim"))
    within = dict(history(platform, "first", "validation/bits_per_dim"))
    assert apart == pytest.approx(within, rel=1e-5)  # two workers there, one here
    assert [step for step, _ in history(platform, "apart", "train/loss")] == list(range(10, 101, 10))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ["vae", "--workers", "64"],
            "--workers 64 need 1 CPU each, and there is room for",
        ),
        (["vae", "--gpu"], "need 1 CPU and 1 GPU each, and there is room for 0 of 1 in the whole cluster"),
    ],
)
def test_a_cluster_without_the_resources_is_named(
    platform: Platform, arguments: list[str], told: str
) -> None:
    refused = submit(platform, *arguments)
    assert refused.returncode != 0
    assert told in refused.stdout


def test_divergence_is_told_and_nothing_is_registered(platform: Platform) -> None:
    ended = submit(platform, "vae", "--optimization.learning-rate", "1e6", "--name", "wild")
    assert ended.returncode != 0
    assert "training diverged; lower --optimization.learning-rate" in ended.stdout
    runs = registry(platform).search_runs(["1"], filter_string="attributes.run_name = 'wild'")
    assert [run.info.status for run in runs] == ["FAILED"]
