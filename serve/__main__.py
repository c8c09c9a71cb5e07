"""Start serving on the Ray cluster at RAY_ADDRESS: `python -m serve --http-port 8000`. Harmless to repeat."""

import argparse
import logging
import os
import sys
import time
import urllib.error
import urllib.request

import ray
from ray import serve

from serve import operator, replica

HOST = "127.0.0.1"
START_TIMEOUT_S = 120.0


def main() -> None:
    """Start Serve's ingress and the catalog, and return when the catalog answers."""
    parser = argparse.ArgumentParser(prog="python -m serve", description=__doc__)
    parser.add_argument("--http-port", type=int, default=8000, help="port of the ingress on 127.0.0.1")
    port = parser.parse_args().http_port
    if "RAY_ADDRESS" not in os.environ:
        parser.error("set RAY_ADDRESS to the address of a running Ray cluster, such as 127.0.0.1:6379")
    ray.init(logging_level=logging.WARNING, log_to_driver=False)
    serve.start(http_options={"host": HOST, "port": port}, proxy_location="HeadOnly")
    if replica.CATALOG not in serve.status().applications:  # deploying again would replace its replica
        serve.run(operator.application(), name=replica.CATALOG, route_prefix="/")
    address = f"http://{HOST}:{port}"
    if not _answers(f"{address}/healthz"):
        sys.exit(f"Serve runs, but {address} does not answer: was it started on another port before?")
    print(f"serving at {address}, documented at {address}/docs")


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
