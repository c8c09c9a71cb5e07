"""The client against a server on a real socket that answers, refuses and breaks off from a script."""

import base64
import io
import json
import pickle
import threading
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
from gdl_ray.family import DataSpec
from serve import encoding, requests

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
    lasts_s: float = 0.0
    """How long it takes, by the client's clock, until the answer begins and between any two of its bytes."""
    hangs: bool = False
    """Whether the connection stays open, and silent, before what is promised."""


@dataclass
class Asked:
    """A request that came in."""

    method: str
    path: str
    headers: dict[str, str]
    body: Any


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


class Clock:
    """The client's time, which goes on only as it sleeps, or as it is told."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.pauses_s: list[float] = []

    def monotonic(self) -> float:
        return self.now_s

    time = monotonic

    def sleep(self, seconds: float) -> None:
        self.pauses_s.append(seconds)
        self.now_s += seconds


@pytest.fixture
def script() -> Script:
    return Script()


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture
def url(script: Script, clock: Clock) -> Iterator[str]:
    over = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_one(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            headers = {name.lower(): value for name, value in self.headers.items()}
            asked = json.loads(body) if body else None
            script.asked.append(Asked(self.command, self.path, headers, asked))
            self.answer(script.answers.pop(0) if len(script.answers) > 1 else script.answers[0])

        def answer(self, answer: Answer) -> None:
            content = (
                answer.content if isinstance(answer.content, bytes) else json.dumps(answer.content).encode()
            )
            clock.now_s += answer.lasts_s
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
            parts = [content[i : i + 1] for i in range(len(content))] if answer.lasts_s else [content]
            try:
                for i, part in enumerate(parts):
                    clock.now_s += answer.lasts_s if i else 0
                    self.wfile.write(part)
            except OSError:  # the client has had enough
                self.close_connection = True
            if answer.hangs:
                over.wait()

        do_GET = do_POST = handle_one  # noqa: N815

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    over.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    with Client(url, timeout_s=10) as client:
        yield client


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the key of whoever runs the tests."""
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
    assert script.last.body["timeout_s"] == 9.5  # the server's own words come before our patience ends


def test_each_sample_may_have_its_own_seed_and_label(script: Script, client: Client) -> None:
    script.say(images())
    client.sample("m@3", seeds=np.array([5, 2**53 - 1]), labels=[0, 9], guidance=1.5, steps=9)
    assert script.last.path == "/v1/models/m@3/sample"
    assert script.said == {
        **{"seeds": [5, 2**53 - 1], "labels": [0, 9], "format": "npy"},
        **{"guidance": 1.5, "steps": 9},
    }


X = np.zeros((2, 1, 2, 2), np.uint8)
Z = np.array([[0.5, -1.0], [2.0, 3.0]])
SPEC = DataSpec(name="toy", kind="image", shape=(1, 8, 8), levels=17, classes=10)
ORIGIN = encoding.Samples(
    IMAGES, "m", 4, None, np.array([11, 2**53 - 1]), np.array([-1, 3]), {"guidance": 2.0, "steps": 9.0}
)


def test_draw_tells_what_makes_a_sample_again(script: Script, client: Client) -> None:
    """Both ends are held to the server's own words: its npz, and its reading of the request."""
    script.say(Answer(encoding.encode(ORIGIN, "npz", SPEC.levels)), images())
    drawn = client.draw("m", n=2)
    np.testing.assert_array_equal(drawn.x, IMAGES)
    assert (drawn.seeds.tolist(), drawn.labels.tolist()) == ([11, 2**53 - 1], [-1, 3])
    assert (drawn.version, drawn.options) == (4, {"guidance": 2.0, "steps": 9.0})
    assert script.said["format"] == "npz"

    client.sample(f"m@{drawn.version}", seeds=drawn.seeds, labels=drawn.labels, **drawn.options)
    assert script.last.path == "/v1/models/m@4/sample"
    asked = requests.parse(requests.SampleRequest, json.dumps(script.last.body).encode())
    again = requests.draw_of(asked, SPEC)
    assert again.seeds.tolist() == drawn.seeds.tolist()
    assert again.labels.tolist() == drawn.labels.tolist()
    assert asked.options == drawn.options

    client.sample("m", seeds=drawn.seeds[:1], label=drawn.labels[0])  # one alone, by its own label
    assert script.said == {"seeds": [11], "format": "npy"}
    client.sample("m", seeds=drawn.seeds[1:], label=drawn.labels[1])
    assert script.said == {"seeds": [2**53 - 1], "label": 3, "format": "npy"}


@pytest.mark.parametrize(
    ("operation", "call"),
    [
        (requests.LikelihoodRequest, lambda client, labels: client.log_likelihood("m", X, labels)),
        (requests.EncodeRequest, lambda client, labels: client.encode("m", X, labels)),
        (requests.DecodeRequest, lambda client, labels: client.decode("m", Z, labels)),
        (requests.CompleteRequest, lambda client, labels: client.complete("m", X, X == 0, labels=labels)),
    ],
    ids=["log_likelihood", "encode", "decode", "complete"],
)
def test_every_operation_says_any_as_the_server_reads_it(
    operation: Any, call: Callable[[Client, Any], Any], script: Script, client: Client
) -> None:
    script.say(problem(400))
    with pytest.raises(ServerProblem):
        call(client, np.array([-1, 3]))
    asked = requests.parse(operation, json.dumps(script.last.body).encode())
    assert requests.labels_of(asked.labels, 2, SPEC).tolist() == [-1, 3]


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (
            lambda client: client.sample("m", stream=True),
            "stream=True is no option of a model: call Client.stream",
        ),
        (lambda client: client.draw("m", timeout_s=5), "timeout_s=5 is no .*: give it to Client"),
        (lambda client: client.stream("m", format="png"), "format='png' is no .*: what comes is arrays"),
        (lambda client: client.complete("m", X, X == 0, label=3), "label=3 is no .*: give labels, one for"),
    ],
)
def test_a_field_that_is_no_option_is_refused(
    call: Callable[[Client], Any], told: str, script: Script, client: Client
) -> None:
    with pytest.raises(TypeError, match=told):
        call(client)
    assert not script.asked


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


def test_pauses_grow_and_have_an_end(script: Script, url: str, clock: Clock) -> None:
    script.say(problem(503))
    with Client(url, retries=7) as client, pytest.raises(ServerProblem, match="not now"):
        client.models()
    assert len(script.asked) == 8
    for pause_s, longest_s in zip(clock.pauses_s, (0.25, 0.5, 1, 2, 4, 8, 8), strict=True):
        assert longest_s / 2 <= pause_s <= longest_s


@pytest.mark.parametrize("after", ["2", formatdate(1002, usegmt=True)])  # the clock says 1000
def test_a_server_that_names_a_time_is_heeded(
    after: str, script: Script, client: Client, clock: Clock
) -> None:
    script.say(problem(429, Retry_After=after), images())
    client.sample("m", n=2)
    assert 2 < clock.pauses_s[0] <= 2.25


@pytest.mark.parametrize("after", ["soon", "-3", "Fri, 99 Nov 2026", "\u0661"])
def test_a_time_that_is_no_sense_is_passed_over(
    after: str, script: Script, client: Client, clock: Clock
) -> None:
    script.say(problem(429, Retry_After=after.encode().decode("latin-1")), images())
    client.sample("m", n=2)
    assert clock.pauses_s[0] <= 0.25


def test_no_time_is_waited_that_there_is_not(script: Script, url: str, clock: Clock) -> None:
    script.say(problem(503, Retry_After="30"))
    with Client(url, timeout_s=5) as client, pytest.raises(ServerProblem, match="not now") as error:
        client.models()
    assert not clock.pauses_s
    assert error.value.retry_after_s == 30


def test_an_answer_that_trickles_in_is_given_up(script: Script, url: str) -> None:
    script.say(images(lasts_s=0.1))
    with Client(url, timeout_s=5) as client, pytest.raises(httpx.ReadTimeout, match="took too long"):
        client.sample("m")
    assert len(script.asked) == 1


def test_an_answer_that_is_in_time_to_its_last_byte_is_taken(script: Script, url: str) -> None:
    script.say(images(lasts_s=0.01))
    with Client(url, timeout_s=5) as client:
        np.testing.assert_array_equal(client.sample("m"), IMAGES)


def test_an_answer_that_hangs_is_cut_when_its_time_is_over(
    script: Script, url: str, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not when as much time has passed since its last byte."""
    cuts_s = []

    class Timer(threading.Timer):
        """Time flies: what is to be done in seconds is done at once."""

        def start(self) -> None:
            cuts_s.append(self.interval)
            clock.now_s += self.interval
            self.interval = 0
            super().start()

    monkeypatch.setattr(module, "Timer", Timer)
    script.say(Answer(b"x", lasts_s=4, promised=9, hangs=True))
    with Client(url, timeout_s=600) as client, pytest.raises(httpx.ReadTimeout, match="took too long"):
        client.models()
    assert len(script.asked) == 1
    assert cuts_s[0] == 596


def test_each_phase_of_a_request_has_what_is_left(clock: Clock) -> None:
    patience = module._Patience(10, 0)
    assert patience.get("connect") == 10
    clock.now_s += 7
    assert patience.get("read") == 3


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
        **ORIGIN.origin,
        "media_type": "application/x-npy",
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
    assert (done.seeds.tolist(), done.labels.tolist()) == ([11, 2**53 - 1], [-1, 3])
    assert (done.version, done.options) == (4, {"guidance": 2.0, "steps": 9.0})
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


def test_who_looks_long_at_a_preview_loses_nothing(script: Script, client: Client, clock: Clock) -> None:
    script.say(stream(HALF, MOST, DONE))
    events = client.stream("m", n=2)
    for _ in range(2):
        assert isinstance(next(events), Preview)
        clock.now_s += 3600
    assert isinstance(next(events), Samples)
    assert len(script.asked) == 1


def test_a_problem_ends_a_stream(script: Script, client: Client) -> None:
    script.say(stream(HALF, event("problem", {"status": 504, "detail": "There is no answer after 9 s."})))
    events = client.stream("m")
    assert isinstance(next(events), Preview)
    with pytest.raises(ServerProblem, match="There is no answer after 9 s") as error:
        next(events)
    assert error.value.status == 504
    assert len(script.asked) == 1
