"""Processes that outlive their command: recognised whatever the clock says, ended with all they started."""

import os
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from infra.processes import Process, end, is_alive, spawn, tree

on_linux = pytest.mark.skipif(
    sys.platform != "linux", reason="elsewhere the kernel tells the wall clock alone"
)
PARENT = [
    sys.executable,
    "-c",
    "import subprocess, sys, time\n"
    "for own in (False, True):\n"
    "    subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=own)\n"
    "time.sleep(600)",
]


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
    stranger = start(["sleep", "600"], tmp_path)
    recorded = replace(stranger, started="earlier")
    assert not is_alive(recorded)
    assert end(recorded) == 0
    assert is_alive(stranger)
    end(stranger)


@on_linux
def test_a_process_is_recognised_after_a_step_of_the_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = start(["sleep", "600"], tmp_path)
    told_s = psutil.Process(process.pid).create_time()
    boot_s = psutil.boot_time()
    monkeypatch.setattr("psutil._pslinux.boot_time", lambda: boot_s + 5)
    assert psutil.Process(process.pid).create_time() == pytest.approx(told_s + 5, abs=1)
    assert is_alive(process)
    assert end(process) == 1
    assert not is_alive(process)


@on_linux
def test_another_boot_makes_another_process(tmp_path: Path) -> None:
    process = start(["sleep", "600"], tmp_path)
    _, ticks = process.started.split()
    assert not is_alive(replace(process, started=f"00000000-0000-0000-0000-000000000000 {ticks}"))
    end(process)


@on_linux
def test_the_start_is_read_past_any_name(tmp_path: Path) -> None:
    program = tmp_path / "a) b (c 1 2"
    program.symlink_to(str(shutil.which("sleep")))
    process = start([str(program), "600"], tmp_path)
    assert psutil.Process(process.pid).name() == program.name
    since_boot_s = int(process.started.split()[1]) / os.sysconf("SC_CLK_TCK")
    assert since_boot_s + psutil.boot_time() == pytest.approx(time.time(), abs=10)
    assert is_alive(process)
    end(process)


def test_the_time_is_the_start_where_there_is_no_proc(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("infra.processes.BOOT", tmp_path / "absent")
    process = start(["sleep", "600"], tmp_path)
    assert float(process.started) == pytest.approx(time.time(), abs=10)
    assert is_alive(process)
    end(process)
    assert not is_alive(process)
