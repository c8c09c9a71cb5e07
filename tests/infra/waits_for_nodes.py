"""What a training job does on a cluster without workers; by itself, because it connects to Ray."""

import json
import time
from collections import Counter

import ray

from jobs.cluster import connect, wait_for_room
from jobs.options import UsageError, parse


def nodes() -> Counter[str]:
    """Count the nodes that are up, by their kind."""
    up = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    return Counter(next((kind for kind in ("spot", "od") if kind in has), "head") for has in up)


def main() -> None:
    job = parse(["vae", "--workers", "3", "--gpu"])
    connect(job)
    before = nodes()
    try:
        connect(parse(["vae", "--workers", "4", "--gpu"]))
        refused = ""
    except UsageError as error:
        refused = str(error)
    wait_for_room(job)
    during = nodes()
    deadline = time.monotonic() + 40
    while sum(nodes().values()) > 1 and time.monotonic() < deadline:
        time.sleep(0.5)
    print(json.dumps({"refused": refused, "before": before, "during": during, "after": nodes()}))


if __name__ == "__main__":
    main()
