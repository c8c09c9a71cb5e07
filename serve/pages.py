"""The pages of the service: a playground, and the documentation of the HTTP interface; both offline."""

import base64
import hashlib
import re
from collections.abc import Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, Response
from fastapi_offline import FastAPIOffline
from pydantic import BaseModel, Field, create_model
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException

from gdl_ray.family import Density, LikelihoodKind
from serve import requests
from serve.encoding import MEDIA_TYPES, Format
from serve.problems import MEDIA_TYPE as PROBLEM
from serve.problems import ProblemDocument, unknown_path, wrong_method

PLAYGROUND = (Path(__file__).parent / "playground.html").read_text(encoding="utf-8")

DESCRIPTION = """Samples, likelihoods and latents of registered generative models.

`{name}` is a registered model, and its champion answers; `{name}@3` is version 3, `{name}@alias` an alias.
Every error is an RFC 9457 problem that says what to do. Where a key is needed: `Authorization: Bearer KEY`.
"""

_STATUSES = {
    400: "The request cannot be read.",
    401: "An API key is missing, or is not valid.",
    403: "The key's scopes do not allow it.",
    404: "There is no such model, version or address.",
    405: "The address takes another method; `Allow` names it.",
    408: "The body did not arrive in time.",
    409: "The model cannot do this; the answer says what it can.",
    413: "The body is too long.",
    422: "A field is wrong; the answer names it, its value and the cure.",
    429: "Too many samples wait, or the key's rate is used up; try again after Retry-After seconds.",
    503: "The model is being loaded, or cannot be; try again after Retry-After seconds.",
    504: "The request's time is over.",
}
_READ = (400, 401, 403, 404, 405, 429, 503)
_ASKED = (*_READ, 408, 409, 413, 422, 504)

_HEADERS = {
    name: {"description": text, "schema": {"type": kind}}
    for name, kind, text in [
        ("X-Model", "string", "Name of the model."),
        ("X-Version", "integer", "Version that drew the samples."),
        ("X-N", "integer", "Number of samples."),
        (
            "X-Seed",
            "integer",
            "Seed of the request: with version, n, labels and options it gives them again.",
        ),
        ("X-Label", "integer", "Class of the samples, where all have one."),
        ("X-Guidance", "number", "And so on: the value of each option that the model has."),
    ]
}


class SamplesAnswer(BaseModel):
    """Samples as JSON: asked for with format=json."""

    model: str
    version: int
    n: int
    seed: int | None
    seeds: list[int] | None = Field(description="Of each sample: given as `seeds`, they make it again.")
    labels: list[int | None]
    options: dict[str, float]
    samples: list[Any]


class LikelihoodAnswer(BaseModel):
    """Answer of `log_likelihood`."""

    model: str
    version: int
    seed: int
    samples: int
    kind: LikelihoodKind
    nats: list[float | None] = Field(description="log p(x) of each example; null for -infinity.")
    bits_per_dim: list[float | None]


class ClassifyAnswer(BaseModel):
    """Answer of `classify`."""

    model: str
    version: int
    seed: int
    samples: int
    labels: list[int] = Field(description="The likeliest class of each example.")
    probabilities: list[list[float | None]] = Field(description="p(y | x) of each example and class.")


class EncodeAnswer(BaseModel):
    """Answer of `encode`."""

    model: str
    version: int
    z: list[list[float | None]]


class Served(BaseModel):
    """A version that replicas hold."""

    version: int
    replicas: int


class ListedModel(BaseModel):
    """A registered model."""

    name: str
    path: str
    champion: int | None = Field(description="The version that answers where none is named.")
    aliases: dict[str, int]
    tags: dict[str, str]
    description: dict[str, Any] = Field(description="Run, time and scores of the champion.")
    served: list[Served] = Field(description="Versions that replicas hold; others are loaded when asked for.")
    failure: str | None = Field(description="Why the champion does not answer; null if it does.")


class Listing(BaseModel):
    """Answer of GET /v1/models."""

    models: list[ListedModel]
    registry_failure: str | None = Field(
        description="Why the list may be out of date; null while the registry answers."
    )


class OptionCard(BaseModel):
    """An option of a model."""

    default: float
    least: float
    most: float
    meaning: str
    whole: bool = Field(description="Only integers.")


class LoadCard(BaseModel):
    """How busy an engine is."""

    slots: int
    active: int
    waiting: int
    step_s: float
    wait_s: float


class Card(BaseModel):
    """Answer of GET /v1/models/{name}: what the model is, and what may be asked of it."""

    name: str
    version: int
    family: str
    density: Density
    likelihood: LikelihoodKind | None
    operations: list[str]
    options: dict[str, OptionCard]
    formats: list[Format]
    data: dict[str, Any]
    parameters: int
    limits: dict[str, float]
    load: dict[str, LoadCard]


class Health(BaseModel):
    """Answer of the health checks."""

    status: str


_IMAGE = [[[[0] * 8] * 8]]
_TWO = [*_IMAGE, [[[16] * 8] * 8]]
_OPERATIONS: list[tuple[str, str, type[requests.Body], type[BaseModel], dict[str, dict[str, Any]]]] = [
    (
        "sample",
        "Draw samples",
        requests.SampleRequest,
        SamplesAnswer,
        {
            "a grid of 64": {"n": 64, "seed": 7, "format": "png"},
            "four of class 3 as an array": {"n": 4, "label": 3, "format": "npy"},
            "one of each class": {"seed": 7, "labels": list(range(10)), "format": "png"},
            "the label exaggerated, where the model has guidance": {"n": 16, "label": 3, "guidance": 2.0},
            "a stream of previews, where the model takes steps": {"n": 16, "stream": True},
        },
    ),
    (
        "complete",
        "Draw what is not known of examples",
        requests.CompleteRequest,
        SamplesAnswer,
        {
            "four lower halves of an 8x8 image": {
                "x": _IMAGE,
                "known": [[[True] * 8] * 4 + [[False] * 8] * 4],
                "n": 4,
                "seed": 7,
            }
        },
    ),
    (
        "log_likelihood",
        "Compute log p(x)",
        requests.LikelihoodRequest,
        LikelihoodAnswer,
        {"an 8x8 image, 100 draws": {"x": _IMAGE, "samples": 100}},
    ),
    (
        "classify",
        "Compute p(y | x)",
        requests.ClassifyRequest,
        ClassifyAnswer,
        {"an 8x8 image": {"x": _IMAGE}},
    ),
    (
        "encode",
        "Map examples to latents",
        requests.EncodeRequest,
        EncodeAnswer,
        {"an 8x8 image": {"x": _IMAGE}},
    ),
    (
        "decode",
        "Map latents to examples",
        requests.DecodeRequest,
        SamplesAnswer,
        {"16 zeros": {"z": [[0.0] * 16]}},
    ),
    (
        "interpolate",
        "Go from one example to another through the latent space",
        requests.InterpolateRequest,
        SamplesAnswer,
        {"between two 8x8 images": {"x": _TWO, "steps": 8}},
    ),
]


def build_pages() -> FastAPI:
    """Build the application of the playground and the documentation."""
    app = FastAPIOffline(title="gdl_ray", version="1", redoc_url=None)
    document = openapi()
    app.openapi = lambda: document  # type: ignore[method-assign]

    @app.exception_handler(HTTPException)
    async def problem(request: Request, error: HTTPException) -> Response:
        if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
            return wrong_method(request.method, (error.headers or {}).get("Allow", "GET")).response()
        return unknown_path(request.url.path).response()

    headers = {
        "Content-Security-Policy": content_policy(PLAYGROUND),
        "Cache-Control": "no-cache",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }

    @app.get("/", include_in_schema=False)
    async def index() -> HTMLResponse:
        return HTMLResponse(PLAYGROUND, headers=headers)

    return app


def content_policy(page: str) -> str:
    """Allow a page its inline script and style, by their sums, and requests to this service; nothing else.

    References:
        West, Sartori. Content Security Policy Level 3. W3C, 2025. https://www.w3.org/TR/CSP3/
    """
    rules = {
        "default-src": "'none'",
        "script-src": _sums("script", page),
        "style-src": _sums("style", page),
        "img-src": "data: blob:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return "; ".join(f"{rule} {sources}" for rule, sources in rules.items())


def _sums(tag: str, page: str) -> str:
    texts = re.findall(rf"<{tag}\b[^>]*>(.*?)</{tag}>", page, re.DOTALL)
    digests = (hashlib.sha256(text.encode()).digest() for text in texts)
    return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)


def openapi() -> dict[str, Any]:
    """Describe every address: an OpenAPI 3.1 document."""
    bodies = [row[2] for row in _OPERATIONS]
    answers = [row[3] for row in _OPERATIONS]
    card = create_model("ModelCard", __base__=(Card, ListedModel))
    shapes: dict[type[BaseModel], None] = dict.fromkeys(
        [*bodies, *answers, Listing, card, Health, ProblemDocument]
    )
    _, schemas = models_json_schema(
        [(shape, "validation") for shape in shapes], ref_template="#/components/schemas/{model}"
    )
    paths: dict[str, Any] = {
        "/v1/models": {"get": _get("List the models", Listing, (400, 401, 403, 405, 429))},
        "/v1/models/{name}": {"get": _get("Describe a model", card, _READ), "parameters": [_NAME]},
        "/healthz": {"get": _get("Does the replica live?", Health, (400, 405, 429))},
        "/readyz": {"get": _get("Does it know what to serve?", Health, (400, 405, 429, 503))},
    }
    for operation, summary, body, answer, examples in _OPERATIONS:
        paths[f"/v1/models/{{name}}/{operation}"] = {
            "post": _post(summary, body, answer, examples),
            "parameters": [_NAME],
        }
    return {
        "openapi": "3.1.0",
        "info": {"title": "gdl_ray", "version": "1", "description": DESCRIPTION},
        "paths": paths,
        "components": {
            "schemas": schemas["$defs"],
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


_NAME = {
    "name": "name",
    "in": "path",
    "required": True,
    "schema": {"type": "string"},
    "description": "Name of a registered model, as /v1/models lists it; `@version` or `@alias` may follow.",
    "example": "digits-vae",
}


def _get(summary: str, answer: type[BaseModel], statuses: tuple[int, ...]) -> dict[str, Any]:
    answers = {"200": {"description": summary, "content": _json(answer)}, **_problems(statuses)}
    return {"summary": summary, "responses": answers}


def _post(
    summary: str, body: type[BaseModel], answer: type[BaseModel], examples: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    content = _json(body)
    content["application/json"]["examples"] = {name: {"value": value} for name, value in examples.items()}
    answered: dict[str, Any] = {"description": summary, "content": _json(answer)}
    if answer is SamplesAnswer:
        answered["headers"] = _HEADERS
        answered["content"] |= {kind: {} for name, kind in MEDIA_TYPES.items() if name != "json"}
    if issubclass(body, requests.Drawing):
        answered["content"]["text/event-stream"] = {}
    return {
        "summary": summary,
        "requestBody": {"content": content},
        "responses": {"200": answered, **_problems(_ASKED)},
    }


def _json(model: type[BaseModel]) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}}


def _problems(statuses: tuple[int, ...]) -> dict[str, Any]:
    schema = {"$ref": f"#/components/schemas/{ProblemDocument.__name__}"}
    return {
        str(status): {"description": _STATUSES[status], "content": {PROBLEM: {"schema": schema}}}
        for status in sorted(statuses)
    }
