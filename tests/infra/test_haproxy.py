"""HAProxy as the platform starts it: where it listens, what it waits for, what it says."""

import json
import os
import re
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from infra.haproxy import PORTS, environment
from infra.processes import Process, end, is_alive, spawn, tree
from tests.conftest import free_port


def listening(processes: list[psutil.Process]) -> set[tuple[str, str, int]]:
    """Name of the process, address and port of every listening socket."""
    found = set()
    for process in processes:
        with suppress(psutil.NoSuchProcess):  # Ray's idle workers come and go
            for connection in process.net_connections("inet"):
                if connection.status == psutil.CONN_LISTEN:
                    address, port = connection.laddr
                    found.add((process.name(), address.removeprefix("::ffff:"), port))
    return found


AS_RAY_WRITES_IT = """\
global
    maxconn 10
defaults
    mode http
    timeout connect 5s
    timeout client 60s
    timeout server 660s
    errorfile 503 /tmp/nowhere/500.http
frontend http_frontend
    bind 127.0.0.1:{front}
    default_backend toys
backend toys
    server toy 127.0.0.1:{back}
listen stats
  bind *:{stats}
  stats enable
frontend prometheus
    bind :{metrics}
"""


@pytest.fixture
def haproxy(tmp_path: Path) -> Iterator[tuple[Process, dict[str, int]]]:
    """HAProxy as the platform starts it, before a server that is down, and its ports."""
    ports = {name: free_port() for name in ("front", "back", "stats", "metrics", *PORTS)}
    settings = environment(tmp_path, ports)
    config = Path(settings["RAY_SERVE_HAPROXY_CONFIG_FILE_LOC"])
    config.write_text(AS_RAY_WRITES_IT.format(**ports))
    command = [settings["RAY_SERVE_HAPROXY_BINARY_PATH"], "-db", "-f", str(config)]
    process = spawn(command, tmp_path / "log", os.environ, tmp_path)
    while not any("haproxy" in name for name, _, _ in listening(tree(process))):
        assert is_alive(process), (tmp_path / "log").read_text()
        time.sleep(0.05)
    yield process, ports
    end(process)


def test_haproxy_listens_on_loopback_alone(haproxy: tuple[Process, dict[str, int]]) -> None:
    process, ports = haproxy
    sockets = {(address, port) for _, address, port in listening(tree(process))}
    assert sockets == {("127.0.0.1", ports[name]) for name in ("front", "stats", "metrics")}


def test_haproxy_says_in_a_problem_document_that_no_replica_is_up(
    haproxy: tuple[Process, dict[str, int]],
) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"http://127.0.0.1:{haproxy[1]['front']}/v1/models")
    answer = caught.value
    assert (answer.code, answer.headers["Retry-After"]) == (503, "5")
    assert answer.headers["Content-Type"] == "application/problem+json"
    document = json.loads(answer.read())
    assert (document["status"], document["type"]) == (503, "urn:gdl-ray:problem:no-replica")


@pytest.mark.slow
def test_haproxy_waits_ten_seconds_for_a_slow_client(haproxy: tuple[Process, dict[str, int]]) -> None:
    head = b"POST / HTTP/1.1\r\nHost: toy\r\n"
    with (
        socket.create_connection(("127.0.0.1", haproxy[1]["front"]), timeout=20) as slow_head,
        socket.create_connection(("127.0.0.1", haproxy[1]["front"]), timeout=20) as slow_body,
    ):
        begin = time.monotonic()
        slow_head.sendall(head)
        slow_body.sendall(head + b"Content-Length: 1000\r\n\r\n")
        for _ in range(8):  # a byte a second is no silence
            time.sleep(1)
            slow_head.sendall(b"x")
            slow_body.sendall(b"x")
        for client in (slow_head, slow_body):
            assert client.recv(1000).startswith(b"HTTP/1.1 408")
            assert 9 < time.monotonic() - begin < 15


def check_haproxy(temp: Path) -> None:
    """Find the platform's settings in the configuration that Ray has written."""
    (file,) = temp.glob("*/haproxy.cfg")
    config = file.read_text()
    limits = (
        "    option forwardfor\n    timeout http-request 10s\n    timeout http-keep-alive 60s\n"
        "    option http-buffer-request\n    option idle-close-on-response\n"
    )
    assert f"\ndefaults\n{limits}" in config
    for setting in (
        "maxconn 2048",
        "retry-on conn-failure empty-response",
        "timeout client 60s",
        "timeout server 660s",
    ):
        assert f"\n    {setting}\n" in config
    assert set(re.findall(r"errorfile \d+ (.*)", config)) == {str(temp / "503.http")}
