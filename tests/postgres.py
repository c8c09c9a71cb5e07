"""A real Postgres server of a test's own, on a free port; tests skip where there is none to start."""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest

from tests.conftest import free_port


def _program(name: str) -> str:
    """Find a program of the server, which Debian keeps off the PATH."""
    places = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    found = shutil.which(name, path=os.pathsep.join([*map(str, places), os.environ["PATH"]]))
    if found is None or shutil.which("pg_dump") is None:
        pytest.skip("Postgres is not on this machine (on Debian, `apt-get install postgresql`)")
    return found


def _command(*command: str) -> list[str]:
    """Let root run a command as nobody, because Postgres does not run as root."""
    if os.getuid() != 0:
        return list(command)
    return ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups", *command]


@contextmanager
def postgres_server(password: str = "") -> Iterator[str]:
    """Run a server, with a database `mlflow` of a user `mlflow`, who needs the password if there is one.

    Yields:
        postgresql://mlflow@127.0.0.1:PORT/mlflow
    """
    initdb, postgres = _program("initdb"), _program("postgres")
    folder = Path(tempfile.mkdtemp(prefix="gdl-postgres-"))
    port = free_port()
    try:
        (folder / "password").write_text(password or "none")
        if os.getuid() == 0:
            for place in (folder, folder / "password"):
                shutil.chown(place, "nobody", "nogroup")
        options = [f"--pgdata={folder}/data", "--username=mlflow", "--no-sync", f"--pwfile={folder}/password"]
        method = "scram-sha-256" if password else "trust"
        made = _command(initdb, *options, f"--auth={method}", "--locale=C.UTF-8")
        subprocess.run(made, check=True, capture_output=True, cwd="/")
        settings = {"listen_addresses": "127.0.0.1", "unix_socket_directories": "", "fsync": "off"}
        line = [postgres, "-D", f"{folder}/data", "-p", str(port)]
        line += [f"--{name}={value}" for name, value in settings.items()]
        with (folder / "log").open("w") as log:
            server = subprocess.Popen(_command(*line), stdout=log, stderr=log, cwd="/")
        try:
            _make_database(f"postgresql://mlflow@127.0.0.1:{port}/postgres", password, server)
            yield f"postgresql://mlflow@127.0.0.1:{port}/mlflow"
        finally:
            server.send_signal(signal.SIGINT)  # its word for: send clients away, and stop
            server.wait()
    finally:
        shutil.rmtree(folder)


def _make_database(url: str, password: str, server: "subprocess.Popen[bytes]") -> None:
    while server.poll() is None:
        try:
            with psycopg.connect(url, autocommit=True, password=password or None) as connection:
                connection.execute("CREATE DATABASE mlflow")
        except psycopg.OperationalError:
            time.sleep(0.1)
        else:
            return
    raise RuntimeError("Postgres ended before it answered")
