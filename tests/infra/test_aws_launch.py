"""Ray's real launcher against a server of moto's, and an ssh that writes down what it is asked."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import boto3  # type: ignore[import-untyped]
import pytest

from infra import aws, aws_launch, aws_teardown, preflight
from infra.folder import Folder
from infra.stack import Access
from tests.conftest import free_port, wait_for
from tests.infra.moto_aws import ADDRESS, IMAGE, PRICES, STACK, inventory, set_environment

# It never runs what it is asked to: among that is `ray stop`, which would end every Ray on this machine.
SSH = """\
#!{python}
import json, os, sys
with open({log!r}, "a") as log:
    log.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + "\\n")
print("up 1 minute")
"""


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A machine whose AWS is a server of moto's, and whose ssh and rsync write their commands here."""
    log, programs = tmp_path / "commands", tmp_path / "bin"
    programs.mkdir()
    log.touch()
    for name in ("ssh", "rsync", "scp"):
        file = programs / name
        file.write_text(SSH.format(python=sys.executable, log=str(log)))
        file.chmod(0o755)
    port = free_port()
    endpoint = f"http://127.0.0.1:{port}"
    set_environment(monkeypatch, tmp_path)
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
    monkeypatch.setattr(aws, "caller_cidr", lambda: ADDRESS)
    monkeypatch.setattr(aws_teardown, "PAUSE_S", 0)
    monkeypatch.setattr(Folder, "pack", pack)
    # What the server lacks.
    monkeypatch.setattr(preflight, "newest_image", lambda _: IMAGE)
    monkeypatch.setattr(preflight, "on_demand_prices", lambda *_: PRICES)
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with (tmp_path / "moto.log").open("w") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output)
        try:
            wait_for(f"{endpoint}/moto-api/", server)
            yield log
        finally:
            server.kill()
            server.wait()


def pack(folder: Folder) -> str:
    """Put a file in the place of the wheel."""
    folder.code.mkdir(parents=True, exist_ok=True)
    (folder.code / "gdl_ray.whl").write_text("a wheel")
    return "0123456789ab"


def said(log: Path) -> list[str]:
    """The commands so far, and none hereafter."""
    lines = [" ".join(json.loads(line)) for line in log.read_text().splitlines()]
    log.write_text("")
    return lines


def test_what_ray_up_calls_is_asked_for_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without rsync, Ray gives up when the head is launched and paid for."""
    monkeypatch.setenv("PATH", str(tmp_path))
    for tool in ("ssh", "ssh-keygen", "aws"):
        (tmp_path / tool).touch(mode=0o755)
    assert aws_launch.tools_missing(STACK) == ["rsync is not on this machine: install rsync"]
    by_ssm = replace(STACK, access=Access(mode="ssm"))
    missing = [line.partition(" ")[0] for line in aws_launch.tools_missing(by_ssm)]
    assert missing == ["rsync", "session-manager-plugin"]


@pytest.mark.long
def test_ray_up_launches_and_updates_and_down_leaves_nothing(commands: Path) -> None:
    aws.up(STACK, yes=True)
    first = said(commands)
    assert any("ray start --head" in line and "--dashboard-host=127.0.0.1" in line for line in first)
    assert any(line.startswith("rsync") and ".ray" in line for line in first)
    assert all("ubuntu@" in line for line in first)
    assert inventory()["instance demo"] == 1
    head = boto3.client("ec2").describe_instances()["Reservations"][0]["Instances"][0]
    assert head["IamInstanceProfile"]["Arn"].endswith("instance-profile/gdl-ray/gdl-ray-demo-us-west-2-head")

    aws.up(STACK, yes=True)
    assert said(commands) == []

    aws.up(replace(STACK, workers=STACK.workers[:1]), yes=True)
    second = said(commands)
    assert second
    assert not [line for line in second if "ray stop" in line or "ray start" in line]
    assert inventory()["instance demo"] == 1

    assert aws.down(STACK, yes=True, delete_data=True) == []
    assert any("ray stop" in line for line in said(commands))
    assert inventory() == {"role AWSServiceRoleForspot": 1}
    assert not list(Path(os.environ["GDL_RAY_HOME"], "stacks").iterdir())
    assert aws.down(STACK, yes=True, delete_data=True) == []
    assert said(commands) == []
