"""The client against a server on a real socket that answers, refuses and breaks off from a script."""

import base64
import io
import json
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import numpy as np
import pytest

from gdl_ray import client as module
from gdl_ray.client import MAX_SEED, Client, Preview, Samples, ServerProblem

IMAGES = np.arange(128, dtype=np.uint8).reshape(2, 1, 8, 8)


@dataclass
class Answer:
    """One line of the script."""

    content: bytes | dict[str, Any] = b""
    status: int = 200
    content_type: str = "application/json"
    headers: dict[str, str] = field(default_factory=dict)
    promised: int = 0
    """Bytes that are announced and do not come: the connection is closed instead."""
    delay_s: float = 0.0
    """Time between any two bytes."""


@dataclass
class Asked:
    """A request that came in."""

    method: str
    path: str
    headers: dict[str, str]
    body: Any
    at: float


class Script:
    """What the server answers, in turn and the last for ever, and what it was asked."""

    def __init__(self) -> None:
        self.answers: list[Answer] = [Answer()]
        self.asked: list[Asked] = []

    def say(self, *answers: Answer) -> None:
        self.answers = list(answers)

    @property
    def last(self) -> Asked:
        return self.asked[-1]

    @property
    def said(self) -> dict[str, Any]:
        """The body of the last request, but for how long it may take."""
        body: dict[str, Any] = self.last.body
        return {name: value for name, value in body.items() if name != "timeout_s"}

    @property
    def pauses_s(self) -> list[float]:
        """Times between requests."""
        return [after.at - before.at for before, after in zip(self.asked, self.asked[1:], strict=False)]


@pytest.fixture
def script() -> Script:
    return Script()


@pytest.fixture
def url(script: Script) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_one(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            headers = {name.lower(): value for name, value in self.headers.items()}
            asked = json.loads(body) if body else None
            script.asked.append(Asked(self.command, self.path, headers, asked, time.monotonic()))
            self.answer(script.answers.pop(0) if len(script.answers) > 1 else script.answers[0])

        def answer(self, answer: Answer) -> None:
            content = (
                answer.content if isinstance(answer.content, bytes) else json.dumps(answer.content).encode()
            )
            if not answer.status:  # not a word
                self.close_connection = True
                return
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.send_header("content-type", answer.content_type)
            self.send_header("content-length", str(len(content) + answer.promised))
            self.end_headers()
            if answer.promised:
                self.close_connection = True
            try:
                for part in (
                    [content[i : i + 1] for i in range(len(content))] if answer.delay_s else [content]
                ):
                    self.wfile.write(part)
                    time.sleep(answer.delay_s)
            except OSError:  # the client has had enough
                self.close_connection = True

        do_GET = do_POST = handle_one  # noqa: N815

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    with Client(url, timeout_s=10) as client:
        yield client


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten pauses; and forget the key of whoever runs the tests."""
    monkeypatch.setattr(module, "_FIRST_PAUSE_S", 0.02)
    monkeypatch.delenv("GDL_RAY_KEY", raising=False)


def npy(array: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()


def images(**kwargs: Any) -> Answer:
    return Answer(npy(IMAGES), content_type="application/x-npy", **kwargs)


def problem(status: int, detail: str = "not now", **headers: str) -> Answer:
    content = {"status": status, "detail": detail}
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Answer(content, status, "application/problem+json", named)


def test_sample_asks_for_and_returns_an_array(script: Script, client: Client) -> None:
    script.say(images())
    np.testing.assert_array_equal(client.sample("digits-vae", n=2, seed=7, label=3), IMAGES)
    assert (script.last.method, script.last.path) == ("POST", "/v1/models/digits-vae/sample")
    assert script.said == {"n": 2, "seed": 7, "label": 3, "format": "npy"}
    assert 9 < script.last.body["timeout_s"] < 10  # the server's own words come before our patience ends


def test_each_sample_may_have_its_own_seed_and_label(script: Script, client: Client) -> None:
    script.say(images())
    client.sample("m@3", seeds=np.array([5, 2**53 - 1]), labels=[0, 9], guidance=1.5, steps=9)
    assert script.last.path == "/v1/models/m@3/sample"
    assert script.said == {
        **{"seeds": [5, 2**53 - 1], "labels": [0, 9], "format": "npy"},
        **{"guidance": 1.5, "steps": 9},
    }


def test_draw_tells_what_makes_a_sample_again(script: Script, client: Client) -> None:
    stream = io.BytesIO()
    np.savez(stream, samples=IMAGES, seeds=[11, 12], labels=[-1, -1], version=4, model="m", seed=7)
    script.say(Answer(stream.getvalue()), images())
    drawn = client.draw("m", n=2)
    np.testing.assert_array_equal(drawn.x, IMAGES)
    assert (drawn.seeds.tolist(), drawn.labels.tolist(), drawn.version) == ([11, 12], [-1, -1], 4)
    assert script.said["format"] == "npz"
    client.sample(f"m@{drawn.version}", seeds=drawn.seeds[1:])
    assert (script.last.path, script.said["seeds"]) == ("/v1/models/m@4/sample", [12])
    assert "seed" not in script.said


X = np.zeros((2, 1, 2, 2), np.uint8)
Z = np.array([[0.5, -1.0], [2.0, 3.0]])


@pytest.mark.parametrize(
    ("call", "answer", "operation", "said", "result"),
    [
        (
            lambda client: client.log_likelihood("m", X, labels=np.array([1, 2]), samples=10, seed=4),
            {"nats": [-1.5, -2.0], "kind": "exact"},
            "log_likelihood",
            {"x": X.tolist(), "labels": [1, 2], "samples": 10, "seed": 4},
            [-1.5, -2.0],
        ),
        (
            lambda client: client.classify("m", X, samples=3),
            {"labels": [1, 0], "probabilities": [[0.25, 0.75], [1.0, 0.0]]},
            "classify",
            {"x": X.tolist(), "samples": 3, "seed": 0},
            [[0.25, 0.75], [1.0, 0.0]],
        ),
        (
            lambda client: client.encode("m", X),
            {"z": Z.tolist()},
            "encode",
            {"x": X.tolist()},
            Z,
        ),
        (
            lambda client: client.decode("m", Z, labels=[1, 2]),
            npy(X),
            "decode",
            {"z": Z.tolist(), "labels": [1, 2], "format": "npy"},
            X,
        ),
        (
            lambda client: client.interpolate("m", X[0], X[1], steps=2, label=1),
            npy(X),
            "interpolate",
            {"x": X.tolist(), "steps": 2, "label": 1, "format": "npy"},
            X,
        ),
        (
            lambda client: client.interpolate("m", *Z),
            npy(X),
            "interpolate",
            {"z": Z.tolist(), "steps": 8, "format": "npy"},
            X,
        ),
        (
            lambda client: client.complete("m", X, X[0] == 0, n=1, seed=3, labels=[1, 1], steps=5),
            npy(X),
            "complete",
            {
                **{"x": X.tolist(), "known": [[[True, True], [True, True]]], "n": 1, "seed": 3},
                **{"labels": [1, 1], "steps": 5, "format": "npy"},
            },
            X,
        ),
    ],
    ids=["log_likelihood", "classify", "encode", "decode", "interpolate", "interpolate-z", "complete"],
)
def test_an_operation_sends_lists_and_returns_an_array(
    call: Callable[[Client], Any],
    answer: Any,
    operation: str,
    said: dict[str, Any],
    result: Any,
    script: Script,
    client: Client,
) -> None:
    script.say(Answer(answer))
    np.testing.assert_array_equal(call(client), result)
    assert script.last.path == f"/v1/models/m/{operation}"
    assert script.said == said


def test_models_are_listed(script: Script, client: Client) -> None:
    script.say(Answer({"models": [{"name": "digits-vae", "version": 1}], "registry_failure": None}))
    assert client.models() == [{"name": "digits-vae", "version": 1}]
    assert (script.last.method, script.last.path, script.last.body) == ("GET", "/v1/models", None)


def test_a_card_is_that_of_its_model(script: Script, client: Client) -> None:
    script.say(Answer({"name": "digits-vae", "options": {}}))
    assert client.card("digits-vae@next") == {"name": "digits-vae", "options": {}}
    assert (script.last.method, script.last.path) == ("GET", "/v1/models/digits-vae@next")


def test_the_key_is_given_or_that_of_the_environment(
    script: Script, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    script.say(Answer({"models": []}))
    monkeypatch.setenv("GDL_RAY_KEY", "gdl_environment")
    for key, told in ((None, "Bearer gdl_environment"), ("gdl_given", "Bearer gdl_given"), ("", None)):
        with Client(url, key) as client:
            client.models()
        assert script.last.headers.get("authorization") == told


@pytest.mark.parametrize(
    "failures",
    [
        [images(promised=50)],  # closed within the body
        [Answer(status=0)],  # closed without a word
        [problem(429), problem(503)],
        [Answer(b"<h1>Bad gateway</h1>", 502, "text/html"), Answer(b"late", 504, "text/plain")],
    ],
)
def test_what_fails_in_passing_is_asked_again_alike(
    failures: list[Answer], script: Script, client: Client
) -> None:
    script.say(*failures, images())
    np.testing.assert_array_equal(client.sample("m", n=2), IMAGES)
    assert len(script.asked) == len(failures) + 1
    seeds = {asked.body["seed"] for asked in script.asked}
    assert len(seeds) == 1
    assert 0 <= seeds.pop() <= MAX_SEED
    client.sample("m", n=2)
    assert script.last.body["seed"] != script.asked[0].body["seed"]  # another request, other samples


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 413, 422, 500, 504])
def test_what_will_not_change_is_asked_once(status: int, script: Script, client: Client) -> None:
    script.say(problem(status, "There is no model 'nope'"))
    with pytest.raises(ServerProblem, match="There is no model 'nope'") as error:
        client.sample("nope")
    assert error.value.status == status
    assert len(script.asked) == 1


def test_pauses_grow_and_have_an_end(script: Script, url: str) -> None:
    script.say(problem(503))
    with Client(url, retries=4) as client, pytest.raises(ServerProblem, match="not now"):
        client.models()
    assert len(script.asked) == 5
    for pause_s, longest_s in zip(script.pauses_s, (0.02, 0.04, 0.08, 0.16), strict=True):
        assert longest_s / 2 <= pause_s < longest_s + 0.1


@pytest.mark.parametrize("after", ["1", lambda: formatdate(time.time() + 2, usegmt=True)])
def test_a_server_that_names_a_time_is_heeded(
    after: str | Callable[[], str], script: Script, client: Client
) -> None:
    script.say(problem(429, Retry_After=after if isinstance(after, str) else after()), images())
    client.sample("m", n=2)
    assert 1 <= script.pauses_s[0] < 3


@pytest.mark.parametrize("after", ["soon", "-3", "Fri, 99 Nov 2026", "\u0661"])
def test_a_time_that_is_no_sense_is_passed_over(after: str, script: Script, client: Client) -> None:
    script.say(problem(429, Retry_After=after.encode().decode("latin-1")), images())
    client.sample("m", n=2)
    assert script.pauses_s[0] < 0.5


def test_no_time_is_waited_that_there_is_not(script: Script, url: str) -> None:
    script.say(problem(503, Retry_After="30"))
    begin = time.monotonic()
    with Client(url, timeout_s=5) as client, pytest.raises(ServerProblem, match="not now") as error:
        client.models()
    assert time.monotonic() - begin < 1
    assert error.value.retry_after_s == 30


@pytest.mark.parametrize("delay_s", [0.02, 1.0])
def test_an_answer_that_trickles_in_is_given_up_in_time(delay_s: float, script: Script, url: str) -> None:
    script.say(images(delay_s=delay_s))
    begin = time.monotonic()
    with Client(url, timeout_s=0.5) as client, pytest.raises(httpx.ReadTimeout):
        client.sample("m")
    assert 0.4 < time.monotonic() - begin < 1.5


def test_an_error_of_another_server_names_its_status(script: Script, url: str) -> None:
    script.say(Answer(b"<h1>Bad gateway</h1>", 502, "text/html"))
    with (
        Client(url, retries=0) as client,
        pytest.raises(ServerProblem, match="answered 502 Bad Gateway"),
    ):
        client.models()


def test_a_server_that_is_not_there_is_a_transport_error() -> None:
    with Client("http://127.0.0.1:9", timeout_s=2) as client, pytest.raises(httpx.TransportError):
        client.models()


def test_a_name_stays_one_part_of_the_path(script: Script, client: Client) -> None:
    script.say(images())
    client.sample("../secret", n=1)
    assert script.last.path == "/v1/models/..%2Fsecret/sample"


def test_a_pickle_is_not_loaded(script: Script, client: Client) -> None:
    script.say(Answer(pickle.dumps({"harm": True}), content_type="application/x-npy"))
    with pytest.raises(ValueError, match="pickle"):
        client.sample("digits-vae")


def event(name: str, data: dict[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()


def stream(*events: bytes, **kwargs: Any) -> Answer:
    return Answer(b"".join(events), content_type="text/event-stream", **kwargs)


HALF = event("preview", {"share": 0.5, "png": base64.b64encode(b"half").decode()})
MOST = event("preview", {"share": 0.75, "samples": [[3, 1]]})
DONE = event(
    "samples",
    {
        **{"version": 2, "seeds": [5, 6], "labels": [None, 3], "media_type": "application/x-npy"},
        "content": base64.b64encode(npy(IMAGES)).decode(),
    },
)


def test_a_stream_shows_previews_and_ends_with_the_samples(script: Script, client: Client) -> None:
    script.say(stream(b": a comment\n\n", HALF, MOST, DONE))
    half, most, done = client.stream("m", n=2, seed=1)
    assert half == Preview(0.5, b"half", None)
    assert isinstance(most, Preview)
    assert (most.share, most.png) == (0.75, b"")
    np.testing.assert_array_equal(most.x, [[3, 1]])
    assert isinstance(done, Samples)
    np.testing.assert_array_equal(done.x, IMAGES)
    assert (done.seeds.tolist(), done.labels.tolist(), done.version) == ([5, 6], [-1, 3], 2)
    assert script.said == {"n": 2, "seed": 1, "format": "npy", "stream": True}


@pytest.mark.parametrize(
    "broken",
    [
        stream(HALF, promised=100),
        stream(HALF),
        stream(HALF, event("problem", {"status": 503, "detail": "the replica leaves"})),
        problem(429),
    ],
)
def test_a_broken_stream_goes_on_where_it_was(broken: Answer, script: Script, client: Client) -> None:
    script.say(broken, stream(HALF, MOST, DONE))
    shares = [event.share if isinstance(event, Preview) else 1 for event in client.stream("m")]
    assert shares == [0.5, 0.75, 1]
    assert script.asked[0].body["seed"] == script.asked[1].body["seed"]


def test_a_problem_ends_a_stream(script: Script, client: Client) -> None:
    script.say(stream(HALF, event("problem", {"status": 504, "detail": "There is no answer after 9 s."})))
    events = client.stream("m")
    assert isinstance(next(events), Preview)
    with pytest.raises(ServerProblem, match="There is no answer after 9 s") as error:
        next(events)
    assert error.value.status == 504
    assert len(script.asked) == 1
