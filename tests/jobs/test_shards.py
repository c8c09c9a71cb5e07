"""The shards of a draw: what each holds, against the engine and the family; and on which terms one stays."""

import io
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

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
from jobs.shards import Draw, draw_shard, shard_name

DRAW = Draw(
    model="digits-diffusion",
    version=1,
    n=150,
    seed=5,
    labels="balanced",
    options={"guidance": 2.0, "steps": 3.0},
    shard=70,
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
    """An empty folder of this machine, or of a bucket."""
    if request.param == "folder":
        (tmp_path / "out").mkdir()
        return str(tmp_path / "out")
    bucket, _, query = request.getfixturevalue("s3").partition("?")
    return f"{bucket}/{tmp_path.name}?{query}"


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
    draw_shard(replace(DRAW, labels=labels, n=4), 0, str(tmp_path), "cpu")
    assert read(str(tmp_path), 0)["labels"].tolist() == [label] * 4


def test_a_shard_that_is_there_is_not_drawn_again(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = draw_shard(DRAW, 2, address, "cpu")
    monkeypatch.setattr(registry, "fetch", None)  # whoever draws, fails
    shards._engine.cache_clear()
    assert draw_shard(DRAW, 2, address, "cpu") == replace(first, drawn=0)


@pytest.mark.parametrize("harm", ["torn", "empty", "other"])
def test_what_is_no_such_shard_is_drawn_again(harm: str, address: str) -> None:
    store, name = Store(address), shard_name(2)
    draw_shard(DRAW, 2, address, "cpu")
    whole = read(address, 2)
    content = store.read(name)
    assert content is not None
    if harm == "other":
        draw_shard(replace(DRAW, seed=6), 2, str(address), "cpu")
    else:
        store.write(name, content[: len(content) // 2] if harm == "torn" else b"")
    assert draw_shard(DRAW, 2, address, "cpu").drawn == 10
    for field, array in read(address, 2).items():
        np.testing.assert_array_equal(array, whole[field])


def test_a_shard_that_cannot_be_written_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        draw_shard(DRAW, 2, str(tmp_path), "cpu")
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    assert not list(tmp_path.glob("*.npz"))
    assert draw_shard(DRAW, 2, str(tmp_path), "cpu").drawn == 10


def test_one_engine_draws_all_shards_of_a_process(tmp_path: Path) -> None:
    for number in range(3):
        draw_shard(DRAW, number, str(tmp_path), "cpu")
    assert shards._engine.cache_info().misses == 1
