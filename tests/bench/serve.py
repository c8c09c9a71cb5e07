"""Requests per second of the sampling endpoint against `mlflow models serve`, on the same model.

Run it while the platform is up (`python -m infra up`), with MLFLOW_TRACKING_URI set to its MLflow server:

    python tests/bench/serve.py --url http://127.0.0.1:8000 --model digits-vae

Both servers answer requests for four samples over 32 kept-alive connections, in turns, in the same run.
"""

import argparse
import asyncio
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

CONNECTIONS = 32
ROUND_S = 5.0
ROUNDS = 5
START_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Target:
    """A server and the request that is sent to it over and over."""

    name: str
    host: str
    port: int
    path: str
    body: bytes

    def request(self) -> bytes:
        """Spell the request out; by hand, because the client shares the cores with the server."""
        head = (
            f"POST {self.path} HTTP/1.1\r\nHost: {self.host}:{self.port}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(self.body)}\r\n\r\n"
        )
        return head.encode() + self.body


@dataclass(frozen=True)
class Round:
    """What a server did in one round."""

    per_s: float
    latencies_s: list[float]

    def percentile_ms(self, percent: int) -> float:
        """Give a percentile of the latencies, in milliseconds."""
        return 1000 * statistics.quantiles(self.latencies_s, n=100)[percent - 1]


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> tuple[int, bool]:
    """Send a request and read its answer; returns its status and whether the connection stays open."""
    writer.write(request)
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = head.partition(b"content-length:")[2].partition(b"\r\n")[0]
    await reader.readexactly(int(length))
    return int(head[9:12]), b"connection: close" not in head


async def connection(target: Target, until: float, latencies_s: list[float]) -> None:
    """Ask over one connection, again as soon as the answer is there."""
    reader, writer = await asyncio.open_connection(target.host, target.port)
    request = target.request()
    while (begin := time.perf_counter()) < until:
        status, stays_open = await ask(reader, writer, request)
        if status != 200:
            raise RuntimeError(f"{target.name} answered {status}")
        latencies_s.append(time.perf_counter() - begin)
        if not stays_open:
            writer.close()
            reader, writer = await asyncio.open_connection(target.host, target.port)
    writer.close()


async def measure(target: Target, seconds: float) -> Round:
    """Load a server for a while."""
    latencies_s: list[float] = []
    begin = time.perf_counter()
    await asyncio.gather(*(connection(target, begin + seconds, latencies_s) for _ in range(CONNECTIONS)))
    return Round(len(latencies_s) / (time.perf_counter() - begin), latencies_s)


def free_port() -> int:
    """Find a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@contextmanager
def mlflow_server(model: str, port: int) -> Iterator[None]:
    """Run `mlflow models serve` on a registered model's champion."""
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--model-uri", f"models:/{model}@champion"]
    command += ["--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)]
    # It starts `uvicorn` from the PATH. A session of its own, so that its workers end with it.
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command, env=env, stdout=quiet, stderr=quiet, start_new_session=True)
    try:
        wait_for(port, process)
        yield
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def wait_for(port: int, process: "subprocess.Popen[bytes]") -> None:
    """Wait until a server listens."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise RuntimeError(f"`mlflow models serve` does not listen on port {port}")


def main() -> None:
    """Measure both servers and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the platform's ingress")
    parser.add_argument("--model", default="digits-vae", help="a registered model with a champion")
    arguments = parser.parse_args()
    ingress = urlsplit(arguments.url)
    ours = Target(
        "gdl_ray",
        ingress.hostname or "127.0.0.1",
        ingress.port or 80,
        f"/v1/models/{arguments.model}/sample",
        json.dumps({"n": 4, "seed": 7, "format": "npy"}).encode(),
    )
    frame = {"columns": ["label"], "data": [[-1]] * 4}
    body = json.dumps({"dataframe_split": frame, "params": {"seed": 7}}).encode()
    theirs = Target("mlflow", "127.0.0.1", free_port(), "/invocations", body)
    rounds: dict[Target, list[Round]] = {ours: [], theirs: []}
    with mlflow_server(arguments.model, theirs.port):
        for target in rounds:
            asyncio.run(measure(target, 1.0))  # warm-up
        for _ in range(ROUNDS):
            for target, measured in rounds.items():
                measured.append(asyncio.run(measure(target, ROUND_S)))
    report(rounds)


def report(rounds: dict[Target, list[Round]]) -> None:
    """Print medians over the rounds, and their ratio."""
    print(f"n=4, {CONNECTIONS} connections, medians of {ROUNDS} rounds of {ROUND_S:g} s")
    print(f"{'server':<10}{'requests/s':>12}{'p50 ms':>10}{'p99 ms':>10}")
    for target, measured in rounds.items():
        p50, p99 = (statistics.median(one.percentile_ms(p) for one in measured) for p in (50, 99))
        print(f"{target.name:<10}{median_per_s(measured):>12.0f}{p50:>10.1f}{p99:>10.1f}")
    ours, theirs = map(median_per_s, rounds.values())
    print(f"ratio {ours / theirs:.1f}")


def median_per_s(measured: list[Round]) -> float:
    """Give the median of the rounds' requests per second."""
    return statistics.median(one.per_s for one in measured)


if __name__ == "__main__":
    main()
