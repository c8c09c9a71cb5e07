"""The production platform, end to end: Postgres, a bucket, credentials; trained, served, lost, restored."""

import json
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psycopg
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from pyarrow import fs  # type: ignore[import-untyped]

from gdl_ray.client import Client, ServerProblem
from infra import local
from infra.backup import backup, restore
from infra.errors import PlatformError
from infra.local import Platform
from infra.processes import tree
from infra.settings import Settings
from tests.conftest import ROOT
from tests.postgres import postgres_server

pytestmark = pytest.mark.long
MODEL = "digits-vae"
TRAIN = [str(Path(sys.executable).with_name("ray")), "job", "submit", "--working-dir", ".", "--"]
TRAIN += ["python", "-m", "jobs.train", "vae", "--workers", "1", "--steps", "40"]
TRAIN += ["--report-every", "20", "--checkpoint-every", "40"]


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    with postgres_server() as url:
        yield url


@pytest.fixture(scope="module")
def settings(database: str, s3: str) -> Settings:
    place, _, query = s3.partition("?")
    return Settings(database=database, artifacts=f"{place}/mlflow?{query}", auth=True)


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    """A home for a platform, which is down when the tests end, however they end."""
    folder = Path(tempfile.mkdtemp(prefix="gdl-test-"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local, "USUAL_PORTS", {})
        yield folder
    local.down(folder)
    shutil.rmtree(local._temp_dir(folder), ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def platform(home: Path, settings: Settings) -> Platform:
    return local.up(home, settings)


@pytest.fixture(scope="module")
def environment(platform: Platform) -> dict[str, str]:
    """What a shell has after it has read the file that `up` names."""
    script = ". $0; exec env -0"
    printed = subprocess.run(
        ["sh", "-c", script, str(platform.shell_file)], capture_output=True, text=True, check=True
    )
    return dict(line.partition("=")[::2] for line in printed.stdout.split("\0") if line)


@pytest.fixture(scope="module")
def trained(environment: dict[str, str]) -> str:
    """Output of the job that trained version 1."""
    return subprocess.run(
        TRAIN, cwd=ROOT, env=environment, capture_output=True, text=True, check=True, timeout=300
    ).stdout


def eventually(condition: Callable[[], bool], limit_s: float = 60.0) -> float:
    """Wait for a condition; returns the seconds it took."""
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() - begin < limit_s
        time.sleep(0.1)
    return time.monotonic() - begin


def answers(client: Client, name: str = MODEL) -> bool:
    try:
        client.sample(name, n=1)
    except (ServerProblem, OSError):
        return False
    return True


def status_of(url: str, token: str = "") -> int:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=20) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_ray_asks_for_its_token(platform: Platform, environment: dict[str, str]) -> None:
    token = Path(environment["RAY_AUTH_TOKEN_PATH"]).read_text()
    for page in ("/api/jobs/", "/api/version", "/api/serve/applications/", "/nodes?view=summary"):
        url = platform.urls["ray"] + page
        assert (status_of(url), status_of(url, "x" * len(token)), status_of(url, token)) == (401, 403, 200)


def test_mlflow_asks_for_its_password(
    platform: Platform, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = platform.urls["mlflow"]
    assert status_of(f"{uri}/health") == 200
    assert status_of(f"{uri}/api/2.0/mlflow/registered-models/search") == 401
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", environment["MLFLOW_TRACKING_USERNAME"])
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong")
    with pytest.raises(MlflowException, match=r"401|not authenticated"):
        MlflowClient(uri).search_registered_models()


def test_secrets_are_in_private_files_and_on_no_command_line(
    platform: Platform, environment: dict[str, str]
) -> None:
    token = Path(environment["RAY_AUTH_TOKEN_PATH"]).read_text()
    password = environment["MLFLOW_TRACKING_PASSWORD"]
    lines = [
        Path(f"/proc/{member.pid}/cmdline").read_bytes().decode(errors="replace")
        for process in platform.processes.values()
        for member in tree(process)
        if Path(f"/proc/{member.pid}/cmdline").exists()
    ]
    assert any("mlflow" in line for line in lines)
    assert not any(token in line or password in line for line in lines)
    assert platform.home.stat().st_mode & 0o777 == 0o700
    logs = "".join(file.read_text(errors="replace") for file in (platform.home / "logs").glob("*.log"))
    assert token not in logs
    assert password not in logs


def test_a_model_is_trained_registered_served_lost_and_restored(
    platform: Platform,
    environment: dict[str, str],
    trained: str,
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, environment[name])
    mlflow, client = MlflowClient(platform.urls["mlflow"]), Client(platform.urls["serve"])
    assert f"jobs.train: {MODEL} version 1 (champion)" in trained
    bucket, root = fs.FileSystem.from_uri(settings.artifacts)
    assert weights_in(bucket, root)
    assert not any((platform.home / "artifacts").iterdir())
    assert not (platform.home / "mlflow.db").exists()
    eventually(lambda: answers(client))
    expected = client.sample(MODEL, n=16, seed=7)
    nats = client.log_likelihood(MODEL, expected, samples=10)
    follow_an_alias(mlflow, client)
    losses = curve(mlflow)
    assert [step for step, _ in losses] == [20, 40]

    with pytest.raises(PlatformError, match=r"was started with --database postgresql://.* --auth; end it"):
        local.up(platform.home, Settings())
    held = backup(platform.home, tmp_path / "backup")
    assert held.files > 50
    local.down(platform.home)
    lose_everything(platform.home, settings)
    again = platform.home.with_name(f"{platform.home.name}-again")
    try:
        assert restore(again, tmp_path / "backup", settings) == held
        assert len(weights_in(bucket, root)) == 1
        up = local.up(again)  # the settings are remembered
        client = Client(up.urls["serve"])
        eventually(lambda: answers(client))
        np.testing.assert_array_equal(client.sample(MODEL, n=16, seed=7), expected)
        np.testing.assert_array_equal(client.log_likelihood(MODEL, expected, samples=10), nats)
        eventually(lambda: answers(client, f"{MODEL}@next"))
        assert curve(MlflowClient(up.urls["mlflow"])) == losses  # by the old password
    finally:
        local.down(again)
        shutil.rmtree(local._temp_dir(again), ignore_errors=True)
        shutil.rmtree(again)


def curve(mlflow: MlflowClient) -> list[tuple[int, float]]:
    version = mlflow.get_model_version_by_alias(MODEL, "champion")
    return [(each.step, each.value) for each in mlflow.get_metric_history(str(version.run_id), "train/loss")]


def weights_in(bucket: fs.FileSystem, root: str) -> list[str]:
    found = bucket.get_file_info(fs.FileSelector(root, recursive=True, allow_not_found=True))
    return [each.path for each in found if each.path.endswith("/model.safetensors")]


def follow_an_alias(mlflow: MlflowClient, client: Client) -> None:
    """See that MLflow's events, and the replicas' questions, pass its authentication."""
    (hook,) = mlflow.list_webhooks()
    assert hook.url.endswith("/hooks/registry")
    assert json.loads(str(mlflow.test_webhook(hook.webhook_id).response_status)) < 300
    assert not answers(client, f"{MODEL}@next")
    mlflow.set_registered_model_alias(MODEL, "next", "1")
    assert eventually(lambda: answers(client, f"{MODEL}@next"), limit_s=15) < 15


def lose_everything(home: Path, settings: Settings) -> None:
    """Lose the machine, the database and the bucket."""
    shutil.rmtree(home)
    with psycopg.connect(settings.database, autocommit=True) as connection:
        connection.execute("DROP SCHEMA public CASCADE")
        connection.execute("CREATE SCHEMA public")
    bucket, root = fs.FileSystem.from_uri(settings.artifacts)
    bucket.delete_dir(root)
    assert not weights_in(bucket, root)
