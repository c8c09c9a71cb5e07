"""The command line of the sampling job: what it refuses, in which words; and what a folder is kept for."""

import json
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayTaskError

from gdl_ray import registry, tracking
from gdl_ray.data import Dataset
from gdl_ray.families import build, preset
from gdl_ray.registry import Registered
from gdl_ray.train import checkpoint
from gdl_ray.train.store import Store
from jobs import sample
from jobs.models import resolve
from jobs.options import UsageError
from jobs.sample import main, parse
from jobs.shards import Draw, SamplingError, Shard
from jobs.tasks import Tasks

MODELS = {
    "digits-diffusion": Registered({"champion": 2, "next": 3}, {}, 12),
    "digits-new": Registered({}, {}, 1),
}
COMMAND = ["digits-diffusion", "-n", "100", "--out", "out"]


@pytest.fixture(autouse=True)
def _registry(digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry that has a diffusion model in all versions up to its newest."""
    family = build("diffusion", preset("diffusion", "digits").model, digits.spec).eval()
    contents = checkpoint.Contents(description=checkpoint.describe(family), weights=family.state_dict())
    checkpoint.save(tmp_path / "checkpoint", contents)
    monkeypatch.setattr(tracking, "check", lambda: None)
    monkeypatch.setattr(registry, "registered", lambda: MODELS)
    monkeypatch.setattr(registry, "exists", lambda name, version: 1 <= version <= MODELS[name].latest)
    monkeypatch.setattr(registry, "fetch", lambda name, version: tmp_path / "checkpoint")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("reference", "version"),
    [("digits-diffusion", 2), ("digits-diffusion@next", 3), ("digits-diffusion@12", 12), ("digits-new@1", 1)],
)
def test_a_version_is_the_champion_a_number_or_an_alias(reference: str, version: int) -> None:
    assert resolve(reference) == (reference.partition("@")[0], version)


def test_a_draw_says_all_that_decides_it(tmp_path: Path) -> None:
    work = parse([*COMMAND, "--seed", "7", "--labels", "balanced", "--guidance", "2", "--shard", "30"])
    assert work.draw == Draw(
        model="digits-diffusion",
        version=2,
        n=100,
        seed=7,
        labels="balanced",
        options={"guidance": 2.0, "steps": 25.0},  # the defaults too
        shard=30,
        shape=(1, 8, 8),
        classes=10,
    )
    assert work.store.address == f"{tmp_path}/out"
    assert (work.draw.shards, work.draw.size(0), work.draw.size(3)) == (4, 30, 10)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ["nobody", *COMMAND[1:]],
            "no model 'nobody' is registered: choose from digits-diffusion, digits-new",
        ),
        (["digits-diffusion@13", *COMMAND[1:]], "digits-diffusion has no version 13; the newest is 12"),
        (
            ["digits-diffusion@best", *COMMAND[1:]],
            "digits-diffusion has no alias 'best': its aliases are "
            "digits-diffusion@champion, digits-diffusion@next; digits-diffusion@12 is its newest version",
        ),
        (["digits-new", *COMMAND[1:]], "digits-new has no alias 'champion': its aliases are none; "),
        ([*COMMAND, "-n", "0"], "-n 0 must be at least 1"),
        ([*COMMAND, "--shard", "0"], "--shard 0 must be at least 1"),
        ([*COMMAND, "-n", "1000000", "--shard", "1"], "--shard 1 makes 1,000,000 shards: make them larger"),
        ([*COMMAND, "--workers", "-1"], "--workers -1 must be at least 0"),
        ([*COMMAND, "--seed", "-1"], "--seed -1 must be at least 0"),
        ([*COMMAND, "--seed", str(2**53)], "--seed 9007199254740992 must be below 2**53"),
        ([*COMMAND, "--labels", "10"], "--labels 10: write none, balanced or a class from 0 to 9"),
        ([*COMMAND, "--labels", "-1"], "--labels -1: write none, balanced or a class from 0 to 9"),
        ([*COMMAND, "--steps", "0"], "--steps=0 must be an integer from 1 to "),
        ([*COMMAND, "--steps", "2.5"], "--steps=2.5 must be an integer from 1 to "),
        ([*COMMAND, "--out", "ftp://x"], "--out ftp://x: "),
        ([*COMMAND, "--timeout", "5"], "--timeout '5': write a time as 60s, 10min or 2h"),
    ],
)
def test_bad_input_ends_with_one_line_that_says_what_to_do(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"jobs.sample: {told}")


@pytest.mark.parametrize(
    "arguments", [[*COMMAND, "--temperature", "1"], [*COMMAND, "--guidance", "x"], ["m"]]
)
def test_the_parser_ends_with_the_same_exit_code(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage: python -m jobs.sample" in capsys.readouterr().err


def test_a_server_that_is_away_ends_with_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert main(COMMAND) == 2
    assert "no MLflow server answers at MLFLOW_TRACKING_URI=http://127.0.0.1:9" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"version": 3}, "version=2, not 3"),
        ({"seed": 1}, "seed=0, not 1"),
        ({"labels": "3"}, "labels=none, not 3"),
        ({"options": {"guidance": 1.0, "steps": 9.0}}, r"options=.*'steps': 25.0.*, not .*'steps': 9.0}"),
        ({"n": 200}, "n=100, not 200"),
    ],
)
def test_a_folder_is_kept_for_one_draw(other: dict[str, Any], told: str) -> None:
    work = parse(COMMAND)
    for _ in range(2):  # again is fine
        sample._claim(work.store, work.draw)
    with pytest.raises(UsageError, match=f"--out .*/out has a draw of {told}: ask for the same"):
        sample._claim(work.store, replace(work.draw, **other))


@pytest.mark.parametrize("content", [b'{"model":', b"[1]", b"null", b"{}", b"\xff", b""])
def test_a_request_that_is_none_is_named(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "request.json").write_bytes(content)
    monkeypatch.setattr(sample, "connect", lambda work: None)
    assert main(COMMAND) == 2
    told = f"--out {tmp_path}/out: {tmp_path}/out/request.json is not the request of a draw: delete it, or "
    assert capsys.readouterr().err.startswith(f"jobs.sample: {told}")
    assert (tmp_path / "out" / "request.json").read_bytes() == content


def test_a_folder_in_place_of_the_request_is_named(tmp_path: Path) -> None:
    (tmp_path / "out" / "request.json").mkdir(parents=True)
    work = parse(COMMAND)
    with pytest.raises(UsageError, match="is not the request of a draw"):
        sample._claim(work.store, work.draw)


def test_of_two_jobs_that_claim_a_folder_at_once_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither sees a request when it looks."""
    work = parse(COMMAND)
    first, second = (replace(work.draw, seed=seed) for seed in (1, 2))
    sample._claim(work.store, first)
    monkeypatch.setattr(Store, "read", lambda store, name: None)
    monkeypatch.setattr(
        Store, "read_json", lambda store, name: json.loads((tmp_path / "out" / name).read_text())
    )
    with pytest.raises(UsageError, match="has a draw of seed=1, not 2"):
        sample._claim(work.store, second)
    sample._claim(work.store, first)


def test_a_version_that_its_alias_outlived_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fetch(name: str, version: int) -> Path:
        raise registry.VersionNotFound(f"{name} has no version {version}")

    monkeypatch.setattr(registry, "fetch", fetch)
    assert main(COMMAND) == 2
    told = "digits-diffusion has no version 2: name another, as digits-diffusion@NUMBER, or move the alias"
    assert capsys.readouterr().err == f"jobs.sample: {told}\n"


def test_a_bucket_that_does_not_answer_ends_with_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def away(address: str) -> Store:
        raise OSError("When resolving region: no route to host")

    monkeypatch.setattr("jobs.options.Store", away)
    assert main([*COMMAND, "--out", "s3://bucket/x"]) == 2
    told = "jobs.sample: --out s3://bucket/x does not answer: When resolving region: no route to host\n"
    assert capsys.readouterr().err == told


@pytest.mark.parametrize("away_times", [1, 99])
def test_the_manifest_is_written_when_the_storage_answers_again_or_the_job_says_why_not(
    away_times: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failures = iter(range(away_times))
    write = Store.write

    def hiccup(store: Store, name: str, content: bytes) -> None:
        if next(failures, None) is not None:
            raise OSError("AWS Error SLOW_DOWN")
        write(store, name, content)

    monkeypatch.setattr(Store, "write", hiccup)
    monkeypatch.setattr("gdl_ray.train.store._PATIENCE_S", 600 if away_times == 1 else 0)
    monkeypatch.setattr("gdl_ray.train.store._RETRY_S", 0)
    monkeypatch.setattr(sample, "connect", lambda work: None)
    monkeypatch.setattr(sample, "wait_for_room", lambda work: None)
    monkeypatch.setattr(sample, "_drawn", lambda work: iter([Shard(0, "a" * 64, 100)]))
    assert main(COMMAND) == (0 if away_times == 1 else 1)
    store, told = parse(COMMAND).store, capsys.readouterr().err
    assert (store.read("manifest.json") is None) == (away_times == 99)
    assert told.startswith(
        "the storage does not answer" if away_times == 1 else "jobs.sample: all shards are "
    )
    assert "Traceback" not in told


@pytest.mark.parametrize(
    ("cause", "told"),
    [
        (SamplingError("--out x is not one folder"), "--out x is not one folder"),
        (OSError("AWS Error SLOW_DOWN"), "a shard could not be drawn: OSError('AWS Error SLOW_DOWN')"),
    ],
)
def test_why_a_shard_failed_is_told_in_a_line(
    cause: Exception, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(reference: object) -> None:
        kind: Any = RayTaskError  # its methods have no types
        raise kind("draw_shard", "Traceback of the worker", cause).as_instanceof_cause()

    task = SimpleNamespace(remote=lambda *arguments: object())
    cluster = SimpleNamespace(wait=lambda pending, num_returns: (pending, []), get=fail)
    monkeypatch.setattr(sample, "ray", cluster)
    monkeypatch.setattr(Tasks, "remote", lambda self, call: task)
    monkeypatch.setattr(Tasks, "room", lambda self: 1)
    monkeypatch.setattr(sample, "connect", lambda work: None)
    monkeypatch.setattr(sample, "wait_for_room", lambda work: None)
    assert main(COMMAND) == 1
    assert capsys.readouterr().err == f"jobs.sample: {told}\n"


def test_the_manifest_comes_last_and_names_every_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    work = parse([*COMMAND, "--shard", "40"])
    shards = [Shard(2, "c" * 64, 20), Shard(0, "a" * 64, 0), Shard(1, "b" * 64, 40)]
    monkeypatch.setattr(sample, "wait_for_room", lambda work: None)
    monkeypatch.setattr(sample, "_drawn", lambda work: iter(shards))
    sample.run(work)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert list(manifest["shards"].items()) == [
        *(("shard-00000.npz", "a" * 64), ("shard-00001.npz", "b" * 64), ("shard-00002.npz", "c" * 64))
    ]
    assert manifest["version"] == 2
    assert Store(str(tmp_path / "out")).read_json("request.json")["n"] == 100
    assert "100 samples in 3 shards" in capsys.readouterr().out


def test_progress_counts_what_was_drawn_now(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = sample._Progress(replace(parse(COMMAND).draw, n=2000, shard=500))
    for seconds, shard in ((0.5, Shard(0, "", 0)), (10, Shard(1, "", 500)), (0.1, Shard(2, "", 500))):
        now[0] += seconds
        progress.tell(shard)
    now[0] += 9.4
    progress.tell(Shard(3, "", 500))
    assert capsys.readouterr().out.splitlines() == [
        "jobs.sample: 1,000 of 2,000   50%",
        "jobs.sample: 2,000 of 2,000  100%  105 samples/s  0 s left",
    ]
