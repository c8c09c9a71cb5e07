"""What may be asked of a model: each operation reads its body, does the work and answers.

`sample` and `complete` are drawn by the model's engines, where requests share every step. The others are
computed a batch at a time on one thread, in turns with each other.
"""

import asyncio
import base64
import json
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import numpy as np
import torch
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send
from torch import Tensor

from gdl_ray.engine import LIKELIHOOD, Engine, Job, Preview, QueueFull, keys_of, seeds_of
from gdl_ray.evaluate.bayes import log_posterior
from gdl_ray.evaluate.interpret import arc
from gdl_ray.family import UNLABELLED, Batch, Decoder, Latent, Likelihood
from gdl_ray.images import png_grid
from serve import requests
from serve.encoding import MEDIA_TYPES, Format, Samples, encode, finite, formats
from serve.keys import Caller, Keyring
from serve.metrics import Meter
from serve.model import Model
from serve.problems import Problem, busy, too_late, wrong

MAX_WAIT_S = 10.0
"""Longest wait for a slot, as estimated, that a request is let into; more would be waiting for nothing."""
MAX_HELD = 8
"""Most requests that the thread for inference holds at a time."""
BATCH = 256
"""Most examples that it takes at a time, which bounds memory, and how long others wait."""
PREVIEWS = 10
"""Most previews of one stream."""

log = logging.getLogger(__name__)


class Inference:
    """One thread for what is not sampling: requests take turns on it, a batch each."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "inference")
        self._held = 0

    @contextmanager
    def place(self) -> Iterator[None]:
        """Hold a place among the requests that wait.

        Raises:
            Problem: 429, all are taken.
        """
        if self._held >= MAX_HELD:
            raise busy(f"{self._held} requests for inference wait already. Try again in a second.")
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1

    async def map(self, function: Callable[..., Tensor], size: int, *columns: Tensor) -> Tensor:
        """Apply a function to so many rows of the columns at a time; gives up between two when cancelled."""
        loop = asyncio.get_running_loop()
        work = torch.no_grad()(function)
        batches = zip(*(torch.split(column, size) for column in columns), strict=True)
        return torch.cat([await loop.run_in_executor(self._thread, work, *batch) for batch in batches])


@dataclass(frozen=True, slots=True)
class Call:
    """A request to a model, and what its operation needs of the service."""

    model: Model
    accept: str
    caller: Caller
    client: str
    """Whose turn it is to get a slot."""
    keyring: Keyring
    meter: Meter
    inference: Inference
    told: dict[str, Any] = field(default_factory=dict)
    """What the audit log is told of the request."""


async def sample(call: Call, asked: requests.SampleRequest) -> Response:
    """Draw samples."""
    model = call.model
    requests.check_options(asked, model.engine.options)
    draw = requests.draw_of(asked, model.family.spec)
    return await _drawn(call, asked, draw, model.engine)


async def complete(call: Call, asked: requests.CompleteRequest) -> Response:
    """Draw what is not known of examples."""
    model = call.model
    engine = model.completing()
    requests.check_options(asked, engine.options)
    draw, x, known = await asyncio.to_thread(requests.completions_of, asked, model.family.spec)
    return await _drawn(call, asked, draw, engine, (x, known))


async def log_likelihood(call: Call, asked: requests.LikelihoodRequest) -> Response:
    """Compute log p(x), or log p(x | y)."""
    family = call.model.family
    assert isinstance(family, Likelihood)  # noqa: S101  (the application asks nothing else)
    x = await asyncio.to_thread(requests.examples, asked.x, family.spec)
    labels = requests.labels_of(asked.labels, len(x), family.spec)
    requests.check_draws(len(x), asked.samples)

    def work(*batch: Tensor) -> Tensor:
        return family.log_likelihood(Batch(*batch), asked.samples)

    noise = _noise(asked.seed, len(x))
    nats = (await _infer(call, work, x, labels, noise, draws=asked.samples)).tolist()
    return await _json(
        {
            **_name(call.model),
            "seed": asked.seed,
            "samples": asked.samples,
            "kind": family.likelihood_kind,
            "nats": nats,
            "bits_per_dim": [-family.spec.bits_per_dim(one) for one in nats],
        }
    )


async def classify(call: Call, asked: requests.ClassifyRequest) -> Response:
    """Compute p(y | x) by Bayes' rule, each class as likely as another before x is seen."""
    family = call.model.family
    assert isinstance(family, Likelihood)  # noqa: S101
    classes = family.spec.classes
    x = await asyncio.to_thread(requests.examples, asked.x, family.spec)
    requests.check_draws(len(x), asked.samples, classes)
    prior = torch.full((classes,), -math.log(classes))

    def work(*batch: Tensor) -> Tensor:
        return log_posterior(family, Batch(*batch), prior, asked.samples)

    unlabelled = torch.full((len(x),), UNLABELLED)
    noise = _noise(asked.seed, len(x))
    posterior = await _infer(call, work, x, unlabelled, noise, draws=asked.samples * classes)
    return await _json(
        {
            **_name(call.model),
            "seed": asked.seed,
            "samples": asked.samples,
            "labels": posterior.argmax(1).tolist(),
            "probabilities": posterior.exp().tolist(),
        }
    )


async def to_latents(call: Call, asked: requests.EncodeRequest) -> Response:
    """Map examples to latents."""
    family = call.model.family
    assert isinstance(family, Latent)  # noqa: S101
    x = await asyncio.to_thread(requests.examples, asked.x, family.spec)
    z = await _infer(call, family.encode, x, requests.labels_of(asked.labels, len(x), family.spec))
    return await _json({**_name(call.model), "z": z.tolist()})


async def from_latents(call: Call, asked: requests.DecodeRequest) -> Response:
    """Map latents to what they stand for."""
    spec = call.model.family.spec
    encoding = requests.format_of(asked.format, call.accept, spec)
    z = await asyncio.to_thread(requests.latents, asked.z)
    if len(z) > requests.MAX_SAMPLES:
        raise wrong("z", f"{len(z)} latents", f"Give at most {requests.MAX_SAMPLES}")
    labels = requests.labels_of(asked.labels, len(z), spec)
    return await _decoded(call, z, labels, encoding)


async def interpolate(call: Call, asked: requests.InterpolateRequest) -> Response:
    """Go from one example to another on an arc through the latent space."""
    family = call.model.family
    encoding = requests.format_of(asked.format, call.accept, family.spec)
    labels = requests.labels_of(None if asked.label is None else [asked.label] * 2, 2, family.spec)
    given = {name: len(value) for name, value in (("x", asked.x), ("z", asked.z)) if value is not None}
    if list(given.values()) != [2]:
        raise wrong("x", given, "Give two examples, x, or two latents, z, and not both")
    if asked.z is not None:
        ends = requests.latents(asked.z)
    elif isinstance(family, Latent):
        x = requests.examples(asked.x or [], family.spec)
        ends = await _infer(call, family.encode, x, labels)
    else:
        raise wrong("x", "two examples", f"{call.model.name} cannot encode; give two latents, z")
    way = arc(ends[:1].cpu(), ends[1:].cpu(), asked.steps)[:, 0]
    return await _decoded(call, way, labels[:1].expand(asked.steps), encoding)


OPERATIONS: Mapping[str, tuple[type[requests.Body], Callable[[Call, Any], Awaitable[Response]]]] = {
    "sample": (requests.SampleRequest, sample),
    "complete": (requests.CompleteRequest, complete),
    "log_likelihood": (requests.LikelihoodRequest, log_likelihood),
    "classify": (requests.ClassifyRequest, classify),
    "encode": (requests.EncodeRequest, to_latents),
    "decode": (requests.DecodeRequest, from_latents),
    "interpolate": (requests.InterpolateRequest, interpolate),
}
"""What is asked by each name, and what answers."""


async def _drawn(
    call: Call,
    asked: requests.Drawing,
    draw: requests.Draw,
    engine: Engine,
    given: tuple[Tensor, Tensor] | None = None,
) -> Response:
    """Answer with what an engine draws."""
    encoding = requests.format_of(asked.format, call.accept, call.model.family.spec)
    n = len(draw.seeds)
    call.told.update(n=n, seed=draw.seed)
    # The engine tells of previews on its own thread.
    queue: asyncio.Queue[Preview] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    streaming: dict[str, Any] = {}
    if asked.stream:
        streaming["previews"] = PREVIEWS
        streaming["on_preview"] = lambda preview: loop.call_soon_threadsafe(queue.put_nowait, preview)
    try:
        job = engine.submit(
            draw.seeds,
            draw.labels,
            asked.options,
            client=call.client,
            given=given,
            most_wait_s=MAX_WAIT_S,
            **streaming,
        )
    except QueueFull as full:
        raise busy(f"{full}.", retry_after_s=_whole(full.wait_s - MAX_WAIT_S / 2)) from None
    drawing = _Drawing(call, draw, job, encoding, asked.timeout_s)
    try:
        call.keyring.charge(call.caller, n)
    except Problem:
        job.cancel()
        raise
    if asked.stream:
        return _Stream(drawing, queue)
    samples = await drawing.result()
    content = await drawing.encoded(samples)
    return Response(content, headers=samples.headers, media_type=MEDIA_TYPES[encoding])


class _Stream(StreamingResponse):
    """Server-sent events; the samples are given up when it ends, even before it has begun."""

    def __init__(self, drawing: "_Drawing", queue: "asyncio.Queue[Preview]") -> None:
        unbuffered = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(drawing.events(queue), media_type="text/event-stream", headers=unbuffered)
        self._job = drawing.job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send what happens as it does."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._job.cancel()


@dataclass(frozen=True, slots=True)
class _Drawing:
    """Samples under way for a request."""

    call: Call
    draw: requests.Draw
    job: Job
    encoding: Format
    timeout_s: float
    begin: float = field(default_factory=time.monotonic)

    async def result(self) -> Samples:
        """Wait for the samples; they are given up when the client is gone, or the time."""
        x = (await asyncio.wrap_future(self.job.future)).numpy()
        model, draw = self.call.model, self.draw
        self.call.meter.sampled(model.name, len(x))
        seeds, labels = draw.seeds.numpy(), draw.labels.numpy()
        return Samples(x, model.name, model.version, draw.seed, seeds, labels, self.job.options)

    async def encoded(self, samples: Samples) -> bytes:
        """Encode the samples; what takes long, on a thread."""
        work = (samples, self.encoding, self.call.model.family.spec.levels)
        if samples.x.size <= 2**16 and self.encoding not in ("png", "zip"):
            return encode(*work)
        return await asyncio.to_thread(encode, *work)

    async def events(self, queue: "asyncio.Queue[Preview]") -> AsyncIterator[bytes]:
        """Tell of the samples as they form, as server-sent events."""
        result = asyncio.ensure_future(self.result())
        first = True
        try:
            async with within(self.timeout_s - (time.monotonic() - self.begin)):
                async for preview in _until(result, queue):
                    yield await asyncio.to_thread(self._previewed, preview)
                    if first:
                        self.call.meter.previewed(self.call.model.name, time.monotonic() - self.begin)
                    first = False
                yield await asyncio.to_thread(self._told, await result)
        except Exception as error:
            yield self._failed(error)
        finally:
            result.cancel()

    def _failed(self, error: Exception) -> bytes:
        """Tell of what ends a stream: its status is long sent."""
        if not isinstance(error, Problem):
            log.error("a stream failed", exc_info=error)
            detail = "The request was fine, the server is not; its log says why."
            error = Problem(HTTPStatus.INTERNAL_SERVER_ERROR, "server-error", detail)
        self.call.told["problem"] = error.kind
        return f"event: problem\ndata: {error.json()}\n\n".encode()

    def _previewed(self, preview: Preview) -> bytes:
        spec, x = self.call.model.family.spec, preview.samples
        if "png" in formats(spec):
            png = base64.b64encode(png_grid(x, spec.levels)).decode()
            return _event("preview", {"share": preview.share, "png": png})
        return _event("preview", {"share": preview.share, "samples": x.tolist()})

    def _told(self, samples: Samples) -> bytes:
        if self.encoding == "json":
            return _event("samples", {**samples.origin, "samples": samples.x.tolist()})
        content = encode(samples, self.encoding, self.call.model.family.spec.levels)
        told = {"media_type": MEDIA_TYPES[self.encoding], "content": base64.b64encode(content).decode()}
        return _event("samples", {**samples.origin, **told})


async def _until(
    result: "asyncio.Future[Samples]", queue: "asyncio.Queue[Preview]"
) -> AsyncIterator[Preview]:
    """Yield previews until the result is there; of those that wait, the last."""
    while not result.done():
        waiting = asyncio.ensure_future(queue.get())
        either: set[asyncio.Future[Any]] = {result, waiting}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            waiting.cancel()
            return
        preview = waiting.result()
        while not queue.empty():
            preview = queue.get_nowait()
        yield preview


def _event(name: str, data: Mapping[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()


async def _decoded(call: Call, z: Tensor, labels: Tensor, encoding: Format) -> Response:
    """Answer with what latents stand for."""
    family = call.model.family
    assert isinstance(family, Decoder)  # noqa: S101
    if z.shape[1] != family.latent_dims:
        raise wrong("z", f"{z.shape[1]} numbers each", f"Give {family.latent_dims}")
    x = (await _infer(call, family.decode, z, labels)).cpu().numpy()
    samples = Samples(x, call.model.name, call.model.version, None, None, labels.numpy().astype(np.int64), {})
    content = await asyncio.to_thread(encode, samples, encoding, family.spec.levels)
    return Response(content, headers=samples.headers, media_type=MEDIA_TYPES[encoding])


async def _infer(call: Call, work: Callable[..., Tensor], *columns: Tensor, draws: int = 1) -> Tensor:
    """Compute on the thread for inference, on the model's device; each row costs so many draws."""
    device = next((p.device for p in call.model.family.parameters()), torch.device("cpu"))
    call.told.update(n=len(columns[0]))
    call.keyring.charge(call.caller, len(columns[0]))
    with call.inference.place():
        size = max(1, BATCH // draws)
        return await call.inference.map(work, size, *(column.to(device) for column in columns))


async def _json(answer: Mapping[str, Any]) -> Response:
    """Write an answer on a thread: it may be long."""
    return await asyncio.to_thread(lambda: JSONResponse(finite(dict(answer))))


class within:  # noqa: N801  (as asyncio.timeout)
    """Gives a block so much time.

    Raises:
        Problem: 504, it is over.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s, self._timeout = timeout_s, asyncio.timeout(timeout_s)

    async def __aenter__(self) -> None:
        await self._timeout.__aenter__()

    async def __aexit__(self, *raised: Any) -> None:
        try:
            await self._timeout.__aexit__(*raised)
        except TimeoutError:
            raise too_late(self._timeout_s) from None


def _noise(seed: int, n: int) -> Tensor:
    return keys_of(seeds_of(seed, n), LIKELIHOOD)


def _name(model: Model) -> dict[str, Any]:
    return {"model": model.name, "version": model.version}


def _whole(seconds: float) -> int:
    return min(60, max(1, math.ceil(seconds)))
