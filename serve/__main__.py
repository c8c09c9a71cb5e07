"""Start serving on the Ray cluster at RAY_ADDRESS: `python -m serve --http-port 8000`. Harmless to repeat.

Off loopback, every request needs an API key: `python -m serve.keys add NAME` makes one.
"""

import argparse
import ipaddress
import logging
import os
import sys
import time
import urllib.error
import urllib.request

import ray
from ray import serve

from serve import keys, operator, replica
from serve.scaling import parse_replicas

START_TIMEOUT_S = 120.0


def main() -> None:
    """Start Serve's ingress and the pool, and return when it answers."""
    parser = argparse.ArgumentParser(
        prog="python -m serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--host", default="127.0.0.1", help="address that the ingress listens on")
    parser.add_argument("--http-port", type=int, default=8000, help="its port")
    parser.add_argument(
        "--replicas", default="1", help="replicas of the pool that all models share, such as 2, or 1:4"
    )
    parser.add_argument(
        "--gpus", type=float, default=0, help="GPUs of each, or the share of one, such as 0.25"
    )
    parser.add_argument("--models", type=int, default=32, help="most versions that a replica holds")
    parser.add_argument(
        "--cors-origin", action="append", default=[], help="origin of pages that browsers may let ask"
    )
    asked = parser.parse_args()
    if "RAY_ADDRESS" not in os.environ:
        parser.error("set RAY_ADDRESS to the address of a running Ray cluster, such as 127.0.0.1:6379")
    try:
        settings = _settings(asked)
    except ValueError as error:
        parser.error(str(error))
    ray.init(logging_level=logging.WARNING, log_to_driver=False)
    serve.start(http_options={"host": asked.host, "port": asked.http_port}, proxy_location="HeadOnly")
    if replica.APPLICATION in serve.status().applications:  # deploying again would replace its replicas
        print("it serves already, with the settings that it was started with")
    else:
        serve.run(operator.application(settings), name=replica.APPLICATION, route_prefix="/")
    if not _answers(f"{settings.url}/healthz"):
        sys.exit(f"Serve runs, but {settings.url} does not answer: was it started on another port before?")
    print(f"serving at {settings.url}, documented at {settings.url}/docs")


def _settings(asked: argparse.Namespace) -> replica.Settings:
    """Check what is asked for.

    Raises:
        ValueError: it cannot be; the message says what can.
    """
    try:
        address = ipaddress.ip_address(asked.host)
    except ValueError:
        raise ValueError(
            f"--host {asked.host} must be an address of this machine, such as 127.0.0.1"
        ) from None
    if not address.is_loopback and not keys.read_records(keys.keys_file()):
        raise ValueError(
            f"--host {asked.host} lets others in, and there is no API key yet: "
            "make one first, with `python -m serve.keys add NAME`"
        )
    if asked.models < 1:
        raise ValueError(f"--models {asked.models} must be at least 1")
    if asked.gpus < 0:
        raise ValueError(f"--gpus {asked.gpus:g} must not be negative")
    replicas = parse_replicas(asked.replicas)
    if not replicas[0]:
        raise ValueError(
            f"--replicas {asked.replicas} must keep one at least: the pool answers for all models"
        )
    host = "127.0.0.1" if address.is_unspecified else f"[{address}]" if address.version == 6 else address
    return replica.Settings(
        url=f"http://{host}:{asked.http_port}",
        require_keys=not address.is_loopback,
        cors_origins=tuple(asked.cors_origin),
        replicas=replicas,
        gpus=asked.gpus,
        models=asked.models,
    )


def _answers(url: str) -> bool:
    """Wait until an address answers; False if it does not in time."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            urllib.request.urlopen(url, timeout=5).close()  # noqa: S310  (an http address of our own)
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
        else:
            return True
    return False


if __name__ == "__main__":
    main()
