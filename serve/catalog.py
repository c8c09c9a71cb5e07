"""The application at /: which models there are, and how to talk to them.

It documents the routes of the models too. A request that arrives at one of these here, and not at a model's
own application, asked for a model that is not served, and is told so.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import FastAPI, Path, Request
from fastapi.responses import RedirectResponse, Response
from fastapi_offline import FastAPIOffline
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from serve import api


class Entry(BaseModel):
    """A registered champion."""

    name: str
    version: int = Field(description="The version that the registry calls champion.")
    served: int | None = Field(
        default=None, description="The version that answers; null while there is none."
    )
    failure: str | None = Field(
        default=None, description="Why the champion does not answer; null if it does."
    )
    path: str = Field(description="Where the model answers.")
    description: dict[str, Any] = Field(default={}, description="Metrics and tags of the version.")


class Listing(BaseModel):
    """Answer of GET /v1/models."""

    models: list[Entry]
    registry_failure: str | None = Field(
        description="Why the list may be out of date; null while the registry answers."
    )


@dataclass
class Catalog:
    """What the operator knows and the application tells."""

    entries: dict[str, Entry] = field(default_factory=dict)
    registry_failure: str | None = None

    def not_served(self, name: str) -> api.Problem:
        """Make the answer to a request for a model that no application answers for."""
        if name in self.entries:
            reason = self.entries[name].failure or "it is being loaded"
            return api.Problem(
                HTTPStatus.SERVICE_UNAVAILABLE,
                "not-loaded",
                f"{name} does not answer yet: {reason}.",
                headers={"Retry-After": "5"},
            )
        known = (
            f"there are {', '.join(sorted(self.entries))}" if self.entries else "no model has a champion yet"
        )
        return api.Problem(
            HTTPStatus.NOT_FOUND, "unknown-model", f"There is no model {name!r}: {known}. See /v1/models."
        )


Name = Annotated[str, Path(description="Name of a registered model, as /v1/models lists it.")]

_PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {
        "description": text,
        "content": {"application/problem+json": {"schema": api.ProblemDocument.model_json_schema()}},
    }
    for status, text in {
        404: "There is no such model.",
        413: "The body is too long.",
        422: "A field is wrong; the answer names it, its value and the cure.",
        429: "Too many samples wait; try again after Retry-After seconds.",
        503: "The model is being loaded, or cannot be; try again after Retry-After seconds.",
    }.items()
}
_ORIGIN = {
    name: {"description": text, "schema": {"type": kind}}
    for name, kind, text in [
        ("X-Model", "string", "Name of the model."),
        ("X-Version", "integer", "Version that drew the samples."),
        (
            "X-Seed",
            "integer",
            "Seed of the request: with the version, n and label it gives the samples again.",
        ),
        ("X-N", "integer", "Number of samples."),
        ("X-Label", "integer", "Class of the samples, if one was asked for."),
        ("X-Guidance", "number", "And so on: the value of each option that the model has."),
    ]
}
_SAMPLES = {
    "description": "The samples, as a grid of images (png), an array (npy, npz) or nested lists (json).",
    "headers": _ORIGIN,
    "content": {media_type: {} for media_type in api.MEDIA_TYPES.values()},
}
_NATS = {
    "description": "log p(x) of each example, and whether it is exact, a lower bound or an estimate.",
    "content": {
        "application/json": {
            "example": {
                "model": "digits-vae",
                "version": 1,
                "seed": 0,
                "samples": 1,
                "kind": "lower_bound",
                "nats": [-87.3],
                "bits_per_dim": [1.968],
            }
        }
    },
}


def _body(request: type[BaseModel], examples: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Describe a JSON body for OpenAPI without letting FastAPI parse it: the model's application does."""
    named = {name: {"value": value} for name, value in examples.items()}
    content = {"application/json": {"schema": request.model_json_schema(), "examples": named}}
    return {"requestBody": {"content": content}}


def build_app(catalog: Catalog) -> FastAPI:
    """Build the application that tells of a catalog."""
    app = FastAPIOffline(  # its documentation page works without the internet
        title="gdl_ray",
        version="1",
        description="Samples and likelihoods of deep generative models. Every error is an RFC 9457 problem.",
        redoc_url=None,
    )

    @app.exception_handler(api.Problem)
    async def problem(request: Request, error: api.Problem) -> Response:
        return error.response()

    @app.exception_handler(HTTPException)
    async def http_problem(request: Request, error: HTTPException) -> Response:
        if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
            return api.wrong_method(request.method, (error.headers or {}).get("Allow", "GET")).response()
        return api.unknown_path(request.url.path).response()

    @app.get("/", include_in_schema=False)
    async def index() -> RedirectResponse:
        return RedirectResponse("/docs")

    @app.get("/healthz", summary="Is the catalog up?")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models", summary="List the models")
    async def models() -> Listing:
        return Listing(
            models=[catalog.entries[name] for name in sorted(catalog.entries)],
            registry_failure=catalog.registry_failure,
        )

    @app.get(
        "/v1/models/{name}", summary="Describe a model", responses={404: _PROBLEMS[404], 503: _PROBLEMS[503]}
    )
    async def card(name: Name) -> dict[str, Any]:
        raise catalog.not_served(name)

    @app.post(
        "/v1/models/{name}/sample",
        summary="Draw samples",
        responses={200: _SAMPLES, **_PROBLEMS},
        openapi_extra=_body(
            api.SampleRequest,
            {
                "a grid of 64": {"n": 64, "seed": 7, "format": "png"},
                "four of class 3 as an array": {"n": 4, "label": 3, "format": "npy"},
                "the label exaggerated, where the model has guidance": {"n": 16, "label": 3, "guidance": 2.0},
            },
        ),
    )
    async def sample(name: Name) -> dict[str, Any]:
        raise catalog.not_served(name)

    @app.post(
        "/v1/models/{name}/log_likelihood",
        summary="Compute log p(x)",
        responses={
            200: _NATS,
            **_PROBLEMS,
            409: {**_PROBLEMS[404], "description": "The model is implicit: it has no likelihood."},
        },
        openapi_extra=_body(
            api.LikelihoodRequest,
            {"one 2x2 image, 100 draws": {"x": [[[[0, 16], [16, 0]]]], "samples": 100}},
        ),
    )
    async def log_likelihood(name: Name) -> dict[str, Any]:
        raise catalog.not_served(name)

    @app.api_route(
        "/v1/models/{name}/{operation:path}",
        methods=["GET", "POST", "PUT", "PATCH", "DELETE"],
        include_in_schema=False,
    )
    async def other(name: str, operation: str) -> None:
        raise catalog.not_served(name)

    return app
