"""The HTTP application of a replica: which model is meant, who asks, and what becomes of the request.

It is plain ASGI, so it runs and is tested without Ray. Documentation and its page are another application's.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from http import HTTPStatus
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gdl_ray.registry import signed
from serve import audit, requests
from serve.directory import Directory, Entry
from serve.encoding import finite
from serve.keys import ANONYMOUS, Caller, Keyring
from serve.metrics import Meter
from serve.model import OPERATIONS as ABLE
from serve.model import Model
from serve.operations import OPERATIONS, Call, Inference, within
from serve.problems import Problem, busy, not_loaded, unknown_path, wrong_method
from serve.shelf import Shelf

MAX_OPEN = 2000
"""Most requests that a replica holds at a time."""
BODY_TIMEOUT_S = 60.0
"""Longest that a request's body may take to arrive."""
MODELS = "/v1/models"
HOOK = "/hooks/registry"
"""Where the registry tells of its events."""
HOOK_BODY_BYTES = 2**16
MAX_BODIES_BYTES = 2**29
"""Most bytes of bodies that a replica holds at a time."""
SAMPLING = ("sample", "complete")

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Exchange:
    """A request on its way, and what the logs are told of it."""

    request: Request
    id: str
    begin: float = field(default_factory=time.monotonic)
    caller: Caller = ANONYMOUS
    model: str = ""
    operation: str = ""
    kind: str = ""
    """What was wrong; empty if nothing was."""
    status: int = 0
    """Of the answer; 0 until there is one."""
    sent_bytes: int = 0
    told: dict[str, Any] = field(default_factory=dict)

    @property
    def client(self) -> str:
        """Address of the client, or of the ingress that speaks for it."""
        return self.request.client.host if self.request.client else ""


class App:
    """ASGI application of a replica.

    Args:
        shelf: the models.
        keyring: who may ask.
        meter: counts what happens.
        written: is told who asked for what.
        pages: the application for everything that is not a model.
        refresh: makes the operator look at the registry now.
    """

    def __init__(
        self,
        shelf: Shelf,
        keyring: Keyring,
        meter: Meter,
        written: audit.Audit,
        pages: ASGIApp,
        refresh: Callable[[], Awaitable[None]],
    ) -> None:
        self._shelf, self._keyring, self._meter, self._audit = shelf, keyring, meter, written
        self._pages, self._refresh = pages, refresh
        self._inference = Inference()
        self._open = 0
        self._bodies_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
        elif scope["type"] == "http":
            scope = {**scope, "path": scope["path"].removesuffix("/") or "/"}
            if _is_page(scope["path"]):
                await self._pages({**scope, "root_path": ""}, receive, send)
            else:
                await self._exchange(Exchange(Request(scope, receive), _id(scope)), send)

    async def _exchange(self, exchange: Exchange, send: Send) -> None:
        """Answer a request, and tell the logs."""
        audit.REQUEST_ID.set(exchange.id)
        self._open += 1

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
            exchange.sent_bytes += len(message.get("body", b""))
            await send(message)

        try:
            response = await self._answered(exchange)
            request = exchange.request
            await response(request.scope, request.receive, counted)
        except asyncio.CancelledError:  # what Serve does when the connection closes
            exchange.kind = "client-gone"
            raise
        except (ClientDisconnect, OSError):
            exchange.kind = "client-gone"
        finally:
            self._open -= 1
            self._tell(exchange)

    async def _answered(self, exchange: Exchange) -> Response:
        try:
            return await self._answer(exchange)
        except Problem as problem:
            exchange.kind = problem.kind
            return problem.response()
        except ClientDisconnect:
            exchange.kind = "client-gone"
            return Response(status_code=HTTPStatus.BAD_REQUEST)  # nobody hears it
        except Exception:
            exchange.kind = "server-error"
            log.exception("%s %s failed", exchange.request.method, exchange.request.url.path)
            detail = f"The request was fine, the server is not; its log says why, under {exchange.id}."
            return Problem(HTTPStatus.INTERNAL_SERVER_ERROR, exchange.kind, detail).response()

    async def _answer(self, exchange: Exchange) -> Response:
        request = exchange.request
        path: str = request.scope["path"]
        if path in ("/healthz", "/readyz"):
            _only("GET", request)
            return self._health(path)
        if self._open > MAX_OPEN:
            raise busy(f"{MAX_OPEN} requests are open already.")
        if path == HOOK:
            _only("POST", request)
            return await self._hook(request)
        name, reference, operation = _parse(path)
        # Never a client's own word: the logs and the metrics count by it.
        named = operation if operation in OPERATIONS else "unknown"
        exchange.operation = named if operation else "card" if name else "list"
        await self._shelf.known()
        if not self._shelf.directory.serial:  # nor are the keys known
            raise not_loaded(f"What there is is not known yet: {self._shelf.directory.failure}.", 2)
        scope = "read" if not operation else "sample" if operation in SAMPLING else "infer"
        exchange.caller = self._keyring.admit(request.headers.get("authorization"), scope)
        if operation and operation not in OPERATIONS:
            raise unknown_path(path)
        _only("POST" if operation else "GET", request)
        if not name:
            return JSONResponse(finite(listing(self._shelf.directory)))
        self._shelf.directory.version(name, reference)  # what there is not is told before a body is read
        if not operation:
            return await self._card(exchange, name, reference)
        limit = requests.SAMPLE_BODY_BYTES if operation == "sample" else requests.EXAMPLES_BODY_BYTES
        with self._room_for_body(request, limit):
            body = await _body(request, limit)
            return await self._asked(exchange, name, reference, operation, body)

    async def _card(self, exchange: Exchange, name: str, reference: str) -> Response:
        """Describe a model."""
        model = await self._shelf.take(name, reference)
        try:
            exchange.model = name
            entry = self._shelf.directory.entries.get(name)
            return JSONResponse(finite({**model.card(), **(_told(name, entry) if entry else {})}))
        finally:
            self._shelf.release(model)

    async def _asked(
        self, exchange: Exchange, name: str, reference: str, operation: str, body: bytes
    ) -> Response:
        """Let a model answer."""
        async with within(requests.MAX_TIMEOUT_S):
            model = await self._shelf.take(name, reference)
        try:
            exchange.model = name
            exchange.told["version"] = model.version
            if not ABLE[operation](model.family):
                can = ", ".join(model.operations)
                detail = f"{name} cannot {operation.replace('_', ' ')}; it can: {can}."
                raise Problem(HTTPStatus.CONFLICT, "not-able", detail)
            kind, answer = OPERATIONS[operation]
            asked = await requests.read(kind, body)
            async with within(asked.timeout_s):
                return await answer(self._call(exchange, model), asked)
        finally:
            self._shelf.release(model)

    def _call(self, exchange: Exchange, model: Model) -> Call:
        return Call(
            model=model,
            accept=exchange.request.headers.get("accept", ""),
            caller=exchange.caller,
            client=exchange.caller.id or exchange.client,
            keyring=self._keyring,
            meter=self._meter,
            inference=self._inference,
            told=exchange.told,
        )

    @contextmanager
    def _room_for_body(self, request: Request, limit_bytes: int) -> Iterator[None]:
        """Hold memory for a body, as long as it says it is.

        Raises:
            Problem: 429, bodies of others fill what there is.
        """
        announced = request.headers.get("content-length", "")
        size = (
            int(announced)
            if announced.isascii() and announced.isdigit() and len(announced) < 16
            else limit_bytes
        )
        size = min(size, limit_bytes)
        if self._bodies_bytes + size > MAX_BODIES_BYTES:
            raise busy(f"Bodies of {self._bodies_bytes} bytes are being worked on already.")
        self._bodies_bytes += size
        try:
            yield
        finally:
            self._bodies_bytes -= size

    def _health(self, path: str) -> Response:
        """Tell whether the process lives (healthz), and whether it knows what to serve (readyz)."""
        directory = self._shelf.directory
        if path == "/readyz" and not directory.serial:
            detail = f"What models there are is not known yet: {directory.failure}."
            raise Problem(HTTPStatus.SERVICE_UNAVAILABLE, "not-ready", detail, headers={"Retry-After": "2"})
        return JSONResponse({"status": "ok"})

    async def _hook(self, request: Request) -> Response:
        """Hear of an event in the registry, if it is the registry that tells."""
        body = await _body(request, HOOK_BODY_BYTES)
        secret = self._shelf.directory.hook_secret
        if not secret or not signed(request.headers, body, secret):
            raise Problem(
                HTTPStatus.UNAUTHORIZED, "bad-signature", "The event is not signed by the registry."
            )
        await self._refresh()
        return Response(status_code=HTTPStatus.NO_CONTENT)

    def close(self) -> None:
        """Write down what the audit log still holds."""
        self._audit.close()

    def _tell(self, exchange: Exchange) -> None:
        seconds = time.monotonic() - exchange.begin
        kind = exchange.kind or exchange.told.pop("problem", None)
        self._meter.answered(exchange.model, exchange.operation, exchange.status, seconds, kind)
        if exchange.operation:
            request = exchange.request
            self._audit.write(
                audit.Entry(
                    request_id=exchange.id,
                    key_id=exchange.caller.id,
                    key_name=exchange.caller.name,
                    client=exchange.client,
                    method=request.method,
                    path=request.scope["path"],
                    operation=exchange.operation,
                    model=exchange.model or None,
                    status=exchange.status,
                    problem=kind,
                    seconds=round(seconds, 4),
                    bytes=exchange.sent_bytes,
                    **exchange.told,
                )
            )


def _id(scope: Scope) -> str:
    """Name a request: as its client or the ingress does, if they do."""
    return audit.request_id_of(dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1"))


def listing(directory: Directory) -> dict[str, Any]:
    """List the registered models as JSON values."""
    entries = sorted(directory.entries.items())
    return {
        "models": [{"name": name, **_told(name, entry)} for name, entry in entries],
        "registry_failure": directory.failure,
    }


def _told(name: str, entry: Entry) -> dict[str, Any]:
    """Tell of a model what the registry knows."""
    fields = asdict(entry)
    served = [
        {"version": version, "replicas": replicas}
        for version, replicas in sorted(fields.pop("served").items())
    ]
    return {**fields, "champion": entry.champion, "served": served, "path": f"{MODELS}/{name}"}


def _is_page(path: str) -> bool:
    """Tell whether a path is documentation."""
    return path in ("/", "/docs", "/openapi.json") or path.startswith(("/docs/", "/static-offline-docs/"))


def _parse(path: str) -> tuple[str, str, str]:
    """Split /v1/models[/name[@reference][/operation]].

    Raises:
        Problem: 404, the path is of another form.
    """
    prefix, _, rest = path.partition(MODELS)
    if prefix or (rest and not rest.startswith("/")) or rest.count("/") > 2:
        raise unknown_path(path)
    target, _, operation = rest.removeprefix("/").partition("/")
    name, _, reference = target.partition("@")
    if rest and not name:
        raise unknown_path(path)
    return name, reference, operation


def _only(method: str, request: Request) -> None:
    """Check a request's method.

    Raises:
        Problem: 405, it is another.
    """
    if request.method != method:
        raise wrong_method(request.method, method)


async def _body(request: Request, limit_bytes: int) -> bytes:
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            return await requests.read_body(request.stream(), limit_bytes)
    except TimeoutError:
        detail = f"The body has not arrived within {BODY_TIMEOUT_S:g} s."
        raise Problem(HTTPStatus.REQUEST_TIMEOUT, "slow-body", detail) from None


async def _lifespan(receive: Receive, send: Send) -> None:
    """Answer the server's start and stop messages: there is nothing to do for either."""
    for moment in ("startup", "shutdown"):
        await receive()
        await send({"type": f"lifespan.{moment}.complete"})
