"""The scripts that nodes run, in a real bash, with commands on the path that only write down what is said."""

import hashlib
import os
import re
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from infra.local import PROJECT
from infra.nodes import gcp_labels, guard, needs_accelerator
from infra.stack import load

SCRIPTS = PROJECT / "infra" / "scripts"
RECORDER = (
    '#!/bin/bash\necho "${0##*/} $*" >>"$RECORD"\n[ -t 0 ] || cat >>"$RECORD.input"\nexit "${STATUS:-0}"\n'
)


class Shell:
    """A folder that stands for a machine: its home, its units, and what was run on it."""

    def __init__(self, folder: Path, stubs: str) -> None:
        self.home = folder / "home"
        self.units = folder / "units"
        self.record = folder / "record"
        self._path = folder / "bin"
        for each in (self.home / "gdl_ray", self.units, self._path):
            each.mkdir(parents=True)
        for name in stubs.split():
            (self._path / name).write_text(RECORDER)
            (self._path / name).chmod(0o755)

    def run(self, script: str, *arguments: str, env: Mapping[str, str] | None = None) -> None:
        """Run a script; what it would write for the whole machine goes to `units`."""
        text = script.replace("/etc/systemd/system", str(self.units)).replace(
            "/usr/local/sbin", str(self.units)
        )
        text = text.replace("/run/gdl-ray", f"{self.units}/seen")
        path = f"{self._path}{os.pathsep}/usr/bin{os.pathsep}/bin"
        given = {"PATH": path, "HOME": str(self.home), "RECORD": str(self.record), **(env or {})}
        subprocess.run(
            ["bash", "-c", text, "bash", *arguments],
            env=given,
            check=True,
            stdin=subprocess.DEVNULL,
            timeout=30,
        )

    @property
    def calls(self) -> list[str]:
        """What the stubs were told, in order."""
        return self.record.read_text().splitlines() if self.record.exists() else []

    @property
    def input(self) -> str:
        """What the stubs were sent."""
        file = self.record.with_name("record.input")
        return file.read_text() if file.exists() else ""


@pytest.fixture
def machine(tmp_path: Path) -> Shell:
    return Shell(tmp_path, "shutdown systemctl sudo pgrep docker nvidia-smi")


def hours(count: float) -> str:
    return f"{datetime.now(UTC) + timedelta(hours=count):%Y-%m-%dT%H:%M:%SZ}"


@pytest.mark.parametrize(("left_h", "minutes"), [(12, range(718, 721)), (-3, range(1, 2))])
def test_a_machine_ends_when_time_is_over(left_h: float, minutes: range, machine: Shell) -> None:
    machine.run(guard(hours(left_h), "head"))
    match = re.fullmatch(r"shutdown -h \+(\d+)", machine.calls[0])
    assert match
    assert int(match[1]) in minutes


def test_a_reboot_does_not_win_time(machine: Shell) -> None:
    when = hours(5)
    machine.run(guard(when, "head"))
    timer = (machine.units / "gdl-ray-expire.timer").read_text()
    assert f"OnCalendar={when[:10]} {when[11:19]} UTC" in timer
    assert "Persistent=true" in timer
    assert machine.calls[1:] == ["systemctl daemon-reload", "systemctl enable --now gdl-ray-expire.timer"]


def test_a_worker_whose_cluster_has_gone_ends(machine: Shell) -> None:
    machine.run(guard(hours(5), "worker"))
    assert machine.calls[-1] == "systemctl enable --now gdl-ray-expire.timer gdl-ray-watchdog.timer"
    watchdog = (machine.units / "gdl-ray-watchdog").read_text()
    (seen,) = re.findall(r"seen=(\S+)", watchdog)
    gone = {"STATUS": "1"}  # pgrep finds no raylet

    def shutdowns() -> int:
        return sum(call.startswith("shutdown -h now") for call in machine.calls)

    machine.run(watchdog, env=gone)
    assert shutdowns() == 0  # it has just begun
    past = (datetime.now(UTC) - timedelta(minutes=21)).timestamp()
    os.utime(seen, (past, past))
    machine.run(watchdog)
    assert shutdowns() == 0  # a raylet runs, and counts from now on
    machine.run(watchdog, env=gone)
    assert shutdowns() == 0
    os.utime(seen, (past, past))
    with pytest.raises(subprocess.CalledProcessError):  # the stub's own status
        machine.run(watchdog, env=gone)
    assert shutdowns() == 1


def test_where_the_cloud_ends_machines_only_workers_watch(machine: Shell) -> None:
    machine.run(guard("", "head"))
    assert machine.calls == ["systemctl daemon-reload"]
    machine.run(guard("", "worker"))
    assert machine.calls[-1] == "systemctl enable --now gdl-ray-watchdog.timer"


def test_a_service_comes_back_after_a_reboot_and_knows_what_ray_said(machine: Shell) -> None:
    ray = {
        "RAY_HEAD_IP": "10.0.0.5",
        "RAY_OVERRIDE_RESOURCES": '{"CPU":8}',
        "RAY_CLOUD_INSTANCE_ID": "i-1",
        "OTHER": "x",
    }
    script = (SCRIPTS / "service.sh").read_text()
    machine.run(script, "worker", "ray", "start", "--address=10.0.0.5:6379", "it's", env=ray)
    assert machine.calls[1:] == [
        "sudo systemctl daemon-reload",
        "sudo systemctl enable --quiet gdl-ray-worker",
        "sudo systemctl restart --no-block gdl-ray-worker",
    ]
    assert machine.calls[0] == f"sudo tee {machine.units}/gdl-ray-worker.service"
    run = machine.home / "gdl_ray" / "services" / "worker"
    assert f"ExecStart={run}\n" in machine.input
    assert "Restart=always" in machine.input
    assert "WantedBy=multi-user.target" in machine.input
    # What it runs: a stub in place of the interpreter says what it was told, and knows.
    python = machine.home / "gdl_ray" / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/bash\nprintf "%s\\n" "$@" "$RAY_OVERRIDE_RESOURCES" "${OTHER-}"\n')
    python.chmod(0o755)
    said = subprocess.run(
        [run], env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=True
    ).stdout
    words = ["-m", "infra.node", "worker", "ray", "start", "--address=10.0.0.5:6379", "it's", '{"CPU":8}', ""]
    assert said.splitlines() == words


def test_a_service_in_a_container_has_its_home_and_its_gpus(machine: Shell) -> None:
    ray = {"RAY_HEAD_IP": "10.0.0.5", "GDL_RAY_IMAGE": "you/image:1"}
    machine.run((SCRIPTS / "service.sh").read_text(), "worker", "ray", "start", env=ray)
    machine.record.unlink()
    run = machine.home / "gdl_ray" / "services" / "worker"
    machine.run(run.read_text())
    words = machine.calls[-1].split()
    assert words[:4] == ["sudo", "-E", "docker", "run"]
    assert words[words.index("--gpus") + 1] == "all"
    assert {"--env=RAY_HEAD_IP", "--env=GDL_RAY_IMAGE", f"{machine.home}:{machine.home}"} <= set(words)
    assert words[words.index("you/image:1") :] == [
        "you/image:1",
        *["python", "-m", "infra.node", "worker", "ray", "start"],
    ]


def test_endpoints_are_deployed_after_the_head_and_again_with_it(machine: Shell) -> None:
    machine.run((SCRIPTS / "service.sh").read_text(), "serve", "python", "-m", "serve")
    assert "PartOf=gdl-ray-head.service" in machine.input
    assert "Type=oneshot\nRemainAfterExit=yes\nRestart=on-failure" in machine.input


@pytest.mark.parametrize("role", ["head", "worker"])
def test_code_is_installed_once_for_each_version_of_it(role: str, machine: Shell) -> None:
    here = machine.home / "gdl_ray"
    python = here / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(RECORDER)
    python.chmod(0o755)
    (here / "code").mkdir()
    digests = {}
    for version in ("0.1.0", "0.2.0"):  # as they lie there after an update: rsync deletes nothing
        wheel = here / "code" / f"gdl_ray-{version}-py3-none-any.whl"
        wheel.write_text(version)
        digests[version] = hashlib.sha256(version.encode()).hexdigest()[:12]
    script = (SCRIPTS / "install.sh").read_text()
    machine.run(script, role, "platform", digests["0.1.0"])
    installs = [call for call in machine.calls if call.startswith("python -m pip install")]
    assert all(f"--constraint {here}/code/constraints.txt" in call for call in installs)
    assert ("https://download.pytorch.org/whl/cpu" in installs[0]) == (role == "head")
    assert ("--no-deps" in installs[0]) == (role == "head")  # that index has not all that PyTorch needs
    assert any("gdl_ray-0.1.0-py3-none-any.whl[platform]" in call for call in installs)
    machine.run(script, role, "platform", digests["0.1.0"])
    again = [call for call in machine.calls if call.startswith("python -m pip install")]
    assert again == installs
    machine.run(script, role, "platform", digests["0.2.0"])
    installed = [call for call in machine.calls if call.startswith("python -m pip install")]
    assert installed == installs + [call.replace("0.1.0", "0.2.0") for call in installs]
    with pytest.raises(subprocess.CalledProcessError):
        machine.run(script, role, "platform", "another")


def test_an_environment_without_pip_is_made_anew(machine: Shell) -> None:
    """Ubuntu's Python without its venv package leaves one that has a Python, and no pip."""
    python = machine.home / "gdl_ray" / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    stub = machine.record.parent / "bin" / "python3"
    assert stub.parent.is_dir()
    stub.write_text(RECORDER)
    stub.chmod(0o755)
    with pytest.raises(subprocess.CalledProcessError):  # the stub makes none
        machine.run((SCRIPTS / "install.sh").read_text(), "worker", "platform", "digest")
    assert f"python3 -m venv --clear {python.parents[1]}" in machine.calls


def test_labels_of_google_have_no_other_letters() -> None:
    stack = load(PROJECT / "infra" / "examples" / "gcp.stack.yaml")
    labels = gcp_labels(stack, "2030-01-01T00:00:00Z", "projects/p/global/images/ubuntu-2404")
    assert labels["gdl-ray-owner"] == "you_example_com"
    assert labels["gdl-ray-image"] == "ubuntu-2404"
    assert all(re.fullmatch(r"[a-z0-9_-]{1,63}", word) for pair in labels.items() for word in pair)


def test_machines_that_bring_their_gpu_are_given_no_other() -> None:
    assert needs_accelerator("n1-standard-8")
    assert not any(needs_accelerator(kind) for kind in ("g2-standard-8", "a2-highgpu-1g", "a3-highgpu-8g"))
