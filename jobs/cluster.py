"""The Ray cluster that a job runs on: whether it can hold the workers, and waiting until it can."""

import logging
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import ray
from ray._private.state import state

from jobs.options import Options, UsageError

_LOOK_S = 1.0
_TELL_S = 10.0


class TimeoutExpired(Exception):  # noqa: N818  (as subprocess.TimeoutExpired)
    """The workers' resources were not free in time."""


def connect(options: Options[Any]) -> None:
    """Connect to the cluster; refuse what it can never hold, unless the user is ready to wait for more nodes.

    Raises:
        UsageError: if there is no cluster, or it is too small.
    """
    try:
        ray.init(logging_level=logging.WARNING, namespace="gdl_ray", ignore_reinit_error=True)
    except ConnectionError as error:
        raise UsageError(f"no Ray cluster answers at RAY_ADDRESS ({error}); `python -m infra up`") from error
    if options.timeout_s is not None:
        return
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    for resource, each in options.resources.items():
        room = sum(int(node.get(resource, 0) // each) for node in nodes)
        if options.validate_apart and room == options.workers_range[0]:
            raise UsageError(
                f"--validate-apart needs {each} {resource} beside the {room} workers: ask for fewer of them"
            )
        if room < options.workers_range[0]:
            raise UsageError(
                f"--workers {options.workers} need {each} {resource} each, and the cluster has room for "
                f"{room} such workers: ask for fewer or smaller ones, or wait for more nodes by --timeout"
            )


def wait_for_room(options: Options[Any]) -> None:
    """Wait until the least number of workers has room, and say every ten seconds what is missing.

    Raises:
        TimeoutExpired: if `--timeout` is over before.
    """
    begin = told = time.monotonic()
    while missing := _missing(options, _free()):
        now = time.monotonic()
        waited_s = now - begin
        if options.timeout_s is not None and waited_s > options.timeout_s:
            raise TimeoutExpired(f"{missing} after --timeout {options.timeout}")
        if now - told >= _TELL_S or begin == told:
            limit = f" (until --timeout {options.timeout})" if options.timeout else ""
            print(f"jobs.train: waiting: {missing}{limit}", flush=True)
            told = now
        time.sleep(_LOOK_S)


def _free() -> Mapping[str, float]:
    """Sum up what is free, but for nodes that are about to be taken away: nothing starts there any more."""
    leaving = state.get_draining_nodes()
    free: Counter[str] = Counter()
    for node, resources in state.available_resources_per_node().items():  # type: ignore[no-untyped-call]
        if node not in leaving:
            free.update(resources)
    return free


def _missing(options: Options[Any], free: Mapping[str, float]) -> str:
    """Say which resource is short; nothing if none is."""
    least = options.workers_range[0]
    for resource, each in options.resources.items():
        if free.get(resource, 0) < least * each:
            return f"{least} workers need {least * each} {resource}, {free.get(resource, 0):g} are free"
    return ""
