"""A large draw on a real cluster: whoever dies meanwhile, the shards in the end are those of a quiet day."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from gdl_ray import registry, tracking
from gdl_ray.data import Dataset
from gdl_ray.engine import Engine, seeds_of
from gdl_ray.families import build, preset
from gdl_ray.family import Family
from gdl_ray.home import bytes_sha256, file_sha256
from gdl_ray.train import checkpoint
from gdl_ray.train.store import Store
from gdl_ray.train.validation import sample_grid
from tests.cluster import Cluster, eventually

pytestmark = pytest.mark.slow

ARGUMENTS = ["digits-diffusion", "-n", "640", "--shard", "64", "--labels", "balanced", "--steps", "60"]
OPTIONS = {"steps": 60.0}


@pytest.fixture(scope="module")
def family(digits: Dataset) -> Family:
    return build("diffusion", preset("diffusion", "digits").model, digits.spec).eval()


@pytest.fixture(scope="module")
def cluster(
    digits: Dataset, family: Family, s3: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    """Two nodes, and the family as version 1 of digits-diffusion."""
    home = tmp_path_factory.mktemp("home")
    cluster = Cluster(home)
    try:
        cluster.up(nodes=2)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MLFLOW_TRACKING_URI", cluster.mlflow_uri)
            contents = checkpoint.Contents(
                description=checkpoint.describe(family),
                weights=family.state_dict(),
                samples_png=sample_grid(family),
            )
            checkpoint.save(home / "step", contents)
            run_id, _ = tracking.start_run("model", digits, {}, {})
            registry.register(run_id, home / "step", promote=True, scores={})
        yield cluster
    finally:
        cluster.down()


@pytest.fixture(scope="module")
def expected(family: Family) -> np.ndarray:
    """What the service draws for the same seeds and labels."""
    torch.set_num_threads(1)
    engine = Engine(family)
    labels = torch.arange(640) % 10
    samples = engine.submit(seeds_of(7, 640), labels, OPTIONS).future.result(timeout=300).numpy()
    engine.close(drain=True)
    return samples


def shards(folder: Path) -> dict[str, int]:
    """Names of the shards that are written, and when each was."""
    return {file.name: file.stat().st_mtime_ns for file in sorted(folder.glob("shard-*.npz"))}


def test_a_dead_worker_and_a_dead_driver_cost_what_they_had_not_written(
    cluster: Cluster, expected: np.ndarray, tmp_path: Path
) -> None:
    command = [*ARGUMENTS, "--seed", "7", "--out", str(tmp_path / "out")]
    job = cluster.start("jobs.sample", *command)
    eventually(lambda: len(shards(tmp_path / "out")) >= 2 or not job.is_running)
    assert job.is_running, job.output
    worker = cluster.workers(title="ray::draw_shard")[0]
    worker.kill()
    eventually(lambda: len(shards(tmp_path / "out")) >= 5 or not job.is_running)
    assert job.is_running, job.output
    job.kill()
    kept = shards(tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()

    again = cluster.start("jobs.sample", *command)
    assert again.wait() == 0, again.output
    written = shards(tmp_path / "out")
    assert len(written) == 10
    assert kept.items() <= written.items()  # not drawn again
    arrays = [np.load(tmp_path / "out" / name) for name in written]
    np.testing.assert_array_equal(np.concatenate([each["samples"] for each in arrays]), expected)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["model"], manifest["version"], manifest["n"]) == ("digits-diffusion", 1, 640)
    assert manifest["shards"] == {name: file_sha256(tmp_path / "out" / name) for name in written}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *(*written, "request.json", "manifest.json")
    }

    other = cluster.start("jobs.sample", *command, "--guidance", "2")
    assert other.wait() == 2
    assert "has a draw of options=" in other.output


def test_a_dead_node_costs_nothing_and_a_bucket_is_as_good_as_a_folder(
    cluster: Cluster, expected: np.ndarray, s3: str, tmp_path: Path
) -> None:
    bucket, _, query = s3.partition("?")
    address = f"{bucket}/{tmp_path.name}?{query}"
    job = cluster.start("jobs.sample", *ARGUMENTS, "--seed", "7", "--out", address)
    store = Store(address)
    eventually(lambda: store.read("shard-00001.npz") or not job.is_running)
    assert job.is_running, job.output
    cluster.kill(cluster.nodes[0])
    assert job.wait() == 0, job.output
    manifest = store.read_json("manifest.json")
    contents = [store.read(name) for name in manifest["shards"]]
    assert [bytes_sha256(content or b"") for content in contents] == list(manifest["shards"].values())
    for number, content in enumerate(contents):
        (tmp_path / f"{number}.npz").write_bytes(content or b"")
    parts = [np.load(tmp_path / f"{number}.npz")["samples"] for number in range(len(contents))]
    np.testing.assert_array_equal(np.concatenate(parts), expected)
    assert os.environ["AWS_ACCESS_KEY_ID"] == "testing"
