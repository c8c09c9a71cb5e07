"""Answers other than the one that was asked for, as problem documents.

References:
    Nottingham, Wilde, Dalal. Problem Details for HTTP APIs. RFC 9457, 2023.
    https://www.rfc-editor.org/rfc/rfc9457
"""

from collections.abc import Mapping
from http import HTTPStatus

from pydantic import BaseModel
from starlette.responses import Response

MEDIA_TYPE = "application/problem+json"


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
        self.kind = kind
        self.document = ProblemDocument(
            type=f"urn:gdl-ray:problem:{kind}",
            title=status.phrase,
            status=status,
            detail=detail,
            errors=errors,
        )
        self.headers = headers

    def json(self) -> str:
        """Write the document."""
        return self.document.model_dump_json(exclude_none=True)

    def response(self) -> Response:
        """Build the response that says so."""
        return Response(self.json(), self.document.status, self.headers, MEDIA_TYPE)


def invalid(*errors: FieldProblem) -> Problem:
    """Make the problem of a request with wrong fields."""
    detail = "; ".join(f"{error.field}={error.value}: {error.cure}" for error in errors)
    return Problem(HTTPStatus.UNPROCESSABLE_ENTITY, "invalid-request", detail, list(errors))


def wrong(field: str, value: object, cure: str) -> Problem:
    """Make the problem of a request with one wrong field."""
    return invalid(FieldProblem(field=field, value=str(value), cure=cure))


def unknown_path(path: str) -> Problem:
    """Make the problem of an address where nothing is."""
    return Problem(
        HTTPStatus.NOT_FOUND, "unknown-path", f"There is nothing at {path}; /docs lists what there is."
    )


def wrong_method(method: str, allowed: str) -> Problem:
    """Make the problem of a method that an address does not take."""
    detail = f"{method} is not possible here; use {allowed}."
    return Problem(HTTPStatus.METHOD_NOT_ALLOWED, "wrong-method", detail, headers={"Allow": allowed})


def busy(detail: str, retry_after_s: int = 1) -> Problem:
    """Make the problem of a request that finds no room."""
    headers = {"Retry-After": str(retry_after_s)}
    return Problem(HTTPStatus.TOO_MANY_REQUESTS, "queue-full", detail, headers=headers)


def not_loaded(detail: str, retry_after_s: int = 5) -> Problem:
    """Make the problem of a model that cannot answer now."""
    headers = {"Retry-After": str(retry_after_s)}
    return Problem(HTTPStatus.SERVICE_UNAVAILABLE, "not-loaded", detail, headers=headers)


def too_late(timeout_s: float) -> Problem:
    """Make the problem of a request whose time is over before its answer is there."""
    detail = f"There is no answer after {timeout_s:g} s. Ask for fewer samples or steps, or raise timeout_s."
    return Problem(HTTPStatus.GATEWAY_TIMEOUT, "deadline", detail)
