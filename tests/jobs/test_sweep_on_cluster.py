"""A sweep on a real platform: its drivers are separate runs, and one that is killed costs only its own."""

import re
from contextlib import suppress

import psutil
import pytest
from mlflow import MlflowClient

from infra.local import Platform
from infra.processes import tree
from tests.conftest import start

pytestmark = pytest.mark.slow
ARGUMENTS = ["vae", "gan", "--seed", "0", "--name", "x", "--size", "0.5"]
ARGUMENTS += ["--steps", "20", "--report-every", "10", "--checkpoint-every", "20"]


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
