"""The local platform: real processes, on free ports, in a folder of the test's own."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from gdl_ray.home import home as home_of_jobs
from infra import __main__ as command
from infra import local
from infra.processes import end, is_alive, spawn, tree
from infra.settings import Settings
from tests.infra.test_haproxy import check_haproxy, listening


@pytest.fixture
def home() -> Iterator[Path]:
    """A home for a platform, which is down when the test ends, however it ends."""
    folder = Path(tempfile.mkdtemp(prefix="gdl-test-"))
    yield folder
    local.down(folder)
    shutil.rmtree(local._temp_dir(folder), ignore_errors=True)
    shutil.rmtree(folder)


def test_down_leaves_a_recycled_pid_alone(home: Path) -> None:
    stranger = spawn(["sleep", "600"], home / "log", os.environ, home)
    local.Platform(home, {}, {"ray": replace(stranger, started="earlier")}).save()
    assert local.down(home) == {}
    assert is_alive(stranger)
    end(stranger)


@pytest.mark.parametrize("value", ["/data/gdl", "~/gdl", "gdl"])
def test_the_home_is_the_same_to_the_platform_and_to_jobs(
    value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/of-user")
    monkeypatch.setenv("GDL_RAY_HOME", value)
    expected = {"/data/gdl": Path("/data/gdl"), "~/gdl": Path("/home/of-user/gdl"), "gdl": tmp_path / "gdl"}
    assert local.home_dir() == home_of_jobs() == expected[value]


def test_an_empty_home_is_as_good_as_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GDL_RAY_HOME", "")
    assert home_of_jobs() == tmp_path / ".gdl_ray"
    assert local.home_dir() == local.PROJECT / ".gdl_ray"


def test_what_speaks_no_http_does_not_answer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=_greet, args=[server])
        thread.start()
        assert not local.answers(f"http://127.0.0.1:{server.getsockname()[1]}/")
        thread.join()


def _greet(server: socket.socket) -> None:
    with server.accept()[0] as connection:
        connection.recv(1000)
        connection.sendall(b"220 mail.example ready\r\n")


def test_a_usual_port_that_is_taken_is_not_chosen() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        taken = holder.getsockname()[1]
        assert local._free_port(taken, set()) != taken


def test_a_failed_start_shows_the_log(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "logs").mkdir()
    platform = local.Platform(
        home, {"mlflow": 1}, {"mlflow": spawn(["false"], home / "log", os.environ, home)}
    )
    platform.log("mlflow").write_text("disk full\n")
    with pytest.raises(local.PlatformError, match=r"(?s)mlflow ended before it answered.*disk full"):
        local._wait_until_healthy(platform, "mlflow")


def test_status_of_nothing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GDL_RAY_HOME", str(home))
    assert command.main(["status"]) == 1
    assert command.main(["down"]) == 0


def test_a_user_is_told_how_to_be_let_in(home: Path) -> None:
    platform = local.Platform(home, {"dashboard": 8265, "mlflow": 5000})
    assert platform.entrance == ["For `ray job submit`:  export RAY_ADDRESS=http://127.0.0.1:8265"]
    assert platform.client_environment == {"RAY_ADDRESS": "http://127.0.0.1:8265"}
    platform.settings = Settings(auth=True)
    assert platform.entrance[0].endswith(f"  . {home}/env.sh")
    environment = platform.client_environment
    assert environment["MLFLOW_TRACKING_URI"] == "http://127.0.0.1:5000"
    for line, secret in zip(
        platform.entrance[1:],
        [environment["MLFLOW_TRACKING_PASSWORD"], Path(environment["RAY_AUTH_TOKEN_PATH"]).read_text()],
        strict=True,
    ):
        assert Path(line.rpartition(" ")[2]).read_text() == secret


def test_what_runs_keeps_its_settings(home: Path) -> None:
    ray = spawn(["sleep", "600"], home / "log", os.environ, home)
    local.Platform(home, {}, {"ray": ray}, Settings(auth=True)).save()
    with pytest.raises(local.PlatformError, match=r"was started with --database sqlite, .* --auth; end it"):
        local.up(home, Settings())
    assert local.Platform.load(home).settings == Settings(auth=True)


def test_a_record_of_an_earlier_version_is_read(home: Path) -> None:
    (home / "platform.json").write_text('{"ports": {"mlflow": 5000}, "urls": {}, "processes": {}}')
    assert local.Platform.load(home) == local.Platform(home, {"mlflow": 5000}, {}, Settings())


def test_a_registry_that_cannot_be_had_is_told_before_anything_starts(home: Path) -> None:
    nowhere = Settings(database="postgresql://mlflow@127.0.0.1:1/mlflow")
    with pytest.raises(local.PlatformError, match=r"--database postgresql://.*:1/mlflow cannot"):
        local.up(home, nowhere)
    assert local.Platform.load(home) == local.Platform(home)


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

    behind_haproxy = {platform.ports[name] for name in ("serve", "haproxy_stats", "haproxy_metrics")}
    of_haproxy: set[int] = set()
    while of_haproxy != behind_haproxy:  # each time that it is told of another replica, another takes over
        members = [member for process in platform.processes.values() for member in tree(process)]
        sockets = listening(members)
        of_haproxy = {port for name, _, port in sockets if name == "haproxy"}
    assert any("ServeReplica" in name for name, _, _ in sockets)
    assert {address for _, address, _ in sockets} == {"127.0.0.1"}
    check_haproxy(local._temp_dir(home))

    mlflow = psutil.Process(platform.processes["mlflow"].pid)
    mlflow.kill()
    mlflow.wait(10)
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
