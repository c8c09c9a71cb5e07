"""The local platform: real processes, on free ports, in a folder of the test's own."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from infra import __main__ as command
from infra import local
from infra.processes import Process, end, is_alive, spawn, tree

SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]
PARENT = [
    sys.executable,
    "-c",
    "import subprocess, sys, time\n"
    "for own in (False, True):\n"
    "    subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=own)\n"
    "time.sleep(600)",
]


@pytest.fixture
def home() -> Iterator[Path]:
    """A home for a platform, which is down when the test ends, however it ends."""
    folder = Path(tempfile.mkdtemp(prefix="gdl-test-"))
    yield folder
    local.down(folder)
    shutil.rmtree(local._temp_dir(folder), ignore_errors=True)
    shutil.rmtree(folder)


def start(command: list[str], folder: Path) -> Process:
    return spawn(command, folder / "log", os.environ, folder)


def wait_for(condition: object) -> None:
    assert callable(condition)
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_end_ends_children_also_those_in_their_own_session(tmp_path: Path) -> None:
    process = start(PARENT, tmp_path)
    wait_for(lambda: len(tree(process)) == 3)
    members = tree(process)
    assert end(process) == 3
    assert not any(member.is_running() and member.status() != psutil.STATUS_ZOMBIE for member in members)


def test_end_ends_orphans(tmp_path: Path) -> None:
    process = start(PARENT, tmp_path)
    wait_for(lambda: len(tree(process)) == 3)
    own_session = next(
        member for member in tree(process) if os.getsid(member.pid) == member.pid != process.pid
    )
    psutil.Process(process.pid).kill()
    wait_for(lambda: not is_alive(process))
    assert end(process) >= 1
    assert tree(process) == []
    own_session.kill()


def test_end_kills_what_ignores_sigterm(tmp_path: Path) -> None:
    deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); print(flush=True); time.sleep(600)"
    process = start([sys.executable, "-c", deaf], tmp_path)
    wait_for(lambda: (tmp_path / "log").read_text())
    end(process, grace_s=0.2)
    assert not is_alive(process)


def test_a_process_with_a_recycled_pid_is_left_alone(tmp_path: Path) -> None:
    stranger = start(SLEEP, tmp_path)
    recorded = replace(stranger, started_s=stranger.started_s - 60)
    assert not is_alive(recorded)
    assert end(recorded) == 0
    assert is_alive(stranger)
    end(stranger)


def test_down_leaves_a_recycled_pid_alone(home: Path) -> None:
    stranger = start(SLEEP, home)
    local.Platform(home, {}, {"ray": replace(stranger, started_s=stranger.started_s - 60)}).save()
    assert local.down(home) == {}
    assert is_alive(stranger)
    end(stranger)


def test_a_usual_port_that_is_taken_is_not_chosen() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        taken = holder.getsockname()[1]
        assert local._free_port(taken, set()) != taken


def test_a_failed_start_shows_the_log(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "logs").mkdir()
    platform = local.Platform(home, {"mlflow": 1}, {"mlflow": start(["/bin/false"], home)})
    platform.log("mlflow").write_text("disk full\n")
    with pytest.raises(local.PlatformError, match=r"(?s)mlflow ended before it answered.*disk full"):
        local._wait_until_healthy(platform, "mlflow")


def test_status_of_nothing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GDL_RAY_HOME", str(home))
    assert command.main(["status"]) == 1
    assert command.main(["down"]) == 0


def listening(processes: list[psutil.Process]) -> set[tuple[str, str]]:
    """Name and address of every listening socket."""
    found = set()
    for process in processes:
        with suppress(psutil.NoSuchProcess):  # Ray's idle workers come and go
            for connection in process.net_connections("inet"):
                if connection.status == psutil.CONN_LISTEN:
                    found.add((process.name(), connection.laddr.ip.removeprefix("::ffff:")))
    return found


@pytest.mark.slow
def test_the_platform_comes_up_stays_up_and_goes_down(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GDL_RAY_HOME", str(home))
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")  # another cluster's, in the user's shell
    assert command.main(["up"]) == 0
    platform = local.Platform.load(home)
    assert [service.healthy for service in local.status(home)] == [True, True, True]
    assert urllib.request.urlopen(f"{platform.urls['serve']}/v1/models").status == 200

    begin = time.monotonic()
    assert command.main(["up"]) == 0
    assert time.monotonic() - begin < 3
    assert local.Platform.load(home) == platform

    members = [member for process in platform.processes.values() for member in tree(process)]
    sockets = listening(members)
    assert any("ServeReplica" in name for name, _ in sockets)
    assert {address for _, address in sockets} == {"127.0.0.1"}

    os.kill(platform.processes["mlflow"].pid, signal.SIGKILL)
    wait_for(lambda: not platform.is_running("mlflow"))
    assert command.main(["status"]) == 1
    assert command.main(["up"]) == 0
    assert local.Platform.load(home).ports == platform.ports
    assert local.Platform.load(home).processes["ray"] == platform.processes["ray"]

    assert command.main(["down"]) == 0
    assert not any(member.is_running() and member.status() != psutil.STATUS_ZOMBIE for member in members)
    assert (home / "mlflow.db").exists()
    assert command.main(["status"]) == 1
    assert "down" in capsys.readouterr().out


def test_what_an_interrupted_up_has_started_is_recorded(home: Path) -> None:
    up = subprocess.Popen(
        [sys.executable, "-m", "infra", "up"],
        cwd=local.PROJECT,
        env=os.environ | {"GDL_RAY_HOME": str(home)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert up.stdout is not None
    assert "starting" in up.stdout.readline()
    up.send_signal(signal.SIGINT)
    assert up.wait(20) == 130
    recorded = local.Platform.load(home).processes
    assert recorded
    assert set(local.down(home)) == set(recorded)
    assert not any(tree(process) for process in recorded.values())
