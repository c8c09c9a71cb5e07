"""The HTTP client: what served models draw, complete, encode and judge, as numpy arrays.

    from gdl_ray.client import Client

    client = Client("http://127.0.0.1:8000")
    images = client.sample("digits-vae", n=16, seed=7)     # uint8 (16, 1, 8, 8)
    drawn = client.draw("digits-vae@2", n=16)              # with all that it takes to draw two of them again:
    client.sample("digits-vae@2", seeds=drawn.seeds[3:5], labels=drawn.labels[3:5], **drawn.options)

A request that is asked twice is answered alike, for the client chooses the seed where none is given. So what
fails on the way, or meets a busy server, is asked again until the time is over.
"""

import base64
import email.utils
import io
import json
import os
import random
import secrets
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from threading import Timer
from types import TracebackType
from typing import Any, TypeVar
from urllib.parse import quote

import httpx
import numpy as np
from numpy.typing import NDArray

MAX_SEED = 2**53 - 1
"""Largest seed: the integers that JSON numbers hold exactly."""

_FIRST_PAUSE_S = 0.25
_LONGEST_PAUSE_S = 8.0
_LONGEST_ANSWER_S = 600.0  # that a server may be asked to work on
_PROBLEM = "application/problem+json"
_BUSY = (429, 503)
_NOT_REACHED = (502, 504)  # as a proxy says; the server's own 504 says that the time is over
_OPTION = "option_"  # begins the names of options in an npz file
_WHOLE_BYTES = 2**24  # read at once, where nobody looks at the parts
_RESERVED = {
    "format": "what comes is arrays",
    "label": "give labels, one for each example",
    "stream": "call Client.stream",
    "timeout_s": "give it to Client",
}
"""Fields of a request that are no options, and what to do instead."""

Part = TypeVar("Part")
Array = NDArray[Any]
Numbers = Sequence[int] | NDArray[np.integer[Any]]


class ServerProblem(Exception):  # noqa: N818  (the RFC's word)
    """The server answered with an error; the message says what is wrong and what to do."""

    def __init__(self, status: int, detail: str, passing: bool = False, retry_after_s: float = 0.0) -> None:
        super().__init__(detail)
        self.status = status
        """The HTTP status."""
        self.passing = passing
        """Whether the same request may be answered later."""
        self.retry_after_s = retry_after_s
        """Seconds that the server asks to wait before."""


@dataclass(frozen=True, slots=True)
class Samples:
    """Samples, and what it takes to draw any of them again."""

    x: Array
    """Images, uint8 (n, C, H, W), or tokens, int64 (n, T), in [0, levels - 1]."""
    seeds: NDArray[np.int64]
    """Of each sample, (n,)."""
    labels: NDArray[np.int64]
    """Class of each, (n,); -1 for any."""
    version: int
    """The model's version that drew them."""
    options: dict[str, Any]  # of floats; by type checkers' rules, those could not be given on as **options
    """A value of each option that the model has."""


@dataclass(frozen=True, slots=True)
class Preview:
    """Samples on their way."""

    share: float
    """Of the way, in (0, 1)."""
    png: bytes
    """A picture of them all; empty where they are no images of 1 or 3 channels."""
    x: Array | None
    """Their values, where there is no picture."""


class Client:
    """Talks to a gdl_ray server; one client may be shared by threads.

    Models are named as `digits-vae` (the champion answers), `digits-vae@3` (a version) or `digits-vae@next`
    (an alias). Every operation raises ServerProblem where the server refuses, and httpx.TransportError where
    it does not answer, after `retries` more tries or `timeout_s`, whichever is over first.

    Args:
        url: where the server listens, such as http://127.0.0.1:8000.
        key: what opens it, where it asks for one; from the environment, GDL_RAY_KEY, if None.
        timeout_s: longest wait for an answer, all tries together, in seconds.
        retries: how often a request that fails in passing is sent again.
    """

    def __init__(self, url: str, key: str | None = None, timeout_s: float = 60.0, retries: int = 4) -> None:
        key = os.environ.get("GDL_RAY_KEY", "") if key is None else key
        self._http = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"} if key else {})
        self._timeout_s = timeout_s
        self._retries = retries

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def models(self) -> list[dict[str, Any]]:
        """List the models: name, version, what they are measured to be."""
        listed: list[dict[str, Any]] = json.loads(self._ask("/v1/models"))["models"]
        return listed

    def card(self, model: str) -> dict[str, Any]:
        """Describe a model: what it is, what it can do, its options and their ranges."""
        card: dict[str, Any] = json.loads(self._ask(_path(model)))
        return card

    def sample(
        self,
        model: str,
        n: int | None = None,
        seed: int | None = None,
        label: int | None = None,
        *,
        seeds: Numbers | None = None,
        labels: Numbers | None = None,
        **options: float,
    ) -> Array:
        """Draw samples.

        Args:
            model: one that `models` lists.
            n: how many; as many as seeds or labels if None, else 16.
            seed: in [0, MAX_SEED]; the same seed and model version give the same samples. Random if None.
            label: the class to draw; any if None or below 0.
            seeds: one for each sample instead of `seed`, such as those that `draw` told.
            labels: a class for each sample instead of `label`; any where it is below 0, as `draw` tells it.
            options: options of the model, such as guidance=2 or steps=50; its card lists them.

        Returns:
            Images, uint8 (n, C, H, W), or tokens, int64 (n, T), in [0, levels - 1].
        """
        asked = _drawing(n=n, seed=seed, label=label, seeds=seeds, labels=labels, options=options)
        return _array(self._ask(_path(model, "sample"), {**asked, "format": "npy"}))

    def draw(
        self,
        model: str,
        n: int | None = None,
        seed: int | None = None,
        label: int | None = None,
        *,
        seeds: Numbers | None = None,
        labels: Numbers | None = None,
        **options: float,
    ) -> Samples:
        """Draw samples as `sample` does, and tell what it takes to draw any of them again."""
        asked = _drawing(n=n, seed=seed, label=label, seeds=seeds, labels=labels, options=options)
        content = self._ask(_path(model, "sample"), {**asked, "format": "npz"})
        with np.load(io.BytesIO(content), allow_pickle=False) as drawn:
            named = {name.removeprefix(_OPTION): name for name in drawn.files if name.startswith(_OPTION)}
            options = {option: float(drawn[name]) for option, name in named.items()}
            return Samples(drawn["samples"], drawn["seeds"], drawn["labels"], int(drawn["version"]), options)

    def stream(
        self,
        model: str,
        n: int | None = None,
        seed: int | None = None,
        label: int | None = None,
        *,
        seeds: Numbers | None = None,
        labels: Numbers | None = None,
        **options: float,
    ) -> Iterator[Preview | Samples]:
        """Draw samples as `draw` does, and show them on their way: previews come first, the samples last."""
        asked = _drawing(n=n, seed=seed, label=label, seeds=seeds, labels=labels, options=options)
        return self._events(_path(model, "sample"), {**asked, "format": "npy", "stream": True})

    def complete(
        self,
        model: str,
        x: Array,
        known: NDArray[np.bool_],
        n: int = 1,
        seed: int | None = None,
        *,
        seeds: Numbers | None = None,
        labels: Numbers | None = None,
        **options: float,
    ) -> Array:
        """Draw what is not known of examples.

        Args:
            model: one that can.
            x: integers (B, C, H, W) or (B, T) in [0, levels - 1]; unknown values are not read.
            known: what is known: the shape of one example, for all, or of x.
            n: how many completions of each example.
            seed: as in `sample`.
            seeds: one for each completion, (B * n,), instead of `seed`.
            labels: class of each example, (B,); any where it is below 0, as in all that follows.
            options: options of the model.

        Returns:
            Completed examples, (B * n, ...) as x; those of an example follow each other.
        """
        asked = _drawing(n=n, seed=seed, seeds=seeds, labels=labels, options=options)
        examples = {"x": x.tolist(), "known": known.tolist(), "format": "npy"}
        return _array(self._ask(_path(model, "complete"), asked | examples))

    def log_likelihood(
        self, model: str, x: Array, labels: Numbers | None = None, samples: int = 1, seed: int = 0
    ) -> NDArray[np.float64]:
        """Compute log p(x), or log p(x | label).

        Args:
            model: one that has a likelihood.
            x: integers (B, C, H, W) or (B, T) in [0, levels - 1].
            labels: classes, (B,).
            samples: Monte-Carlo samples per example; more tighten a bound or an estimate.
            seed: decides the noise, in [0, MAX_SEED].

        Returns:
            Nats per example, (B,); the model's card says whether they are exact, a bound or an estimate.
        """
        asked = {"x": x.tolist(), "labels": _classes(labels), "samples": samples, "seed": seed}
        return np.array(json.loads(self._ask(_path(model, "log_likelihood"), asked))["nats"])

    def classify(self, model: str, x: Array, samples: int = 1, seed: int = 0) -> NDArray[np.float64]:
        """Compute p(class | x) by Bayes' rule; arguments as in `log_likelihood`.

        Returns:
            Probabilities, (B, classes).
        """
        asked = {"x": x.tolist(), "samples": samples, "seed": seed}
        return np.array(json.loads(self._ask(_path(model, "classify"), asked))["probabilities"])

    def encode(self, model: str, x: Array, labels: Numbers | None = None) -> NDArray[np.float64]:
        """Map examples, (B, C, H, W), and their classes, (B,), to latents, (B, D)."""
        asked = {"x": x.tolist(), "labels": _classes(labels)}
        return np.array(json.loads(self._ask(_path(model, "encode"), asked))["z"])

    def decode(self, model: str, z: NDArray[np.floating[Any]], labels: Numbers | None = None) -> Array:
        """Map latents, (B, D), and the classes of what they stand for, (B,), to examples as of `sample`."""
        asked = {"z": z.tolist(), "labels": _classes(labels), "format": "npy"}
        return _array(self._ask(_path(model, "decode"), asked))

    def interpolate(
        self, model: str, start: Array, end: Array, steps: int = 8, label: int | None = None
    ) -> Array:
        """Go from one example to another through the latent space.

        Args:
            model: one that has latents.
            start: integers (C, H, W) in [0, levels - 1], or a latent, floats (D,).
            end: the same of the other.
            steps: how many on the way, both ends among them: from 2 to 64.
            label: the class on the way; any if None or below 0.

        Returns:
            Examples as of `sample`, (steps, ...).
        """
        ends = np.stack([start, end])
        asked = {
            "z" if np.issubdtype(ends.dtype, np.floating) else "x": ends.tolist(),
            "steps": steps,
            "label": _class(label),
            "format": "npy",
        }
        return _array(self._ask(_path(model, "interpolate"), asked))

    def _ask(self, path: str, body: Mapping[str, Any] | None = None) -> bytes:
        """Send a request, again where it fails in passing; returns the answer's body."""
        patience = _Patience(self._timeout_s, self._retries)
        while True:
            try:
                with self._send(path, body, patience) as response:
                    return b"".join(patience.heeded(response, response.iter_bytes(_WHOLE_BYTES)))
            except (ServerProblem, httpx.TransportError) as error:
                patience.wait(error)

    def _events(self, path: str, body: Mapping[str, Any]) -> Iterator[Preview | Samples]:
        """Send a request for a stream, again where it breaks; what was shown before is not shown again."""
        patience = _Patience(self._timeout_s, self._retries)
        shown = 0.0
        while True:
            try:
                with self._send(path, body, patience) as response:
                    for event in _parsed(patience.heeded(response, response.iter_lines())):
                        if isinstance(event, Preview) and event.share <= shown:
                            continue
                        yield event
                        if isinstance(event, Samples):
                            return
                        shown = event.share
                raise httpx.RemoteProtocolError("the stream ended before its samples came")
            except (ServerProblem, httpx.TransportError) as error:
                patience.wait(error)

    @contextmanager
    def _send(
        self, path: str, body: Mapping[str, Any] | None, patience: "_Patience"
    ) -> Iterator[httpx.Response]:
        """Send a request once; yields the answer, its body not yet read."""
        method, asked = ("GET", None) if body is None else ("POST", _asked(body, patience.left_s))
        with self._http.stream(method, path, json=asked, extensions={"timeout": patience}) as response:
            if not response.is_success:
                content = b"".join(patience.heeded(response, response.iter_bytes(_WHOLE_BYTES)))
                raise _problem(response, content)
            yield response


class _Patience:
    """How long to go on with a request, and when to try again.

    Args:
        limit_s: seconds that all tries may take together.
        retries: tries after the first.
    """

    def __init__(self, limit_s: float, retries: int) -> None:
        self._deadline = time.monotonic() + limit_s
        self._retries = retries
        self._failures = 0

    @property
    def left_s(self) -> float:
        """Seconds left, above 0."""
        return max(self._deadline - time.monotonic(), 1e-3)

    def get(self, phase: str, default: object = None) -> float:
        """Tell httpx how long a phase of the exchange may take: it asks when one begins, as of a dict."""
        return self.left_s

    def heeded(self, response: httpx.Response, parts: Iterator[Part]) -> Iterator[Part]:
        """Yield the parts of an answer while there is time; what the caller takes with them does not count.

        Raises:
            httpx.ReadTimeout: the time is over.
            httpx.TransportError: the connection broke before.
        """
        while (part := self._next(response, parts)) is not None:
            begin = time.monotonic()
            yield part
            self._deadline += time.monotonic() - begin

    def _next(self, response: httpx.Response, parts: Iterator[Part]) -> Part | None:
        """Read a part; None if there is no more."""
        # httpx would allow each read of a body what was left when the first began.
        cut = Timer(self.left_s, _cut, [response])
        cut.start()
        part = None
        try:
            part = next(parts, None)
        except httpx.TransportError:
            if time.monotonic() < self._deadline:
                raise
        finally:
            cut.cancel()
        if time.monotonic() >= self._deadline:
            raise httpx.ReadTimeout("the answer took too long")
        return part

    def wait(self, error: ServerProblem | httpx.TransportError) -> None:
        """Wait until it is time to try again.

        Raises:
            ServerProblem: this one, if there is no hope.
            httpx.TransportError: likewise.
        """
        self._failures += 1
        pause_s = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2 ** (self._failures - 1))
        pause_s *= random.uniform(0.5, 1)  # noqa: S311  # so that not all who were refused come back at once
        if isinstance(error, ServerProblem):
            pause_s += error.retry_after_s
            if not error.passing:
                raise error
        if self._failures > self._retries or time.monotonic() + pause_s >= self._deadline:
            raise error
        time.sleep(pause_s)


def _cut(response: httpx.Response) -> None:
    """Break a connection off, so that who reads from it need not wait any longer."""
    with suppress(OSError):  # it is closed
        response.extensions["network_stream"].get_extra_info("socket").shutdown(socket.SHUT_RDWR)


def _path(model: str, operation: str = "") -> str:
    """Name the path of a model, or of one of its operations."""
    path = f"/v1/models/{quote(model, safe='@')}"
    return f"{path}/{operation}" if operation else path


def _drawing(
    *,
    n: int | None = None,
    seed: int | None = None,
    label: int | None = None,
    seeds: Numbers | None = None,
    labels: Numbers | None = None,
    options: Mapping[str, float],
) -> dict[str, Any]:
    """Make what all requests for samples say; with a seed in any case, so that each try draws the same.

    Raises:
        TypeError: an option has the name of another field.
    """
    for name in options.keys() & _RESERVED.keys():
        raise TypeError(f"{name}={options[name]!r} is no option of a model: {_RESERVED[name]}")
    if seed is None and seeds is None:
        seed = secrets.randbelow(MAX_SEED + 1)
    asked = {"n": n, "seed": seed, "label": _class(label), "labels": _classes(labels)}
    listed = None if seeds is None else [int(each) for each in seeds]
    return {**options, **asked, "seeds": listed}


def _class(label: int | None) -> int | None:
    """Say a class as the server has it: None for any, which is -1 in arrays."""
    return None if label is None or label < 0 else int(label)


def _classes(labels: Numbers | None) -> list[int | None] | None:
    return None if labels is None else [_class(label) for label in labels]


def _asked(body: Mapping[str, Any], left_s: float) -> dict[str, Any]:
    """Leave out what is not said, and let the server give up a little before we do, to hear why."""
    said = {name: value for name, value in body.items() if value is not None}
    return {**said, "timeout_s": min(_LONGEST_ANSWER_S, round(0.95 * left_s, 3))}


def _array(content: bytes) -> Array:
    array: Array = np.load(io.BytesIO(content), allow_pickle=False)
    return array


def _problem(response: httpx.Response, content: bytes) -> ServerProblem:
    """Turn an error and what it says into its exception."""
    status = response.status_code
    after_s = _seconds(response.headers.get("retry-after", ""))
    if response.headers.get("content-type", "").startswith(_PROBLEM):
        told = json.loads(content)
        detail = told.get("detail") or told.get("title") or response.reason_phrase
        return ServerProblem(status, detail, status in _BUSY, after_s)
    detail = f"{response.url} answered {status} {response.reason_phrase}"
    return ServerProblem(status, detail, status in _BUSY + _NOT_REACHED, after_s)


def _seconds(retry_after: str) -> float:
    """Read a Retry-After header: seconds, or a date."""
    if retry_after.isascii() and retry_after.isdigit():
        return float(retry_after)
    try:
        date = email.utils.parsedate_to_datetime(retry_after)
    except ValueError:
        return 0.0
    return max(0.0, date.timestamp() - time.time())


def _parsed(lines: Iterator[str]) -> Iterator[Preview | Samples]:
    """Read the events of a stream.

    Raises:
        ServerProblem: one of them is a problem.

    References:
        WHATWG. HTML Living Standard, 9.2 Server-sent events. https://html.spec.whatwg.org
    """
    name, data = "", ""
    for line in lines:
        field, _, value = line.partition(": ")
        if field == "event":
            name = value
        elif field == "data":
            data += value
        elif not line and data:
            yield _event(name, json.loads(data))
            name, data = "", ""


def _event(name: str, told: Mapping[str, Any]) -> Preview | Samples:
    if name == "problem":
        raise ServerProblem(told["status"], told["detail"], told["status"] in _BUSY)
    if name == "preview":
        picture = told.get("png")
        x = None if picture else np.array(told["samples"])
        return Preview(told["share"], base64.b64decode(picture or ""), x)
    labels = [-1 if label is None else label for label in told["labels"]]
    x = _array(base64.b64decode(told["content"]))
    return Samples(x, np.array(told["seeds"]), np.array(labels), told["version"], told["options"])
