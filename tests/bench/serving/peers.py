"""The servers that the service is compared with, and the environments that they live in.

They lie in `~/.cache/gdl_ray-bench`, one for each, because these packages pin others than ours; torch and
what else is there already they share with the environment that runs this file.
`python tests/bench/serve.py --peers` makes them.
"""

import os
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gdl_ray import registry
from gdl_ray.engine import request_keys
from gdl_ray.family import UNLABELLED
from tests.bench.serving.load import Target
from tests.bench.serving.stage import ROOT

CACHE = Path.home() / ".cache" / "gdl_ray-bench"
RELEASES = {"bentoml": "1.4.40", "litserve": "0.2.19", "schemathesis": "4.32.5"}
START_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Peer:
    """A server, how it is started, and the request for four samples that it understands."""

    name: str
    command: Sequence[str]
    env: Mapping[str, str]
    path: str
    body: Mapping[str, Any]

    @contextmanager
    def running(self, port: int) -> Iterator[Target]:
        """Run the server; gives its address when it listens."""
        env = os.environ | {"PYTHONPATH": str(ROOT), "PORT": str(port), **self.env}
        command = [part.format(port=port) for part in self.command]
        quiet = subprocess.DEVNULL
        # A session of its own, so that its workers end with it.
        process = subprocess.Popen(
            command, env=env, cwd=ROOT, stdout=quiet, stderr=quiet, start_new_session=True
        )
        try:
            _wait_for(port, process)
            yield Target(self.name, f"http://127.0.0.1:{port}{self.path}")
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def peers(name: str, version: int, seed: int) -> list[Peer]:
    """List the servers that can be run here, each with a registered version; says which cannot."""
    found = [_mlflow(name, version, seed)]
    checkpoint = {"CHECKPOINT": str(registry.fetch(name, version))}
    if is_there("bentoml"):
        found.append(_bentoml(checkpoint, seed))
    if is_there("litserve"):
        found.append(_litserve(checkpoint, seed))
    return found


def _mlflow(name: str, version: int, seed: int) -> Peer:
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--model-uri", f"models:/{name}/{version}"]
    command += ["--env-manager", "local", "--host", "127.0.0.1", "--port", "{port}", "--workers", "2"]
    # It starts `uvicorn` from the PATH.
    env = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    frame = {"columns": ["label"], "data": [[UNLABELLED]] * 4}
    return Peer("mlflow", command, env, "/invocations", {"dataframe_split": frame, "params": {"seed": seed}})


def _bentoml(checkpoint: Mapping[str, str], seed: int) -> Peer:
    command = [tool("bentoml"), "serve", "tests.bench.serving.bentoml_server:Sampler"]
    command += ["--host", "127.0.0.1", "--port", "{port}"]
    env = {**checkpoint, "BENTOML_DO_NOT_TRACK": "1", "BENTOML_HOME": str(CACHE / "bentoml-home")}
    rows = [[key, UNLABELLED] for key in request_keys(seed, 4).tolist()]
    return Peer("bentoml", command, env, "/sample", {"rows": rows})


def _litserve(checkpoint: Mapping[str, str], seed: int) -> Peer:
    command = [tool("litserve", "python"), "-m", "tests.bench.serving.litserve_server"]
    return Peer("litserve", command, checkpoint, "/predict", {"n": 4, "seed": seed})


def tool(peer: str, program: str = "") -> str:
    """Name a program in the environment of a peer; that of its own name if none is given."""
    return str(CACHE / peer / "bin" / (program or peer))


def is_there(peer: str) -> bool:
    """Tell whether a peer is installed; says how to if not."""
    there = Path(tool(peer)).exists()
    if not there:
        cure = "`python tests/bench/serve.py --peers` installs it"
        print(f"  {peer} SKIPPED, it is not there: {cure}", flush=True)
    return there


def install() -> None:
    """Make the environments that are missing."""
    for peer in (each for each in RELEASES if not Path(tool(each)).exists()):
        print(f"installing {peer} {RELEASES[peer]}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", CACHE / peer], check=True)
        (packages,) = (CACHE / peer / "lib").glob("python*/site-packages")
        (packages / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
        pip = [tool(peer, "python"), "-m", "pip", "install", "-q", f"{peer}=={RELEASES[peer]}"]
        subprocess.run(pip, check=True)


def free_port() -> int:
    """Find a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for(port: int, process: "subprocess.Popen[bytes]") -> None:
    """Wait until a server listens."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise RuntimeError(f"{process.args!r} does not listen on port {port}")
