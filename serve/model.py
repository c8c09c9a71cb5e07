"""The HTTP application of one model: `sample`, `log_likelihood` and the model's card, over an engine.

It is plain ASGI, so it runs and is tested without Ray.
"""

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from http import HTTPStatus
from typing import Any, get_args

import torch
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from gdl_ray.engine import LIKELIHOOD, Engine, QueueFull, request_keys, seeds_of
from gdl_ray.families import key_of
from gdl_ray.family import UNLABELLED, Batch, Completion, Decoder, Family, Latent, Likelihood
from serve import api

MAX_LIKELIHOODS = 8
"""Most likelihood requests that are held at a time; they are worked off one by one."""
LIKELIHOOD_BATCH = 256
"""Most examples of a request whose likelihoods are computed at a time, which bounds their memory."""

CAPABILITIES = (Likelihood, Decoder, Latent, Completion)
"""What a family may be able to do besides sampling."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Model:
    """One version of a registered model, ready to answer."""

    name: str
    version: int
    family: Family
    engine: Engine

    @property
    def formats(self) -> tuple[api.Format, ...]:
        """Encodings of its samples, the default first."""
        spec = self.family.spec
        drawable = spec.kind == "image" and spec.shape[0] in (1, 3)
        return tuple(known for known in get_args(api.Format) if drawable or known != "png")

    def card(self) -> dict[str, Any]:
        """Describe the model: what it is and what may be asked of it."""
        likelihood = self.family.likelihood_kind if isinstance(self.family, Likelihood) else None
        return {
            "name": self.name,
            "version": self.version,
            "family": key_of(self.family),
            "density": self.family.density,
            "likelihood": likelihood,
            "operations": ["sample", *(["log_likelihood"] if likelihood else [])],
            "capabilities": [kind.__name__.lower() for kind in CAPABILITIES if isinstance(self.family, kind)],
            "options": {name: asdict(option) for name, option in self.engine.options.items()},
            "formats": self.formats,
            "data": self.family.spec.to_json(),
            "limits": {
                "n": api.MAX_SAMPLES,
                "sample_body_bytes": api.SAMPLE_BODY_BYTES,
                "log_likelihood_draws": api.MAX_DRAWS,
                "log_likelihood_body_bytes": api.LIKELIHOOD_BODY_BYTES,
            },
            "load": asdict(self.engine.load),
        }


class ModelApp:
    """ASGI application at /v1/models/{name}.

    A request takes the model once, so that its answer comes from one version even while the version changes;
    and takes it after its body, because the engine of a version that was replaced is closed.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.model: Model | None = None
        self.failure: str | None = None
        """Why the wanted version is not the one that answers; None if it is."""
        self._operations: dict[str, tuple[str, Callable[[Request], Awaitable[Response]]]] = {
            "": ("GET", self._card),
            "/sample": ("POST", self._sample),
            "/log_likelihood": ("POST", self._log_likelihood),
        }
        # One thread: likelihoods take turns, and leave the processor to the engine.
        self._likelihood_thread = ThreadPoolExecutor(1, "log_likelihood")
        self._likelihoods = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
            return
        request = Request(scope, receive)
        try:
            response = await self._answer(request)
        except api.Problem as problem:
            response = problem.response()
        except Exception:
            log.exception("%s %s failed", request.method, request.url.path)
            detail = "The request was fine, the server is not; its log says why."
            response = api.Problem(HTTPStatus.INTERNAL_SERVER_ERROR, "server-error", detail).response()
        await response(scope, receive, send)

    async def _answer(self, request: Request) -> Response:
        path = request.scope["path"].removeprefix(request.scope.get("root_path", ""))
        operation = self._operations.get(path.rstrip("/"))
        if operation is None:
            raise api.unknown_path(request.scope["path"])
        method, handler = operation
        if request.method != method:
            raise api.wrong_method(request.method, method)
        return await handler(request)

    def _ready(self) -> Model:
        """Take the version that answers now."""
        if self.model is None:
            reason = self.failure or "the first is being loaded"
            detail = f"{self.name} has no version to answer with: {reason}."
            headers = {"Retry-After": "5"}
            raise api.Problem(HTTPStatus.SERVICE_UNAVAILABLE, "not-loaded", detail, headers=headers)
        return self.model

    async def _card(self, request: Request) -> Response:
        return JSONResponse({**self._ready().card(), "failure": self.failure})

    async def _sample(self, request: Request) -> Response:
        body = await api.read_body(request.stream(), api.SAMPLE_BODY_BYTES)
        model = self._ready()  # no await from here to `submit`: its engine could be closed meanwhile
        asked = api.parse(api.SampleRequest, body)
        spec = model.family.spec
        if asked.label is not None:
            api.check_labels([asked.label], spec.classes, "label")
        api.check_options(asked.options, model.engine.options)
        encoding = asked.format or api.accepted_format(request.headers.get("accept", "")) or model.formats[0]
        if encoding not in model.formats:
            cure = f"Ask for {', '.join(model.formats)}: these samples are not images of 1 or 3 channels"
            raise api.invalid(api.FieldProblem(field="format", value=encoding, cure=cure))
        seed = secrets.randbelow(api.MAX_SEED + 1) if asked.seed is None else asked.seed
        labels = torch.full((asked.n,), UNLABELLED if asked.label is None else asked.label)
        try:
            job = model.engine.submit(seeds_of(seed, asked.n), labels, asked.options)
        except QueueFull as full:
            raise api.busy(f"{full}. Try again in a second.") from None
        # Cancelled with the request when its client is gone, which frees its slots.
        samples = (await asyncio.wrap_future(job.future)).numpy()
        origin: dict[str, str | float | None] = {
            "model": model.name,
            "version": model.version,
            "seed": seed,
            "n": asked.n,
            "label": asked.label,
            **job.options,
        }
        if samples.size <= 2**16 and encoding != "png":
            content, media_type = api.encode(samples, encoding, spec.levels, origin)
        else:
            content, media_type = await asyncio.to_thread(api.encode, samples, encoding, spec.levels, origin)
        headers = {f"X-{name.title()}": f"{value}" for name, value in origin.items() if value is not None}
        return Response(content, headers=headers, media_type=media_type)

    async def _log_likelihood(self, request: Request) -> Response:
        body = await api.read_body(request.stream(), api.LIKELIHOOD_BODY_BYTES)
        model = self._ready()
        if self._likelihoods >= MAX_LIKELIHOODS:
            raise api.busy(f"{self._likelihoods} likelihood requests wait already. Try again in a second.")
        self._likelihoods += 1
        try:
            loop = asyncio.get_running_loop()
            result = await loop.run_in_executor(self._likelihood_thread, _log_likelihood, model, body)
        finally:
            self._likelihoods -= 1
        return JSONResponse(result)


def _log_likelihood(model: Model, body: bytes) -> dict[str, Any]:
    """Answer a likelihood request; a 16 MB body takes long enough to parse to be worth a thread."""
    asked = api.parse(api.LikelihoodRequest, body)
    family = model.family
    if not isinstance(family, Likelihood):
        detail = f"{model.name} is an implicit model: it draws samples but gives no likelihood."
        raise api.Problem(HTTPStatus.CONFLICT, "no-likelihood", detail)
    x = api.check_examples(asked.x, family.spec.shape, family.spec.levels)
    labels = [UNLABELLED] * len(x) if asked.labels is None else asked.labels
    if asked.labels is not None:
        api.check_labels(asked.labels, family.spec.classes, "labels")
    if len(labels) != len(x):
        cure = f"Give one label for each of the {len(x)} examples, or none at all"
        raise api.invalid(api.FieldProblem(field="labels", value=f"{len(labels)} labels", cure=cure))
    if len(x) * asked.samples > api.MAX_DRAWS:
        cure = (
            f"Send fewer examples or ask for fewer: {len(x)} examples take at most {api.MAX_DRAWS // len(x)}"
        )
        raise api.invalid(api.FieldProblem(field="samples", value=str(asked.samples), cure=cure))
    dtype = torch.uint8 if family.spec.kind == "image" else torch.int64
    keys = request_keys(asked.seed, len(x), LIKELIHOOD)
    columns = (torch.from_numpy(x).to(dtype), torch.tensor(labels), keys)
    batches = zip(*(torch.split(column, LIKELIHOOD_BATCH) for column in columns), strict=True)
    with torch.no_grad():
        parts = [family.log_likelihood(Batch(*batch), asked.samples) for batch in batches]
    nats = torch.cat(parts).tolist()
    return {
        "model": model.name,
        "version": model.version,
        "seed": asked.seed,
        "samples": asked.samples,
        "kind": family.likelihood_kind,
        "nats": nats,
        "bits_per_dim": [-family.spec.bits_per_dim(one) for one in nats],
    }


async def _lifespan(receive: Receive, send: Send) -> None:
    """Answer the server's start and stop messages: there is nothing to do for either."""
    for moment in ("startup", "shutdown"):
        await receive()
        await send({"type": f"lifespan.{moment}.complete"})
