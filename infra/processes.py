"""Processes that outlive the command that started them: start, recognise and end them.

A process is known by its pid and its start together, because the system gives a pid to another process later.
The start is told by a clock that nobody sets, because the time of day moves when it is corrected. Each is
started in a session of its own: whatever it starts in turn belongs to that session, even when the processes
in between are gone.
"""

import os
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import psutil

BOOT = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Process:
    """A started process: its pid, and its start as `_start_of` tells it."""

    pid: int
    started: str


def spawn(command: Sequence[str], log: Path, env: Mapping[str, str], cwd: Path) -> Process:
    """Start `command` in a session of its own, with its output appended to `log`."""
    with log.open("ab") as output:
        child = subprocess.Popen(  # noqa: S603
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=dict(env),
            cwd=cwd,
            start_new_session=True,
        )
    child.returncode = 0  # it is to outlive this command: nobody waits for it, which is no reason to warn
    return Process(child.pid, _start_of(child.pid))


def is_alive(process: Process) -> bool:
    """Tell whether the process, and not another one with its pid, is running."""
    found = _find(process)
    return found is not None and _runs(found)


def tree(process: Process) -> list[psutil.Process]:
    """List the process if it runs, what is left of its session, and the descendants of these."""
    if psutil.pid_exists(process.pid) and _find(process) is None:
        return []  # the pid is another's now
    running = [
        other for other in psutil.process_iter(["ppid", "status"]) if not _is_over(other.info["status"])
    ]
    members = {other.pid for other in running if _session(other.pid) == process.pid}
    while more := {other.pid for other in running if other.info["ppid"] in members} - members:
        members |= more
    return [other for other in running if other.pid in members]


def end(process: Process, grace_s: float = 3.0) -> int:
    """Ask the whole tree of a process to stop, and after `grace_s` seconds make it.

    Returns:
        How many processes there were.
    """
    members = set(tree(process))
    _signal(members, signal.SIGTERM)
    asked_s = time.monotonic()
    while remaining := {member for member in members if _runs(member)} | set(tree(process)):
        waited_s = time.monotonic() - asked_s
        if waited_s > grace_s:
            _signal(remaining, signal.SIGKILL)
        if waited_s > 2 * grace_s:
            break  # in the kernel's hands: they go when it lets them
        time.sleep(0.05)
    return len(members)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold back Ctrl-C and SIGTERM for a moment, and deliver them at the end."""
    held: list[int] = []

    def hold(number: int, _frame: FrameType | None) -> None:
        held.append(number)

    before = {number: signal.signal(number, hold) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for signal_number in held:
            signal.raise_signal(signal_number)


def _find(process: Process) -> psutil.Process | None:
    with suppress(psutil.NoSuchProcess):
        if _start_of(process.pid) == process.started:
            return psutil.Process(process.pid)
    return None


def _start_of(pid: int) -> str:
    """Tell when a process started: which boot, and clock ticks since then; where there is no /proc, the time.

    Raises:
        psutil.NoSuchProcess: Nothing has this pid.
    """
    if not BOOT.exists():
        return str(psutil.Process(pid).create_time())
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError) as error:
        raise psutil.NoSuchProcess(pid) from error
    # The start is the 22nd field; the second, a name in parentheses, may itself hold some, and spaces.
    ticks = stat.rpartition(")")[2].split()[19]
    return f"{BOOT.read_text().strip()} {ticks}"


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except (ProcessLookupError, PermissionError):
        return None


def _is_over(status: str) -> bool:
    return status in {
        psutil.STATUS_ZOMBIE,
        psutil.STATUS_DEAD,
    }  # only its entry is left, for its parent to read


def _runs(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and not _is_over(process.status())
    return False


def _signal(processes: Iterable[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)
