"""Events of a real MLflow server, as whoever listens receives them."""

import json
import logging
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Queue

import pytest
from mlflow import MlflowClient

from gdl_ray import registry
from tests.conftest import free_port, mlflow_on

pytestmark = pytest.mark.slow
SECRET = "s3cret"
SOURCE = "s3://nobody/model"  # of versions that nobody fetches


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
