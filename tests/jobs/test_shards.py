"""The shards of a draw: what each holds, against the engine and the family; and on which terms one stays."""

import io
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gdl_ray import registry
from gdl_ray.data import Dataset
from gdl_ray.engine import Engine, keys_of, seeds_of
from gdl_ray.families import build, preset
from gdl_ray.family import UNLABELLED, Family
from gdl_ray.home import bytes_sha256
from gdl_ray.train import checkpoint
from gdl_ray.train.store import Store
from jobs import shards
from jobs.shards import REQUEST, Draw, SamplingError, draw_shard, shard_name

DRAW = Draw(
    model="digits-diffusion",
    version=1,
    n=150,
    seed=5,
    labels="balanced",
    options={"guidance": 2.0, "steps": 3.0},
    shard=70,
    shape=(1, 8, 8),
    classes=10,
)


@pytest.fixture(scope="module")
def family(digits: Dataset) -> Family:
    return build("diffusion", preset("diffusion", "digits", 0.5).model, digits.spec).eval()


@pytest.fixture(autouse=True)
def _registered(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have the family for the version that the draw names; end the engine that draws it."""
    contents = checkpoint.Contents(description=checkpoint.describe(family), weights=family.state_dict())
    checkpoint.save(tmp_path / "checkpoint", contents)
    found = {("digits-diffusion", 1): tmp_path / "checkpoint"}
    monkeypatch.setattr(registry, "fetch", lambda model, version: found[model, version])
    yield
    shards._engine.cache_clear()


@pytest.fixture(params=["folder", "bucket"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder of this machine, or of a bucket, in which the draw is noted down."""
    if request.param == "folder":
        return noted(DRAW, str(tmp_path / "out"))
    bucket, _, query = request.getfixturevalue("s3").partition("?")
    return noted(DRAW, f"{bucket}/{tmp_path.name}?{query}")


def noted(draw: Draw, address: str) -> str:
    """Note a draw down, as the job does; returns the address."""
    store = Store(address)
    store.create()
    store.write_json(REQUEST, draw.record)
    return address


def read(address: str, number: int) -> dict[str, np.ndarray]:
    content = Store(address).read(shard_name(number))
    assert content is not None
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        return dict(arrays)


def test_the_shards_are_the_draw_and_each_sample_that_of_the_service(address: str, family: Family) -> None:
    written = [draw_shard(DRAW, number, address, "cpu") for number in (2, 0, 1)]
    assert [(shard.number, shard.drawn) for shard in written] == [(2, 10), (0, 70), (1, 70)]
    parts = [read(address, number) for number in range(DRAW.shards)]
    seeds, labels, samples = (
        torch.from_numpy(np.concatenate([part[name] for part in parts]))
        for name in ("seeds", "labels", "samples")
    )
    assert torch.equal(seeds, seeds_of(5, 150))
    assert torch.equal(labels, torch.arange(150) % 10)
    drawn = family.sample(keys_of(seeds), labels, **DRAW.options)
    assert (drawn != samples).float().mean() < 0.001  # to rounding: its batch has another shape

    engine = Engine(family)  # as the service has it, each sample alone, from last to first
    jobs = [engine.submit(seeds[[i]], labels[[i]], DRAW.options) for i in reversed(range(0, 150, 7))]
    alone = torch.cat([job.future.result(timeout=60) for job in reversed(jobs)])
    engine.close(drain=True)
    assert torch.equal(alone, samples[::7])

    for shard in written:
        content = Store(address).read(shard_name(shard.number))
        assert content is not None
        assert shard.sha256 == bytes_sha256(content)


@pytest.mark.parametrize(("labels", "label"), [("none", UNLABELLED), ("3", 3)])
def test_labels_are_one_class_or_any(labels: str, label: int, tmp_path: Path) -> None:
    draw = replace(DRAW, labels=labels, n=4)
    draw_shard(draw, 0, noted(draw, str(tmp_path)), "cpu")
    assert read(str(tmp_path), 0)["labels"].tolist() == [label] * 4


def test_a_shard_that_is_there_is_not_drawn_again(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = draw_shard(DRAW, 2, address, "cpu")
    monkeypatch.setattr(registry, "fetch", None)  # whoever draws, fails
    shards._engine.cache_clear()
    assert draw_shard(DRAW, 2, address, "cpu") == replace(first, drawn=0)


OTHERS = {
    "seeds": replace(DRAW, seed=6),
    "labels": replace(DRAW, labels="3"),
    "shape": replace(DRAW, shape=(1, 9, 9)),
}


@pytest.mark.parametrize("harm", ["torn", "empty", "alien", *OTHERS])
def test_what_is_no_such_shard_is_drawn_again(harm: str, address: str) -> None:
    store, name = Store(address), shard_name(2)
    draw_shard(DRAW, 2, address, "cpu")
    whole = read(address, 2)
    content = store.read(name)
    assert content is not None
    if harm == "shape":
        larger = whole | {"samples": np.zeros((10, 1, 9, 9), np.uint8)}
        content = shards._packed(**larger)
    elif harm in OTHERS:
        draw_shard(OTHERS[harm], 2, noted(OTHERS[harm], address), "cpu")
        content = store.read(name) or b""
        noted(DRAW, address)
    harmed = {"torn": content[: len(content) // 2], "empty": b"", "alien": b"a" * len(content)}
    store.write(name, harmed.get(harm, content))
    assert draw_shard(DRAW, 2, address, "cpu").drawn == 10
    for field, array in read(address, 2).items():
        np.testing.assert_array_equal(array, whole[field])


def test_no_flipped_bit_is_taken_for_the_shard_nor_ends_the_job(tmp_path: Path) -> None:
    """The readers of zip and npy raise some ten kinds of errors over them; many bits they do not heed."""
    draw_shard(DRAW, 2, noted(DRAW, str(tmp_path)), "cpu")
    whole = read(str(tmp_path), 2)
    content = Store(str(tmp_path)).read(shard_name(2)) or b""
    assert shards._holds(content, DRAW, 2)
    random = np.random.default_rng(0)
    for place in random.choice(8 * len(content), 3000, replace=False):
        flipped = bytearray(content)
        flipped[place // 8] ^= 1 << place % 8
        if shards._holds(bytes(flipped), DRAW, 2):
            with np.load(io.BytesIO(flipped)) as arrays:
                assert all((arrays[name] == whole[name]).all() for name in whole)


@pytest.mark.parametrize(
    ("there", "told"), [(None, "no request.json"), (OTHERS["seeds"], "another draw")], ids=["none", "other"]
)
def test_a_folder_that_is_not_the_one_of_all_nodes_is_refused(
    there: Draw | None, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "_LATE_S", 0.0)
    if there:
        noted(there, str(tmp_path))
    with pytest.raises(SamplingError, match=f"--out {tmp_path} is not one folder for all nodes: .* {told}"):
        draw_shard(DRAW, 2, str(tmp_path), "cpu")
    assert not list(tmp_path.glob("*.npz"))


def test_a_registry_and_a_storage_that_are_away_are_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each call fails once, the store's making too."""
    noted(DRAW, str(tmp_path))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    failures = []

    def hiccup(owner: Any, name: str, error: Exception) -> None:
        call = getattr(owner, name)
        left = [error]

        def either(*arguments: Any) -> Any:
            if left:
                failures.append(name)
                raise left.pop()
            return call(*arguments)

        monkeypatch.setattr(owner, name, either)

    hiccup(registry, "fetch", registry.RegistryUnavailable("no MLflow server answers"))
    hiccup(shards, "Store", OSError("AWS Error NETWORK_CONNECTION"))
    for name in ("read_json", "read", "write"):
        hiccup(Store, name, OSError("AWS Error SLOW_DOWN"))
    assert draw_shard(DRAW, 2, str(tmp_path), "cpu").drawn == 10
    assert sorted(failures) == ["Store", "fetch", "read", "read_json", "write"]


def test_a_shard_that_cannot_be_written_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError("no space left on device")

    noted(DRAW, str(tmp_path))
    monkeypatch.setattr("gdl_ray.train.store._PATIENCE_S", 0.0)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        draw_shard(DRAW, 2, str(tmp_path), "cpu")
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    assert not list(tmp_path.glob("*.npz"))
    assert draw_shard(DRAW, 2, str(tmp_path), "cpu").drawn == 10


def test_one_engine_draws_all_shards_of_a_process(tmp_path: Path) -> None:
    noted(DRAW, str(tmp_path))
    for number in range(3):
        draw_shard(DRAW, number, str(tmp_path), "cpu")
    assert shards._engine.cache_info().misses == 1
