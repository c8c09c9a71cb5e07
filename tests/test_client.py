"""The client against a server that answers from a script."""

import io
import json
import pickle
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import numpy as np
import pytest

from gdl_ray.client import Client, ServerProblem


class Script:
    """What the server answers next, and what it was asked last."""

    status = 200
    content_type = "application/json"
    content = b""
    method = ""
    path = ""
    body: Any = None

    def answer(self, content: bytes | dict[str, Any], status: int = 200, content_type: str = "") -> None:
        self.content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.status, self.content_type = status, content_type or "application/json"


@pytest.fixture
def script() -> Script:
    return Script()


@pytest.fixture
def client(script: Script) -> Iterator[Client]:
    class Handler(BaseHTTPRequestHandler):
        def handle_one(self) -> None:
            script.method, script.path = self.command, self.path
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            script.body = json.loads(body) if body else None
            self.send_response(script.status)
            self.send_header("content-type", script.content_type)
            self.send_header("content-length", str(len(script.content)))
            self.end_headers()
            self.wfile.write(script.content)

        do_GET = do_POST = handle_one  # noqa: N815

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield Client(f"http://127.0.0.1:{server.server_port}", timeout_s=10)
    server.shutdown()
    thread.join()
    server.server_close()


def npy(array: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()


def test_sample_asks_for_and_returns_an_array(script: Script, client: Client) -> None:
    images = np.arange(128, dtype=np.uint8).reshape(2, 1, 8, 8)
    script.answer(npy(images), content_type="application/x-npy")
    np.testing.assert_array_equal(client.sample("digits-vae", n=2, seed=7, label=3), images)
    assert (script.method, script.path) == ("POST", "/v1/models/digits-vae/sample")
    assert script.body == {"n": 2, "seed": 7, "label": 3, "format": "npy"}


def test_options_are_sent_beside_the_rest(script: Script, client: Client) -> None:
    script.answer(npy(np.zeros((2, 1, 2, 2), np.uint8)), content_type="application/x-npy")
    client.sample("m", n=2, guidance=1.5, steps=9)
    assert {name: script.body[name] for name in ("n", "guidance", "steps")} == {
        "n": 2,
        "guidance": 1.5,
        "steps": 9,
    }


def test_log_likelihood_sends_lists_and_returns_nats(script: Script, client: Client) -> None:
    script.answer({"nats": [-1.5, -2.0], "kind": "exact"})
    x = np.zeros((2, 1, 2, 2), np.uint8)
    nats = client.log_likelihood("digits-vae", x, labels=np.array([1, 2]), samples=10, seed=4)
    np.testing.assert_array_equal(nats, [-1.5, -2.0])
    assert script.path == "/v1/models/digits-vae/log_likelihood"
    assert script.body == {"x": x.tolist(), "labels": [1, 2], "samples": 10, "seed": 4}


def test_models_are_listed(script: Script, client: Client) -> None:
    script.answer({"models": [{"name": "digits-vae", "version": 1}], "registry_failure": None})
    assert client.models() == [{"name": "digits-vae", "version": 1}]
    assert (script.method, script.path) == ("GET", "/v1/models")


def test_a_card_is_that_of_its_model(script: Script, client: Client) -> None:
    script.answer({"name": "digits-vae", "options": {}})
    assert client.card("digits-vae") == {"name": "digits-vae", "options": {}}
    assert (script.method, script.path) == ("GET", "/v1/models/digits-vae")


def test_the_detail_of_a_problem_is_the_error(script: Script, client: Client) -> None:
    script.answer({"status": 404, "detail": "There is no model 'nope'"}, 404, "application/problem+json")
    with pytest.raises(ServerProblem, match="There is no model 'nope'") as error:
        client.sample("nope")
    assert error.value.status == 404


def test_an_error_of_another_server_names_its_status(script: Script, client: Client) -> None:
    script.answer(b"<h1>Bad gateway</h1>", 502, "text/html")
    with pytest.raises(ServerProblem, match="models answered 502 Bad Gateway"):
        client.models()


def test_a_name_stays_one_part_of_the_path(script: Script, client: Client) -> None:
    script.answer(npy(np.zeros((1, 1, 2, 2), np.uint8)))
    client.sample("../secret", n=1)
    assert script.path == "/v1/models/..%2Fsecret/sample"


def test_a_pickle_is_not_loaded(script: Script, client: Client) -> None:
    script.answer(pickle.dumps({"harm": True}), content_type="application/x-npy")
    with pytest.raises(ValueError, match="pickle"):
        client.sample("digits-vae")


def test_a_server_that_is_not_there_is_a_transport_error() -> None:
    with pytest.raises(httpx.TransportError):
        Client("http://127.0.0.1:9", timeout_s=2).models()
