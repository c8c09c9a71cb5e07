"""A Ray cluster of several nodes on this machine, an MLflow server and jobs: to break, and to look at.

Nodes join, get notice that they will be taken away, or are killed; MLflow goes away and comes back; jobs are
killed; the power fails. All of it on this machine and free ports, and ended by process id.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from mlflow import MlflowClient
from ray._raylet import GcsClient  # type: ignore[attr-defined]  # what the command `ray drain-node` is made of

from gdl_ray.home import file_sha256
from gdl_ray.train.store import Store
from infra.local import answers
from infra.processes import Process, spawn, tree
from tests.conftest import free_port

ROOT = Path(__file__).parents[1]
_ALIVE = 0  # state of a node in the GCS
_PREEMPTION = 2  # DRAIN_NODE_REASON_PREEMPTION of Ray's autoscaler.proto
_CLOCKS = ("seconds", "examples_per_s")  # metrics that no two runs agree on

_REPORT = re.compile(r"^step +(\d+)  +\d+%", re.MULTILINE)


def eventually(condition: Callable[[], object], limit_s: float = 180.0) -> float:
    """Wait for a condition; returns the seconds it took."""
    begin = time.monotonic()
    while not condition():
        if time.monotonic() - begin > limit_s:
            raise TimeoutError(f"waited {limit_s:.0f} s in vain")
        time.sleep(0.05)
    return time.monotonic() - begin


@dataclass(frozen=True)
class Result:
    """What a run has left behind, so that two runs can be compared."""

    metrics: Mapping[str, list[tuple[int, float]]]
    """Steps and values of every metric in MLflow but those that tell the time, in the order of steps."""
    model_sha256: str
    """Of the averaged weights in the last checkpoint."""
    training_sha256: str
    """Of all other tensors in it."""
    versions: int
    """How many versions it has registered."""


@dataclass(frozen=True)
class Job:
    """The driver of a job."""

    process: "subprocess.Popen[bytes]"
    log: Path

    @property
    def output(self) -> str:
        """What it has printed so far."""
        return self.log.read_text(errors="replace")

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    def wait(self, limit_s: float = 300.0) -> int:
        """Wait for its end; returns the exit code."""
        return self.process.wait(limit_s)

    def kill(self) -> None:
        """End it without a word."""
        self.process.kill()
        self.process.wait()


class Cluster:
    """A head without room for workers, where drivers live; nodes with room for one worker each; and MLflow.

    Args:
        home: folder of what outlives a power cut: data, runs, MLflow's database.
        env: more of the environment of all processes.
    """

    def __init__(self, home: Path, env: Mapping[str, str] | None = None) -> None:
        self.home = home
        self._env = env or {}
        self._temp = Path(tempfile.mkdtemp(prefix="gdl-"))  # short, for a socket's path has 107 characters
        self._gcs_port, self._mlflow_port = free_port(), free_port()
        self._processes: dict[str, Process] = {}  # of the nodes that were not killed, and of MLflow
        self._nodes_made = 0
        self._jobs: list[Job] = []

    def up(self, nodes: int) -> None:
        """Start MLflow, the head, and so many nodes."""
        self.start_mlflow()
        self._start_node("head", "--head", f"--port={self._gcs_port}", "--include-dashboard=false", cpus=0)
        for _ in range(nodes):
            self.add_node()

    def down(self) -> None:
        """End everything, and forget what Ray has logged."""
        self.cut_power()
        shutil.rmtree(self._temp)

    def cut_power(self) -> None:
        """Kill everything at once."""
        for job in self._jobs:
            job.process.kill()
        for name in list(self._processes):
            self.kill(name)
        for job in self._jobs:
            job.process.wait()

    def kill(self, name: str) -> None:
        """Kill a node, or "mlflow", with all its processes."""
        process = self._processes.pop(name)
        while running := tree(process):
            for each in running:
                with suppress(psutil.NoSuchProcess):
                    each.kill()
            psutil.wait_procs(running, timeout=1)

    @property
    def nodes(self) -> list[str]:
        """Names of the nodes that were not killed, but for the head."""
        return [name for name in self._processes if name.startswith("node")]

    def add_node(self) -> str:
        """Start a node; returns its name when it has joined."""
        self._nodes_made += 1
        name = f"node{self._nodes_made}"
        self._start_node(name, f"--address=127.0.0.1:{self._gcs_port}", cpus=1)
        return name

    def drain(self, node: str, deadline_s: float) -> None:
        """Give notice that a node will be taken away, as the watcher of a spot machine does."""
        deadline_ms = int((time.time() + deadline_s) * 1000)
        accepted, why = self._gcs().drain_node(self._id(node), _PREEMPTION, "spot", deadline_ms)
        assert accepted, why

    def workers(self, node: str = "", title: str = "ray::RayTrainWork") -> list[psutil.Process]:
        """Find the processes that train, or whose title begins otherwise, on one node or all."""
        found = []
        for name in [node] if node else self.nodes:
            for process in tree(self._processes[name]):
                with suppress(psutil.NoSuchProcess):  # it may end meanwhile
                    if process.name().startswith(title):
                        found.append(process)
        return found

    def groups(self) -> list[list[int]]:
        """List the steps that each group of workers has reported, also those who were killed."""
        logs = list(self._temp.glob("*/session_2*/logs/worker-*.out"))
        logs.sort(key=lambda log: log.stat().st_mtime_ns)  # one group works after the other
        groups = [[int(step) for step in _REPORT.findall(log.read_text(errors="replace"))] for log in logs]
        return [group for group in groups if group]

    def start_mlflow(self) -> None:
        """Start MLflow on its database."""
        command = [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--host=127.0.0.1",
            f"--port={self._mlflow_port}",
        ]
        command += ["--workers=1", f"--backend-store-uri=sqlite:///{self.home}/mlflow.db"]
        command += [f"--artifacts-destination={self.home}/artifacts"]
        env = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        self._processes["mlflow"] = spawn(command, self.home / "mlflow.log", env, self.home)
        eventually(lambda: answers(f"{self.mlflow_uri}/health"))

    def train(self, *arguments: str) -> Job:
        """Start `python -m jobs.train ...`."""
        return self.start("jobs.train", *arguments)

    def start(self, job: str, *arguments: str) -> Job:
        """Start a job, `python -m ...`."""
        command = [sys.executable, "-m", job, *arguments]
        log = self.home / f"job{len(self._jobs)}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, cwd=ROOT, env=self._environment(), stdout=output, stderr=subprocess.STDOUT
            )
        self._jobs.append(Job(process, log))
        return self._jobs[-1]

    def result(self, name: str, storage: str = "") -> Result:
        """Collect what a run has left behind."""
        client = MlflowClient(self.mlflow_uri)
        experiments = [each.experiment_id for each in client.search_experiments()]
        (run,) = client.search_runs(experiments, f"attributes.run_name = '{name}'")
        metrics = {
            metric: sorted(
                (each.step, each.value) for each in client.get_metric_history(run.info.run_id, metric)
            )
            for metric in run.data.metrics
            if metric not in _CLOCKS
        }
        versions = client.search_model_versions(f"run_id = '{run.info.run_id}'")
        store = Store(storage or f"{self.home}/runs/{name}")
        with store.open(max(store.saved()).name) as folder:
            model = file_sha256(folder / "model.safetensors")
            training = file_sha256(folder / "resume" / "tensors.safetensors")
        return Result(metrics, model, training, len(versions))

    @property
    def mlflow_uri(self) -> str:
        """Address of MLflow."""
        return f"http://127.0.0.1:{self._mlflow_port}"

    def _start_node(self, name: str, *options: str, cpus: int) -> None:
        command = [str(Path(sys.executable).with_name("ray")), "start", "--block", *options]
        command += [f"--num-cpus={cpus}", f"--node-name={name}", "--node-ip-address=127.0.0.1"]
        command += [f"--temp-dir={self._temp / name}", f"--object-store-memory={80 * 2**20}"]
        self._processes[name] = spawn(command, self.home / f"{name}.log", self._environment(), self.home)
        eventually(lambda: self._id(name))

    def _environment(self) -> dict[str, str]:
        return os.environ | {
            "GDL_RAY_HOME": str(self.home),
            "MLFLOW_TRACKING_URI": self.mlflow_uri,
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            # Without it, Ray's helpers guess among the machine's clusters, and give up if there are several.
            "RAY_ADDRESS": f"127.0.0.1:{self._gcs_port}",
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",
            **self._env,
        }

    def _gcs(self) -> GcsClient:
        return GcsClient(address=f"127.0.0.1:{self._gcs_port}")

    def _id(self, node: str) -> str:
        """Look up the id of a node that has joined; empty if it has not, or nobody answers."""
        with suppress(Exception):
            for key, info in self._gcs().get_all_node_info(timeout=5).items():
                if info.node_name == node and info.state == _ALIVE:
                    return str(key.hex())
        return ""
