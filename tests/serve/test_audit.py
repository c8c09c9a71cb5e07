"""What is written down of requests: all of it, privately, and nothing that a client has made up."""

import json
import logging
import os
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from serve import audit
from serve.audit import REQUEST_ID, Audit, Entry, JsonLines

SECRET = "gdl_" + "aB3-_" * 8 + "xyz"
FORGED = 'x"}\n{"time": "2026-01-01", "key_name": "root"}\r\x0b\u2028\x1b[2J\x00'


def entry(**fields: Any) -> Entry:
    usual: dict[str, Any] = {
        "request_id": "5f0c",
        "key_id": "8a1b",
        "key_name": "ada",
        "client": "127.0.0.1",
        "method": "POST",
        "path": "/v1/models/digits-vae/sample",
        "status": 200,
        "seconds": 0.25,
        "bytes": 1234,
    }
    return Entry(**(usual | fields))


def lines(folder: Path) -> list[dict[str, Any]]:
    """Every line of every file, oldest first."""
    files = sorted(
        folder.iterdir(), key=lambda file: -int(file.suffix[1:]) if file.suffix[1:].isdigit() else 0
    )
    return [json.loads(line) for file in files for line in file.read_bytes().splitlines()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "audit"


def test_who_sampled_what_is_written_down(folder: Path) -> None:
    trail = Audit(folder)
    before = time.time()
    trail.write(entry(model="digits-vae", version=3, operation="sample", n=16, seed=2**53 - 1))
    trail.close()
    (line,) = lines(folder)
    written = datetime.fromisoformat(line.pop("time"))
    assert before - 0.001 <= written.timestamp() <= time.time()
    assert str(written.tzinfo) == "UTC"
    assert line == {
        "request_id": "5f0c",
        "key_id": "8a1b",
        "key_name": "ada",
        "client": "127.0.0.1",
        "method": "POST",
        "path": "/v1/models/digits-vae/sample",
        "model": "digits-vae",
        "version": 3,
        "operation": "sample",
        "n": 16,
        "seed": 2**53 - 1,
        "status": 200,
        "problem": None,
        "seconds": 0.25,
        "bytes": 1234,
    }


def test_the_home_keeps_it_where_nothing_else_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GDL_RAY_HOME", str(tmp_path))
    trail = Audit()
    trail.close()
    assert trail.file.parent == tmp_path / "logs" / "audit"


def test_a_client_cannot_forge_a_line(folder: Path) -> None:
    trail = Audit(folder)
    trail.write(entry(path=FORGED, model=FORGED, client=FORGED, method=FORGED))
    trail.close()
    content = trail.file.read_bytes()
    assert content.count(b"\n") == 1
    assert all(32 <= byte < 127 for byte in content[:-1])
    (line,) = lines(folder)
    assert (line["path"], line["key_name"]) == (FORGED, "ada")


def test_a_secret_is_struck_out_wherever_it_stands(folder: Path) -> None:
    trail = Audit(folder)
    trail.write(entry(path=f"/v1/models?key={SECRET}", model=SECRET))
    trail.close()
    (line,) = lines(folder)
    assert line["path"] == "/v1/models?key=gdl_***"
    assert SECRET[4:] not in trail.file.read_text()


def test_files_are_private_and_bounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "OLD_FILES", 3)
    before = os.umask(0)
    try:
        trail = Audit(folder, file_bytes=2000)
        for seed in range(100):
            trail.write(entry(seed=seed))
        trail.close()
    finally:
        os.umask(before)
    files = list(folder.iterdir())
    assert len(files) == 4
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert all(file.stat().st_size <= 2000 for file in files)
    seeds = [line["seed"] for line in lines(folder)]
    assert seeds == list(range(100 - len(seeds), 100))


def test_each_process_has_a_file_of_its_own(folder: Path) -> None:
    script = "import sys, pathlib, serve.audit; serve.audit.Audit(pathlib.Path(sys.argv[1])).close()"
    command = [sys.executable, "-c", script, str(folder)]
    root = Path(__file__).parents[2]
    processes = [subprocess.Popen(command, cwd=root) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    names = [file.stem.rpartition("-")[2] for file in folder.iterdir()]
    assert sorted(names) == sorted(str(process.pid) for process in processes)


class SlowDisk:
    """Holds each line up until the test lets it through."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stuck = True
        self.reached = threading.Event()
        through = audit._PrivateFile.emit

        def emit(file: audit._PrivateFile, record: logging.LogRecord) -> None:
            self.reached.set()
            while self.stuck:
                time.sleep(0.001)
            through(file, record)

        monkeypatch.setattr(audit._PrivateFile, "emit", emit)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowDisk]:
    disk = SlowDisk(monkeypatch)
    yield disk
    disk.stuck = False


def test_a_disk_that_hangs_holds_no_request_up(
    folder: Path, disk: SlowDisk, caplog: pytest.LogCaptureFixture
) -> None:
    trail = Audit(folder, max_waiting=10)
    trail.write(entry(seed=0))
    assert disk.reached.wait(timeout=10)
    for seed in range(1, 100):
        trail.write(entry(seed=seed))
    assert len(caplog.records) == 1
    disk.stuck = False
    trail._waiting.join()
    trail.write(entry(seed=100))
    trail.close()
    written = lines(folder)
    (lost,) = [line["lost"] for line in written if "lost" in line]
    seeds = [line["seed"] for line in written if "seed" in line]
    assert len(seeds) + lost == 101
    assert seeds == [*range(len(seeds) - 1), 100]


def test_what_was_lost_last_is_told_at_the_end(folder: Path, disk: SlowDisk) -> None:
    trail = Audit(folder, max_waiting=1)
    trail.write(entry())
    assert disk.reached.wait(timeout=10)
    for _ in range(9):
        trail.write(entry())
    disk.stuck = False
    trail.close()
    *before, last = lines(folder)
    assert last["lost"] >= 1
    assert sum(line.get("lost", 1) for line in [*before, last]) == 10


@pytest.fixture
def logger(tmp_path: Path) -> Iterator[tuple[logging.Logger, Path]]:
    """A logger that writes JSON lines, and its file."""
    file = tmp_path / "log"
    handler = logging.FileHandler(file, encoding="ascii")
    handler.setFormatter(JsonLines())
    logger = logging.Logger("serve.toy")
    logger.addHandler(handler)
    yield logger, file
    handler.close()


def test_the_log_says_which_request_it_speaks_of(logger: tuple[logging.Logger, Path]) -> None:
    log, file = logger
    token = REQUEST_ID.set("5f0c")
    log.warning("no room for %d samples of %s", 4, FORGED)
    REQUEST_ID.reset(token)
    log.info("outside of requests")
    inside, outside = (json.loads(line) for line in file.read_bytes().splitlines())
    assert inside["message"] == f"no room for 4 samples of {FORGED}"
    assert (inside["level"], inside["logger"], inside["request_id"]) == ("WARNING", "serve.toy", "5f0c")
    assert outside["request_id"] == ""


def test_an_exception_is_one_line_without_secrets(logger: tuple[logging.Logger, Path]) -> None:
    log, file = logger
    try:
        raise ValueError(f"Bearer {SECRET}{FORGED}")
    except ValueError:
        log.exception("sampling failed with %s", SECRET)
    (line,) = file.read_bytes().splitlines()
    written = json.loads(line)
    assert written["message"] == "sampling failed with gdl_***"
    assert written["exception"].startswith("Traceback")
    assert "ValueError: Bearer gdl_***" in written["exception"]
    assert SECRET[4:].encode() not in line


@pytest.mark.parametrize("header", [None, "", "a b", "x" * 65, "x\n", "é", '"'])
def test_an_unfit_request_id_is_replaced(header: str | None) -> None:
    made = audit.request_id_of(header)
    assert made != header
    assert made != audit.request_id_of(header)
    assert audit.request_id_of(made) == made
