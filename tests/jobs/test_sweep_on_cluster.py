"""A sweep on a real platform: its drivers are separate runs, and one that is killed costs only its own."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from infra import local
from infra.local import Platform
from infra.processes import tree

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
ARGUMENTS = ["vae", "gan", "--seed", "0", "--name", "x", "--size", "0.5"]
ARGUMENTS += ["--steps", "20", "--report-every", "10", "--checkpoint-every", "20"]


@pytest.fixture(scope="module")
def platform() -> Iterator[Platform]:
    """A platform of this test's own, on free ports."""
    home = Path(tempfile.mkdtemp(prefix="gdl-test-"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local, "USUAL_PORTS", {})
        try:
            yield local.up(home)
        finally:
            local.down(home)
            shutil.rmtree(local._temp_dir(home), ignore_errors=True)
            shutil.rmtree(home)


def start(platform: Platform, *arguments: str) -> "subprocess.Popen[str]":
    """Submit a job as a user does."""
    ray = str(Path(sys.executable).with_name("ray"))
    command = [ray, "job", "submit", "--working-dir", ".", "--", "python", "-m", "jobs.train", *arguments]
    env = os.environ | {"RAY_ADDRESS": platform.urls["ray"]}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=pipe, stderr=subprocess.STDOUT, text=True)


def driver(platform: Platform, run: str) -> psutil.Process:
    """The process of a run's driver."""
    for process in tree(platform.processes["ray"]):
        with suppress(psutil.NoSuchProcess):
            if process.cmdline()[-2:] == ["--name", run]:
                return process
    raise AssertionError(f"{run} has no driver")


def statuses(platform: Platform) -> dict[str, str]:
    """How the runs of the experiment ended, by name."""
    runs = MlflowClient(platform.urls["mlflow"]).search_runs(["1"])
    return {run.info.run_name: run.info.status for run in runs}


def test_a_killed_driver_costs_its_own_run_and_no_other(platform: Platform) -> None:
    job = start(platform, *ARGUMENTS)
    assert job.stdout
    output = ""
    for line in job.stdout:
        output += line
        if line.startswith("vae-0 | jobs.train: run x-vae-0, "):
            driver(platform, "x-vae-0").kill()
    assert job.wait() != 0
    assert re.search(r"^vae-0  failed .*  ended by SIGKILL$", output, re.MULTILINE), output
    assert re.search(r"^gan-0  digits-gan 1 ", output, re.MULTILINE), output
    assert re.search(r"^gan-0 \| .*step     20  100%", output, re.MULTILINE), output
    assert "jobs.train: sweep x: 1 of 2 runs succeeded\n" in output
    assert statuses(platform)["x-gan-0"] == "FINISHED"
    models = MlflowClient(platform.urls["mlflow"]).search_registered_models()
    assert [model.name for model in models] == ["digits-gan"]


def test_the_same_command_goes_on_with_the_rest(platform: Platform) -> None:
    job = start(platform, *ARGUMENTS)
    output, _ = job.communicate(timeout=300)
    assert job.returncode == 0, output
    assert re.search(r"^gan-0  digits-gan 1 ", output, re.MULTILINE), output  # not trained again
    assert re.search(r"^vae-0  digits-vae 1 ", output, re.MULTILINE), output
