"""What travels over HTTP: typed requests, problem documents and the encodings of samples.

Nothing here knows of Ray, of engines or of MLflow.

References:
    Nottingham, Wilde, Dalal. Problem Details for HTTP APIs. RFC 9457, 2023.
    https://www.rfc-editor.org/rfc/rfc9457
"""

import io
import json
from collections.abc import AsyncIterable, Mapping
from http import HTTPStatus
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.responses import Response

from gdl_ray.family import Option
from gdl_ray.images import png_grid

MAX_SAMPLES = 1024
"""Most samples of one request."""
MAX_DRAWS = 65_536
"""Most examples times Monte-Carlo samples of one likelihood request."""
MAX_SEED = 2**53 - 1
"""Largest integer that every JSON reader holds exactly."""
SAMPLE_BODY_BYTES = 2**20
LIKELIHOOD_BODY_BYTES = 2**24

Format = Literal["png", "npy", "npz", "json"]
MEDIA_TYPES: Mapping[Format, str] = {
    "png": "image/png",
    "npy": "application/x-npy",
    "npz": "application/x-npz",
    "json": "application/json",
}
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]


class _Request(BaseModel):
    """Exact types, no unknown fields: a typing error is answered, not guessed at."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class SampleRequest(_Request):
    """Body of `sample`; an empty body asks for the defaults.

    Further fields are the options of the model, such as `guidance` or `steps`: its card lists them.
    """

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)
    __pydantic_extra__: dict[str, float] = Field(init=False)

    n: int = Field(default=16, ge=1, le=MAX_SAMPLES, description="How many samples to draw.")
    seed: Seed | None = Field(
        default=None, description="The same seed and model version give the same samples; random if left out."
    )
    label: int | None = Field(default=None, ge=0, description="The class to draw; any if left out.")
    format: Format | None = Field(
        default=None, description="Encoding of the response; by the Accept header, else png, if left out."
    )

    @property
    def options(self) -> dict[str, float]:
        """What is asked of the model's own options."""
        return self.__pydantic_extra__


class LikelihoodRequest(_Request):
    """Body of `log_likelihood`."""

    x: list[Any] = Field(
        min_length=1, description="Examples: nested lists of integers, shape (B, C, H, W) or (B, T)."
    )
    labels: list[int] | None = Field(default=None, description="A class per example; log p(x) without.")
    samples: int = Field(default=1, ge=1, le=1000, description="Monte-Carlo samples per example.")
    seed: Seed = Field(default=0, description="Decides the noise of the estimate.")


class FieldProblem(BaseModel):
    """One wrong field of a request."""

    field: str
    value: str
    cure: str


class ProblemDocument(BaseModel):
    """RFC 9457 problem document: the body of every error."""

    type: str
    title: str
    status: int
    detail: str
    errors: list[FieldProblem] | None = None


class Problem(Exception):  # noqa: N818  (the RFC's word)
    """An answer other than the one that was asked for.

    Args:
        status: HTTP status.
        kind: what is wrong, in-one-word; the last part of the problem's type.
        detail: what is wrong and what to do, for a person.
        errors: the wrong fields, if any.
        headers: more response headers.
    """

    def __init__(
        self,
        status: HTTPStatus,
        kind: str,
        detail: str,
        errors: list[FieldProblem] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.document = ProblemDocument(
            type=f"urn:gdl-ray:problem:{kind}",
            title=status.phrase,
            status=status,
            detail=detail,
            errors=errors,
        )
        self.headers = headers

    def response(self) -> Response:
        """Build the response that says so."""
        return Response(
            self.document.model_dump_json(exclude_none=True),
            self.document.status,
            self.headers,
            "application/problem+json",
        )


def invalid(*errors: FieldProblem) -> Problem:
    """Make the problem of a request with wrong fields."""
    detail = "; ".join(f"{error.field}={error.value}: {error.cure}" for error in errors)
    return Problem(HTTPStatus.UNPROCESSABLE_ENTITY, "invalid-request", detail, list(errors))


def unknown_path(path: str) -> Problem:
    """Make the problem of an address where nothing is."""
    return Problem(
        HTTPStatus.NOT_FOUND, "unknown-path", f"There is nothing at {path}; /docs lists what there is."
    )


def wrong_method(method: str, allowed: str) -> Problem:
    """Make the problem of a method that an address does not take."""
    detail = f"{method} is not possible here; use {allowed}."
    return Problem(HTTPStatus.METHOD_NOT_ALLOWED, "wrong-method", detail, headers={"Allow": allowed})


def busy(detail: str) -> Problem:
    """Make the problem of a request that finds no room."""
    return Problem(HTTPStatus.TOO_MANY_REQUESTS, "queue-full", detail, headers={"Retry-After": "1"})


async def read_body(chunks: AsyncIterable[bytes], limit_bytes: int) -> bytes:
    """Read a request body.

    Raises:
        Problem: 413, the body is longer than `limit_bytes`.
    """
    body = bytearray()
    length = 0
    async for chunk in chunks:
        length += len(chunk)
        if length <= limit_bytes:
            body += chunk
        # The rest is read and dropped, up to a point: many clients listen only after they have sent it all.
        elif length > 8 * limit_bytes + LIKELIHOOD_BODY_BYTES:
            break
    if length > limit_bytes:
        detail = f"The body is longer than the {limit_bytes} bytes that this operation takes."
        raise Problem(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "body-too-large", detail)
    return bytes(body)


Parsed = TypeVar("Parsed", bound=_Request)


def parse(request: type[Parsed], body: bytes) -> Parsed:
    """Read a request from JSON, whatever content type was declared: plain `curl -d` declares a form.

    Raises:
        Problem: 422, naming each wrong field, its value and the cure.
    """
    try:
        return request.model_validate_json(body or b"{}")
    except ValidationError as error:
        unknown = f"Unknown field; known are {', '.join(request.model_fields)}"
        raise invalid(
            *(
                FieldProblem(
                    field=".".join(map(str, one["loc"])) or "body",
                    value=_brief(one["input"]),
                    cure=unknown if one["type"] == "extra_forbidden" else one["msg"],
                )
                for one in error.errors(include_url=False)
            )
        ) from None


def _brief(value: object) -> str:
    """Show a value of a request in a line."""
    if isinstance(value, bytes):  # a body that is not JSON
        value = value.decode(errors="replace")
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."


def check_labels(labels: list[int], classes: int, field: str) -> None:
    """Check that labels are classes of the data.

    Raises:
        Problem: 422, one is not.
    """
    for label in labels:
        if not 0 <= label < classes:
            cure = (
                f"Give a class from 0 to {classes - 1}"
                if classes
                else "This model has no classes; leave it out"
            )
            raise invalid(FieldProblem(field=field, value=str(label), cure=cure))


def check_options(asked: Mapping[str, float], options: Mapping[str, Option]) -> None:
    """Check that a request sets options that the model has, to values in their range.

    Raises:
        Problem: 422, naming each that is unknown or out of range.
    """
    wrong = []
    for name, value in asked.items():
        if name not in options:
            known = [*SampleRequest.model_fields, *options]
            cure = f"Unknown field; this model knows {', '.join(known)}"
            wrong.append(FieldProblem(field=name, value=f"{value:g}", cure=cure))
            continue
        try:
            options[name].check(name, value)
        except ValueError as error:
            wrong.append(FieldProblem(field=name, value=f"{value:g}", cure=str(error)))
    if wrong:
        raise invalid(*wrong)


def check_examples(x: list[Any], shape: tuple[int, ...], levels: int) -> NDArray[np.int64]:
    """Turn nested lists into an array of examples.

    Returns:
        int64 (B, *shape), in [0, levels - 1].

    Raises:
        Problem: 422, they have another shape, another type or other values.
    """
    cure = (
        f"Give integers from 0 to {levels - 1} as nested lists of the shape (B, {', '.join(map(str, shape))})"
    )
    try:
        array = np.asarray(x)
    except (ValueError, OverflowError):
        raise invalid(FieldProblem(field="x", value="lists of unequal lengths", cure=cure)) from None
    if array.dtype.kind not in "iu" or array.shape[1:] != shape:
        value = f"{array.dtype} values of the shape {array.shape}"
        raise invalid(FieldProblem(field="x", value=value, cure=cure))
    if array.min() < 0 or array.max() >= levels:
        value = f"values from {array.min()} to {array.max()}"
        raise invalid(FieldProblem(field="x", value=value, cure=cure))
    return array.astype(np.int64)


def accepted_format(accept: str) -> Format | None:
    """Find the first encoding that an Accept header names; None where it names none of ours."""
    for entry in accept.split(","):
        media_type = entry.partition(";")[0].strip().lower()
        for name, known in MEDIA_TYPES.items():
            if media_type == known:
                return name
    return None


def encode(
    samples: NDArray[Any], encoding: Format, levels: int, origin: Mapping[str, str | float | None]
) -> tuple[bytes, str]:
    """Encode samples.

    Args:
        samples: uint8 (n, C, H, W) or int64 (n, T), in [0, levels - 1]; for png, images of 1 or 3 channels.
        encoding: of the result.
        levels: what a png scales to 0..255; the other encodings leave the values alone.
        origin: model, version, seed and so on: what it takes to make the samples again; in npz and json.

    Returns:
        The bytes and their media type.
    """
    stream = io.BytesIO()
    if encoding == "png":
        stream.write(png_grid(torch.from_numpy(samples), levels))
    elif encoding == "npy":
        np.save(stream, samples, allow_pickle=False)
    elif encoding == "npz":
        known = {name: np.asarray(value) for name, value in origin.items() if value is not None}
        np.savez_compressed(stream, allow_pickle=False, samples=samples, **known)
    else:
        stream.write(json.dumps({**origin, "samples": samples.tolist()}).encode())
    return stream.getvalue(), MEDIA_TYPES[encoding]
