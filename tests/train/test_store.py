"""The checkpoints of a run, in a folder and on a real S3 server: kept, found, and refused when damaged."""

import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from types import SimpleNamespace

import pytest
import torch

from gdl_ray.families import build, preset
from gdl_ray.family import DataSpec
from gdl_ray.train import checkpoint
from gdl_ray.train import store as store_module
from gdl_ray.train.checkpoint import Contents, DamagedCheckpointError
from gdl_ray.train.snapshot import Snapshot
from gdl_ray.train.store import Store, patiently

SPEC = DataSpec(name="toy", kind="image", shape=(1, 8, 8), levels=17, classes=10)
MODEL = build("vae", preset("vae", "digits").model, SPEC)


@pytest.fixture(params=["folder", "bucket"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "folder":
        (tmp_path / "run").mkdir()
        return Store(str(tmp_path / "run"))
    address: str = request.getfixturevalue("s3")
    bucket, _, query = address.partition("?")
    return Store(f"{bucket}/{tmp_path.name}?{query}")


def snapshot(step: int, score: float | None = None, evaluated: bool = True) -> Snapshot:
    contents = Contents(
        description=checkpoint.describe(MODEL),
        weights=MODEL.state_dict(),
        samples_png=b"picture",
        tensors={"weights/a": torch.full((3,), float(step))},
        counters={"step": step, "score": score, "evaluated": evaluated},
        history=[(step, {"train/loss": 1.0})],
    )
    return Snapshot(contents=contents, release=lambda: None)


def steps(store: Store) -> list[int]:
    return [saved.step for saved in store.saved()]


def test_what_is_saved_is_given_back(store: Store) -> None:
    assert store.saved() == []
    assert store.last() is None
    assert store.best() is None
    saved = store.save(snapshot(250, 1.9), keep=1)
    assert store.last() == store.best() == saved
    assert (saved.step, saved.score, saved.evaluated) == (250, 1.9, True)
    with store.open(saved.name) as folder:
        contents = checkpoint.load(folder)
    assert torch.equal(contents.tensors["weights/a"], torch.full((3,), 250.0))
    assert contents.history == [(250, {"train/loss": 1.0})]


def test_the_last_ones_and_the_best_are_kept(store: Store) -> None:
    for step, score in enumerate([2.0, 1.5, 1.7, 1.6, 1.9], start=1):
        store.save(snapshot(step, score), keep=2)
    assert steps(store) == [2, 4, 5]
    best, last = store.best(), store.last()
    assert best
    assert last
    assert (best.step, last.step) == (2, 5)


def test_a_step_that_is_repeated_takes_the_place_of_the_first(store: Store) -> None:
    for _ in range(3):
        again = store.save(snapshot(7, 2.0), keep=1)
        assert store.saved() == [again]


def test_without_a_score_the_last_evaluated_one_is_the_best(store: Store) -> None:
    store.save(snapshot(1), keep=1)
    store.save(snapshot(2), keep=1)
    hasty = store.save(snapshot(3, evaluated=False), keep=1)
    best = store.best()
    assert best
    assert (best.step, best.score) == (2, math.inf)
    assert store.last() == hasty
    assert steps(store) == [2, 3]


def damage(store: Store, name: str, file: str, change: str) -> None:
    path = f"{store._root}/{name}/{file}"
    if change == "lost":
        store._fs.delete_file(path)
        return
    with store._fs.open_input_stream(path) as stream:
        content = bytearray(stream.read())
    content[len(content) // 2] ^= 1
    with store._fs.open_output_stream(path) as stream:
        stream.write(bytes(content if change == "flipped" else content[: len(content) // 2]))


@pytest.mark.parametrize("change", ["torn", "flipped", "lost"])
@pytest.mark.parametrize("file", ["manifest.json", "model.safetensors", "resume/tensors.safetensors"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(
    store: Store, file: str, change: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = store.save(snapshot(1), keep=3)
    damaged = store.save(snapshot(2), keep=3)
    damage(store, damaged.name, file, change)
    assert store.last() == before
    told = capsys.readouterr().err
    assert damaged.name in told
    assert told.endswith("it is passed over\n")
    assert store.best() == before
    with pytest.raises(DamagedCheckpointError, match=damaged.name), store.open(damaged.name):
        pass


def test_half_a_checkpoint_is_swept_with_the_next_save(store: Store) -> None:
    store.save(snapshot(1), keep=1)
    half = store.save(snapshot(2), keep=2)
    damage(store, half.name, "manifest.json", "lost")
    assert steps(store) == [1]
    store.save(snapshot(2), keep=2)
    assert steps(store) == [1, 2]
    assert half.name not in store._folders()


def test_json_files_are_read_back(store: Store) -> None:
    assert store.read_json("run.json") is None
    store.write_json("run.json", {"a": 1})
    assert store.read_json("run.json") == {"a": 1}


def test_two_writers_of_a_file_leave_that_of_one(tmp_path: Path) -> None:
    """And whoever reads meanwhile reads a whole file."""
    store = Store(str(tmp_path))
    contents = [bytes([i]) * 500_000 for i in range(2)]

    def write(content: bytes) -> None:
        for _ in range(20):
            store.write("x", content)

    with ThreadPoolExecutor() as pool:
        writers = [pool.submit(write, content) for content in contents]
        read = []
        while not all(writer.done() for writer in writers):
            read.append(store.read("x"))
        for writer in writers:
            writer.result()
    assert {*read, store.read("x")} <= {None, *contents}
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for write in (Store(str(tmp_path)).write, Store(str(tmp_path)).write_first):
        with pytest.raises(OSError, match="no space"):
            write("x", b"content")
    assert not list(tmp_path.iterdir())


def test_of_many_who_write_first_one_does(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    contents = [str(i).encode() for i in range(8)]
    start = Barrier(8)

    def write(content: bytes) -> bytes | None:
        start.wait()
        store.write_first("x", content)
        return store.read("x")

    with ThreadPoolExecutor(8) as pool:
        seen = set(pool.map(write, contents))
    assert len(seen) == 1  # whoever looked saw the same
    assert seen <= set(contents)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_mount_without_links_has_the_file_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    Store(str(tmp_path)).write_first("x", b"content")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("x", b"content")]


def test_a_full_disk_loses_nothing_that_was_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file larger than the limit is what a full disk is to a process."""
    script = f"""
import resource, signal, sys
from tests.train.test_store import snapshot
from gdl_ray.train.store import Store
store = Store({str(tmp_path)!r})
first = store.save(snapshot(1), keep=1)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
try:
    store.save(snapshot(2), keep=1)
except Exception as error:
    print(type(error).__name__)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert store.last() == first and store.saved() == [first] and store._folders() == [first.name]
store.save(snapshot(2), keep=1)
print(store.last().step)
"""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=root
    )
    assert done.stdout.split()[0] in {"OSError", "SafetensorError"}
    assert done.stdout.split()[1] == "2"


def test_a_folder_that_is_gone_is_not_made_again(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "run"))
    with pytest.raises(FileNotFoundError, match="run is gone"):
        store.save(snapshot(1), keep=1)
    assert not (tmp_path / "run").exists()


def test_an_address_that_is_not_understood_is_named() -> None:
    with pytest.raises(ValueError, match="ftp://nowhere: "):
        Store("ftp://nowhere")


def test_a_bucket_that_does_not_answer_is_not_called_a_bad_address(monkeypatch: pytest.MonkeyPatch) -> None:
    def away(address: str) -> None:
        raise OSError("When resolving region: no route to host")

    monkeypatch.setattr("gdl_ray.train.store.fs.FileSystem", SimpleNamespace(from_uri=away))
    with pytest.raises(OSError, match="no route to host"):
        Store("s3://bucket/folder")


def test_a_store_that_does_not_answer_is_asked_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(store_module, "_RETRY_S", 0.01)
    failures = iter([OSError("no route to host"), OSError("no route to host"), None])

    def read() -> str:
        if failure := next(failures):
            raise failure
        return "here"

    assert patiently(read) == "here"
    assert capsys.readouterr().err.count("the storage does not answer (no route to host); trying again") == 2
    monkeypatch.setattr(store_module, "_PATIENCE_S", 0.0)
    failures = iter([OSError("gone for good"), OSError("gone for good"), None])
    with pytest.raises(OSError, match="gone for good"):
        patiently(read)
