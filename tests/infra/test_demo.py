"""The demo's steps against a real server that does not do as hoped."""

import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from infra import demo

PROBLEM = b'{"type": "about:blank", "title": "No champion", "status": 503}'


class Server(ThreadingHTTPServer):
    """Gives the answers of a list, one a request; the last one again and again."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers = [(200, demo.PNG_SIGNATURE)]
        self.bodies: list[bytes] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1/models/digits-vae"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        self.server.bodies.append(self.rfile.read(int(self.headers.get("Content-Length", 0))))
        answers = self.server.answers
        status, content = answers.pop(0) if len(answers) > 1 else answers[0]
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.05])
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(params=["curl", "python"])
def _client(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sample into a folder of the test's own, with curl and without."""
    monkeypatch.chdir(tmp_path)
    if request.param == "python":
        monkeypatch.setenv("PATH", str(tmp_path))
    elif shutil.which("curl") is None:
        pytest.skip("no curl here")


@pytest.mark.usefixtures("_client")
def test_samples_are_written(server: Server) -> None:
    demo._sample(server.url)
    assert demo.SAMPLES.read_bytes() == demo.PNG_SIGNATURE
    assert server.bodies == [b'{"n": 64, "seed": 7, "format": "png"}']


@pytest.mark.usefixtures("_client")
@pytest.mark.parametrize(("answer", "shown"), [((503, PROBLEM), ".*No champion"), ((200, b""), "$")])
def test_an_answer_that_is_no_image_is_shown_and_not_kept(
    server: Server, answer: tuple[int, bytes], shown: str
) -> None:
    server.answers = [answer]
    demo.SAMPLES.write_bytes(demo.PNG_SIGNATURE)  # of an earlier demo
    with pytest.raises(demo.DemoError, match=f"did not answer with an image but with: {shown}"):
        demo._sample(server.url)
    assert not demo.SAMPLES.exists()


@pytest.mark.usefixtures("_client")
def test_no_answer_is_an_error_of_the_demo(server: Server) -> None:
    server.server_close()
    with pytest.raises(demo.DemoError, match=f"{server.url} did not answer with an image"):
        demo._sample(server.url)
    assert not demo.SAMPLES.exists()


def test_waiting_ends_when_the_model_answers(server: Server) -> None:
    server.answers = [(404, PROBLEM), (200, b"{}")]
    demo._wait_for(server.url)
    assert len(server.bodies) == 2


def test_waiting_has_a_limit_and_says_where_to_look(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GDL_RAY_HOME", str(tmp_path))
    server.answers = [(404, PROBLEM)]
    with pytest.raises(demo.DemoError, match=f"does not answer after 0 s; see {tmp_path}/logs"):
        demo._wait_for(server.url, limit_s=0.1)
