"""Runs and versions on a real MLflow server, read back by MLflow's own client."""

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Queue

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from gdl_ray import registry, tracking
from gdl_ray.data import Dataset
from gdl_ray.engine import Engine, seeds_of
from gdl_ray.families import build, preset
from gdl_ray.family import UNLABELLED
from gdl_ray.train import checkpoint
from gdl_ray.train.validation import sample_grid
from tests.conftest import free_port, mlflow_on

pytestmark = pytest.mark.slow
SECRET = "s3cret"
SOURCE = "s3://nobody/model"  # of versions that nobody fetches
SCORES = {"validation/bits_per_dim": 1.91, "test/bits_per_dim": 1.93}


def saved(digits: Dataset, folder: Path, seed: int = 0) -> Path:
    model = build("vae", preset("vae", "digits").model, digits.spec, seed).eval()
    contents = checkpoint.Contents(
        description=checkpoint.describe(model), weights=model.state_dict(), samples_png=sample_grid(model)
    )
    checkpoint.save(folder, contents)
    return folder


def register(run_id: str, directory: Path, promote: bool) -> registry.Version:
    return registry.register(run_id, directory, promote, SCORES)


def test_a_version_is_served_by_mlflow_itself(
    mlflow_client: MlflowClient, digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))  # MLflow adds the code of a version that it loads
    run_id, _ = tracking.start_run("second", digits, {}, {})
    directory = saved(digits, tmp_path / "step-1")
    first = register(run_id, directory, promote=False)
    assert (first.name, first.champion) == ("digits-vae", first.version)
    second = registry.register(
        run_id, saved(digits, tmp_path / "step-2", seed=1), promote=False, scores=SCORES
    )
    assert second.champion == first.version
    third = register(run_id, directory, promote=True)
    assert third.champion == third.version
    assert registry.registered()["digits-vae"].aliases == {"champion": third.version}

    files = {item.name for item in (tmp_path).rglob("*.pkl")}
    assert not files
    mlflow.set_tracking_uri(os.environ["MLFLOW_TRACKING_URI"])
    model = mlflow.pyfunc.load_model("models:/digits-vae@champion")
    labels = pd.DataFrame({"label": [3, -1, 7]})
    x = model.predict(labels, params={"seed": 11})
    assert x.shape == (3, 1, 8, 8)
    assert x.dtype == np.uint8
    assert not np.array_equal(x, model.predict(labels, params={"seed": 12}))

    engine = Engine(checkpoint.load_family(registry.fetch("digits-vae", third.version)))
    drawn = engine.submit(seeds_of(11, 3), torch.tensor([3, UNLABELLED, 7])).future.result(timeout=30).numpy()
    engine.close(drain=True)
    assert (drawn != x).mean() < 0.02  # to rounding: the batch has another shape

    schema = model.metadata.signature
    assert schema.params.params[0].name == "seed"
    assert schema.outputs.inputs[0].shape == (-1, 1, 8, 8)
    with pytest.raises(MlflowException, match="label"):
        model.predict(pd.DataFrame({"lable": [1]}))
    with pytest.raises(ValueError, match=r"label must lie in \[0, 9\]"):
        model.predict(pd.DataFrame({"label": [10]}))


def test_a_version_holds_no_pickle(mlflow_client: MlflowClient, digits: Dataset, tmp_path: Path) -> None:
    run_id, _ = tracking.start_run("third", digits, {}, {})
    version = register(run_id, saved(digits, tmp_path / "step-1"), promote=False)
    uri = f"models:/digits-vae/{version.version}"
    folder = Path(mlflow.artifacts.download_artifacts(uri, dst_path=str(tmp_path / "all")))
    assert not [path for path in folder.rglob("*") if path.suffix in {".pkl", ".pickle", ".pt", ".bin"}]
    assert (folder / "artifacts" / "checkpoint" / "model.safetensors").exists()
    assert not (folder / "artifacts" / "checkpoint" / "resume").exists()


def test_a_version_is_fetched_once(mlflow_client: MlflowClient, digits: Dataset, tmp_path: Path) -> None:
    run_id, _ = tracking.start_run("fourth", digits, {}, {})
    version = registry.register(
        run_id, saved(digits, tmp_path / "step-1"), promote=False, scores=SCORES
    ).version
    folder = registry.fetch("digits-vae", version)
    (folder / "mark").touch()
    assert registry.fetch("digits-vae", version) == folder
    assert (folder / "mark").exists()
    described = registry.describe("digits-vae", version)
    assert (described["run_id"], described["metrics"], described["tags"]) == (run_id, SCORES, {})
    (folder / "model.safetensors").write_bytes(b"torn")
    checkpoint.load_family(registry.fetch("digits-vae", version))


def test_a_server_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(registry.RegistryUnavailable, match=r"MLFLOW_TRACKING_URI=http://127.0.0.1:9"):
        tracking.check()
    with pytest.raises(registry.RegistryUnavailable, match=r"127.0.0.1:9"):
        registry.registered()
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with pytest.raises(registry.RegistryUnavailable, match="is not set"):
        tracking.check()


def test_models_are_listed_with_their_aliases_tags_and_newest_version(mlflow_client: MlflowClient) -> None:
    for i in range(101):  # a page of MLflow's has a hundred
        mlflow_client.create_registered_model(f"listed-{i:03d}", tags={"serve.replicas": f"0:{i}"})
    for _ in range(12):  # the newest by number, not by its letters
        mlflow_client.create_model_version("listed-100", SOURCE)
    mlflow_client.set_registered_model_alias("listed-100", "champion", "9")
    mlflow_client.set_registered_model_alias("listed-100", "next", "12")
    models = registry.registered()
    assert models.keys() >= {f"listed-{i:03d}" for i in range(101)}
    assert models["listed-007"] == registry.Registered({}, {"serve.replicas": "0:7"}, 0)
    assert models["listed-100"] == registry.Registered(
        {"champion": 9, "next": 12}, {"serve.replicas": "0:100"}, 12
    )


def test_a_version_that_is_not_there_is_told_from_a_server_that_is_not(
    mlflow_client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow_client.create_registered_model("lonely")
    mlflow_client.create_model_version("lonely", SOURCE, tags={"colour": "red", "test/nats": "2.5"})
    assert registry.exists("lonely", 1)
    assert not any(registry.exists(*missing) for missing in (("lonely", 2), ("lonely", 0), ("nobody", 1)))
    described = registry.describe("lonely", 1)
    assert (described["metrics"], described["tags"]) == ({"test/nats": 2.5}, {"colour": "red"})
    for ask in (registry.describe, registry.fetch):
        with pytest.raises(registry.VersionNotFound, match="lonely has no version 2"):
            ask("lonely", 2)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(registry.RegistryUnavailable):
        registry.exists("lonely", 1)


class Receiver:
    """Takes what is POSTed to it, each with the time."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}/hooks/registry"
        self.events: Queue[tuple[float, dict[str, str], bytes]] = Queue()

    def next(self) -> tuple[float, dict[str, str], bytes]:
        return self.events.get(timeout=20)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            headers = {name.lower(): value for name, value in self.headers.items()}
            receiving.events.put((time.monotonic(), headers, body))
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    receiving = Receiver(server.server_port)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield receiving
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_moved_alias_is_told_at_once_and_signed(mlflow_client: MlflowClient, receiver: Receiver) -> None:
    mlflow_client.create_registered_model("hooked")
    mlflow_client.create_model_version("hooked", SOURCE)
    assert registry.hook(receiver.url, "former")
    assert registry.hook(receiver.url, SECRET)  # replaces it: one event, signed by the new secret
    begin = time.monotonic()
    mlflow_client.set_registered_model_alias("hooked", "champion", "1")
    arrived, headers, body = receiver.next()
    assert arrived - begin < 1
    event = json.loads(body)
    assert (event["entity"], event["action"]) == ("model_version_alias", "created")
    assert event["data"] == {"name": "hooked", "alias": "champion", "version": "1"}

    assert registry.signed(headers, body, SECRET)
    assert not registry.signed(headers, body.replace(b"champion", b"champion2"), SECRET)
    assert not registry.signed(headers, body, "former")
    assert not registry.signed({**headers, "x-mlflow-timestamp": "9" * 5000}, body, SECRET)
    for header in ("x-mlflow-signature", "x-mlflow-timestamp", "x-mlflow-delivery-id"):
        assert not registry.signed({**headers, header: headers[header][:-1] + "\u00e9"}, body, SECRET)
        assert not registry.signed({k: v for k, v in headers.items() if k != header}, body, SECRET)

    told = [("model_version_alias", "deleted"), ("registered_model", "created"), ("model_version", "created")]
    mlflow_client.delete_registered_model_alias("hooked", "champion")
    mlflow_client.create_registered_model("hooked-too")
    mlflow_client.create_model_version("hooked-too", SOURCE)
    events = [json.loads(receiver.next()[2]) for _ in told]
    assert sorted((event["entity"], event["action"]) for event in events) == sorted(told)
    assert receiver.events.empty()


def test_an_event_that_is_old_or_of_the_future_is_not_believed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Made by MLflow 3.17 itself, at this second, with this secret.
    headers = {
        "x-mlflow-delivery-id": "27b2cbbf-6cd7-4d3b-a3ee-4ec8a3a3fa95",
        "x-mlflow-timestamp": "1790000000",
        "x-mlflow-signature": "v1,FiLSOKgWx0uPtorF1Z8kBqXrPHNw0DPk2+2S8XFJAtw=",
    }
    body = b'{"entity": "registered_model"}'
    for seconds, believed in ((0, True), (299, True), (301, False), (-301, False)):
        monkeypatch.setattr(time, "time", lambda seconds=seconds: 1790000000 + seconds)
        assert registry.signed(headers, body, SECRET) == believed
    monkeypatch.setattr(time, "time", lambda: 1790000000)
    both = {**headers, "x-mlflow-signature": f"v1,other {headers['x-mlflow-signature']}"}
    assert registry.signed(both, body, SECRET)  # while a secret is replaced


@pytest.mark.parametrize(
    ("url", "why"), [("ftp://127.0.0.1/hook", "Invalid webhook URL scheme: 'ftp'"), ("http:///", "hostname")]
)
def test_a_hook_that_is_refused_is_no_failure(
    url: str, why: str, mlflow_client: MlflowClient, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert not registry.hook(url, SECRET)
    assert f"the registry will not tell {url} of its events: " in caplog.text
    assert why in caplog.text


def test_a_hook_survives_a_restart_of_the_server(
    tmp_path: Path, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    for version in ("1", "2"):
        with mlflow_on(port, tmp_path) as uri:
            monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
            client = MlflowClient(uri)
            if version == "1":
                client.create_registered_model("kept")
                assert registry.hook(receiver.url, SECRET)
            client.create_model_version("kept", SOURCE)
            _, headers, body = receiver.next()
            assert registry.signed(headers, body, SECRET)
            assert json.loads(body)["data"]["version"] == version
