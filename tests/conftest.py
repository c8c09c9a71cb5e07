"""Fixtures that several parts share."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import boto3  # type: ignore[import-untyped]
import pytest
import torch
from mlflow import MlflowClient

from gdl_ray.data import Dataset, load
from infra import local
from infra.local import Platform
from infra.mlflow_server import base_environment

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Leave the second core to the next process, and additions in one order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """The digits, prepared in a folder of this session."""
    return load("digits", tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def shared_mnist() -> Path:
    """Folder of MNIST's four files, where this machine has one."""
    folder = Path(__file__).parents[2] / "shared" / "data" / "mnist"
    if not folder.is_dir():
        pytest.skip("MNIST's files are not on this machine")
    return folder


def free_port() -> int:
    """A port of this machine's loopback that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real MLflow server; its address."""
    with mlflow_on(free_port(), tmp_path_factory.mktemp("mlflow")) as uri:
        yield uri


@pytest.fixture
def mlflow_client(mlflow_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    """A client of a real MLflow server, which the code under test finds in its environment."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
    monkeypatch.setenv("GDL_RAY_HOME", str(tmp_path / "home"))
    return MlflowClient(mlflow_server)


@contextmanager
def mlflow_on(port: int, folder: Path) -> Iterator[str]:
    """Run an MLflow server on a port, with its data in a folder."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--workers", "1"]
    command += ["--port", str(port), "--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    env = os.environ | base_environment(folder)
    uri = f"http://127.0.0.1:{port}"
    with (folder / "log").open("a") as log:
        # A group of its own: the server has children, and the test ends them all.
        server = subprocess.Popen(
            command, stdout=log, stderr=log, cwd=folder, env=env, start_new_session=True
        )
    try:
        wait_for(f"{uri}/health", server)
        yield uri
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()


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


def start(platform: Platform, *arguments: str, job: str = "jobs.train") -> "subprocess.Popen[str]":
    """Run `ray job submit -- python -m jobs.train ...` as a user does."""
    ray = str(Path(sys.executable).with_name("ray"))
    command = [ray, "job", "submit", "--working-dir", ".", "--", "python", "-m", job, *arguments]
    env = os.environ | {"RAY_ADDRESS": platform.urls["ray"]}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=pipe, stderr=subprocess.STDOUT, text=True)


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real S3 server; the address of an empty bucket."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    folder = tmp_path_factory.mktemp("s3")
    with (folder / "log").open("w") as log, pytest.MonkeyPatch.context() as patch:
        server = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        try:
            wait_for(f"http://127.0.0.1:{port}/moto-api/", server)
            endpoint = f"http://127.0.0.1:{port}"
            boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1").create_bucket(Bucket="runs")
            yield f"s3://runs?endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1"
        finally:
            server.kill()
            server.wait()


def wait_for(url: str, server: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + 120
    while server.poll() is None and time.monotonic() < deadline:
        try:
            urllib.request.urlopen(url, timeout=2).close()
        except OSError:
            time.sleep(0.3)
        else:
            return
    raise RuntimeError(f"{url} does not answer")
