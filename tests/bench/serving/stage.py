"""What the rows are measured on: a platform of their own, models trained for seconds, and copies of these."""

import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from mlflow import MlflowClient

from gdl_ray import registry
from gdl_ray.family import Family
from gdl_ray.train.checkpoint import load_family
from infra import local
from infra.processes import tree
from tests.bench.serving.load import Target

ROOT = Path(__file__).parents[3]
BUDGET_S = 8
"""Seconds that a model is trained: its speed does not depend on what it has learnt."""
PATIENCE_S = 120.0


@dataclass(frozen=True)
class Bar:
    """A claim, the figure that was measured for it, and whether it holds."""

    claim: str
    figure: str
    holds: bool

    def __str__(self) -> str:
        return f"  {'held' if self.holds else 'MISSED':<7}{self.claim:<58}{self.figure}"


@dataclass
class Stage:
    """A platform, and what has been registered on it."""

    platform: local.Platform
    quick: bool
    """Only show that the rows work: a tenth of the time, and figures that mean nothing."""
    _trained: dict[tuple[str, int], int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.mlflow = MlflowClient(self.platform.urls["mlflow"])

    def seconds(self, usual: float) -> float:
        """Give the length of a measurement."""
        return usual / 10 if self.quick else usual

    def times(self, usual: int) -> int:
        """Give the number of repetitions."""
        return max(1, usual // 10) if self.quick else usual

    def submit(self, module: str, *arguments: str) -> None:
        """Run a module on the cluster, as a user does.

        Raises:
            RuntimeError: it fails; with the end of what it has said.
        """
        ray = str(Path(sys.executable).with_name("ray"))
        command = [ray, "job", "submit", "--working-dir", ".", "--", "python", "-m", module, *arguments]
        env = os.environ | {"RAY_ADDRESS": self.platform.urls["ray"]}
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{(done.stdout + done.stderr)[-3000:]}")

    def model(self, family: str, seed: int = 0) -> tuple[str, int]:
        """Train a family on the digits, once; returns the registered model and its version."""
        name = registry.model_name("digits", family)
        if (family, seed) not in self._trained:
            print(f"  training {name}, seed {seed}", flush=True)
            self.submit("jobs.train", family, "--seed", str(seed), "--budget", f"{BUDGET_S}s")
            versions = self.mlflow.search_model_versions(f"name='{name}'")
            self._trained[family, seed] = max(int(each.version) for each in versions)
            self.await_answer(name)
        return name, self._trained[family, seed]

    def weights(self, name: str, version: int) -> Family:
        """Load a registered version into this process."""
        return load_family(registry.fetch(name, version))

    @contextmanager
    def copies(
        self, sources: Mapping[str, list[tuple[str, int]]], tags: Mapping[str, str] | None = None
    ) -> Iterator[None]:
        """Register copies: of each name, the versions that it is to have, the first its champion.

        With tags, each gets replicas of its own. All are withdrawn at the end.
        """
        for name, versions in sources.items():
            self.mlflow.create_registered_model(name, tags=dict(tags or {}))
            with redirect_stderr(io.StringIO()):  # MLflow tells of every copy
                for source, version in versions:
                    self.mlflow.copy_model_version(f"models:/{source}/{version}", name)
            self.promote(name, 1)
        try:
            for name in sources:
                self.await_answer(name, own=bool(tags))
            yield
        finally:
            for name in sources:
                self.mlflow.delete_registered_model(name)
            eventually(lambda: not set(sources) & self.served(), "the copies are withdrawn")

    def promote(self, name: str, version: int) -> None:
        """Make a version champion."""
        self.mlflow.set_registered_model_alias(name, registry.CHAMPION, str(version))

    def served(self) -> set[str]:
        """List the models that the service knows."""
        return {entry["name"] for entry in get(f"{self.platform.urls['serve']}/v1/models")["models"]}

    def await_answer(self, name: str, own: bool = False) -> None:
        """Return when a model answers, from replicas of its own if it is to have some."""
        eventually(lambda: local.answers(self.address(name)), f"{name} answers")
        if own:  # until then the pool answers
            eventually(lambda: self.running(name), f"{name} has replicas of its own")

    def address(self, name: str) -> str:
        """Name the address of a model."""
        return f"{self.platform.urls['serve']}/v1/models/{name}"

    def target(self, name: str) -> Target:
        """Aim at the samples of a model."""
        return Target(name, f"{self.address(name)}/sample")

    def card(self, name: str) -> dict[str, Any]:
        """Ask for the card of a model."""
        return get(self.address(name))

    def replicas(self) -> list[psutil.Process]:
        """Find the processes of Serve's replicas."""
        return self.processes("ray::ServeReplica")

    def processes(self, name: str) -> list[psutil.Process]:
        """Find the cluster's processes of a name."""
        found = []
        for process in tree(self.platform.processes["ray"]):
            with suppress(psutil.NoSuchProcess, IndexError):  # it may end meanwhile
                if Path(process.cmdline()[0]).name.startswith(name):
                    found.append(process)
        return found

    def running(self, name: str) -> set[int]:
        """List the pids of the replicas of a model's own to which Serve sends requests."""
        route = f"/v1/models/{name}"
        applications = get(f"{self.platform.urls['ray']}/api/serve/applications/")["applications"].values()
        deployments = [each["deployments"] for each in applications if each["route_prefix"] == route]
        replicas = [replica for each in deployments for one in each.values() for replica in one["replicas"]]
        return {replica["pid"] for replica in replicas if replica["state"] == "RUNNING"}


@contextmanager
def stage(quick: bool) -> Iterator[Stage]:
    """Bring a platform up, on free ports and in a folder of its own, and end it."""
    home = Path(tempfile.mkdtemp(prefix="gdl-bench-"))
    local.USUAL_PORTS.clear()  # they may belong to the user's own platform
    try:
        platform = local.up(home)
        os.environ |= {"GDL_RAY_HOME": str(home), "MLFLOW_TRACKING_URI": platform.urls["mlflow"]}
        yield Stage(platform, quick)
    finally:
        local.down(home)
        shutil.rmtree(local._temp_dir(home), ignore_errors=True)
        shutil.rmtree(home)


def get(url: str) -> dict[str, Any]:
    """Ask for a JSON object."""
    with urllib.request.urlopen(url, timeout=30) as response:
        answer: dict[str, Any] = json.load(response)
    return answer


def eventually(holds: Callable[[], object], what: str, pause_s: float = 0.1) -> float:
    """Wait until something holds; returns after how many seconds it did.

    Raises:
        TimeoutError: it does not.
    """
    begin_s = time.monotonic()
    while not holds():
        if time.monotonic() - begin_s > PATIENCE_S:
            raise TimeoutError(f"not within {PATIENCE_S:g} s: {what}")
        time.sleep(pause_s)
    return time.monotonic() - begin_s
