"""Load on an HTTP server, over raw kept-alive sockets: the client shares the server's cores, so it is lean.

A closed loop asks again as soon as the answer is there, and finds what a server can do. An open loop asks at
random times whatever the server does, and finds what users get; a request's latency counts from the moment at
which it was due, so that a client that lags behind flatters nobody.
"""

import asyncio
import json
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

BROKEN = 0
"""Status of a request whose connection broke."""


@dataclass(frozen=True)
class Target:
    """An address that takes a request."""

    name: str
    url: str

    def request(self, body: Mapping[str, Any]) -> bytes:
        """Spell a request out."""
        place, content = urlsplit(self.url), json.dumps(body).encode()
        head = f"POST {place.path} HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Type: application/json\r\n"
        return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back for a request."""

    status: int
    latency_s: float
    ended_s: float
    """When, on the clock of `time.perf_counter`."""
    head: bytes
    """Status line and header fields, in lower case."""
    body: bytes

    def header(self, name: str) -> str | None:
        """Look a header field up."""
        _, found, rest = self.head.partition(f"\r\n{name.lower()}:".encode())
        return rest.partition(b"\r\n")[0].strip().decode() if found else None


@dataclass
class Load:
    """The answers to a load that lasted some seconds."""

    seconds: float
    answers: list[Answer] = field(default_factory=list)

    @property
    def statuses(self) -> Counter[int]:
        """How many answers there are of each status."""
        return Counter(answer.status for answer in self.answers)

    @property
    def per_s(self) -> float:
        """Good answers a second."""
        return self.statuses[200] / self.seconds

    def percentile_ms(self, percent: int) -> float:
        """Give a percentile of the latencies of good answers, in milliseconds."""
        latencies_s = [answer.latency_s for answer in self.answers if answer.status == 200]
        return 1000 * statistics.quantiles(latencies_s, n=100)[percent - 1]


class Connection:
    """A kept-alive connection to a server."""

    def __init__(self, target: Target) -> None:
        self._place = urlsplit(target.url)
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def ask(self, request: bytes, due_s: float | None = None) -> Answer:
        """Send a request, and read its answer; status BROKEN if the connection breaks."""
        begin_s = time.perf_counter() if due_s is None else due_s
        try:
            status, head, body = await self._exchange(request)
        except (OSError, asyncio.IncompleteReadError):
            self.close()
            status, head, body = BROKEN, b"", b""
        end_s = time.perf_counter()
        return Answer(status, end_s - begin_s, end_s, head, body)

    async def _exchange(self, request: bytes) -> tuple[int, bytes, bytes]:
        if self._reader is None or self._reader.at_eof():  # the server may close what is idle
            self._reader, self._writer = await asyncio.open_connection(self._place.hostname, self._place.port)
        assert self._writer is not None
        self._writer.write(request)
        head = (await self._reader.readuntil(b"\r\n\r\n")).lower()
        length = head.partition(b"\r\ncontent-length:")[2].partition(b"\r\n")[0]
        body = await self._reader.readexactly(int(length))
        if b"\r\nconnection: close" in head:
            self.close()
        return int(head[9:12]), head, body

    def close(self) -> None:
        """Hang up; the next request connects again."""
        if self._writer is not None:
            self._writer.close()
        self._reader = self._writer = None


def closed_loop(target: Target, body: Mapping[str, Any], connections: int, seconds: float) -> Load:
    """Ask the same over some connections, again and again, for a while."""
    request, until_s = target.request(body), time.perf_counter() + seconds
    return ask_while(target, lambda: request, connections, lambda: time.perf_counter() < until_s)


def ask_while(
    target: Target, request: Callable[[], bytes], connections: int, goes_on: Callable[[], bool]
) -> Load:
    """Ask over some connections, again and again, what `request` gives."""

    async def one(answers: list[Answer]) -> None:
        connection = Connection(target)
        while goes_on():
            answers.append(await connection.ask(request()))
        connection.close()

    async def all_of_them() -> Load:
        answers: list[Answer] = []
        begin_s = time.perf_counter()
        await asyncio.gather(*(one(answers) for _ in range(connections)))
        return Load(time.perf_counter() - begin_s, answers)

    return asyncio.run(all_of_them())


def open_loop(target: Target, body: Mapping[str, Any], per_s: float, seconds: float, seed: int = 0) -> Load:
    """Ask the same at the times of a Poisson process, and wait for all answers."""
    request, chance = target.request(body), random.Random(seed)

    async def arrivals() -> Load:
        idle: list[Connection] = []
        answers: list[Answer] = []

        async def one(due_s: float) -> None:
            connection = idle.pop() if idle else Connection(target)
            answers.append(await connection.ask(request, due_s))
            idle.append(connection)

        due_s = begin_s = time.perf_counter()
        async with asyncio.TaskGroup() as under_way:
            while (due_s := due_s + chance.expovariate(per_s)) < begin_s + seconds:
                await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
                under_way.create_task(one(due_s))
        for connection in idle:
            connection.close()
        return Load(seconds, answers)

    return asyncio.run(arrivals())
