"""The Ray cluster that a job runs on: whether it can hold the workers, and waiting until it can."""

import logging
import time
from collections.abc import Iterable, Mapping
from typing import Protocol

import ray
from ray._private.state import state

from jobs.options import UsageError

_LOOK_S = 1.0
_TELL_S = 10.0


class TimeoutExpired(Exception):  # noqa: N818  (as subprocess.TimeoutExpired)
    """The workers' resources were not free in time."""


class Demand(Protocol):
    """What a job asks of the cluster."""

    @property
    def job(self) -> str:
        """Name of the job, which begins what it prints."""

    @property
    def asked(self) -> str:
        """Options that ask for workers."""

    @property
    def resources(self) -> Mapping[str, float]:
        """What Ray has to give each worker."""

    @property
    def least_places(self) -> int:
        """How many times that must be free."""

    @property
    def timeout(self) -> str:
        """How long to wait for it, as the user wrote it; empty for no limit."""

    @property
    def timeout_s(self) -> float | None:
        """The same in seconds; None where there is none."""


def connect(options: Demand) -> None:
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
    if missing := _missing(options, whole_nodes()):
        raise UsageError(
            f"{missing} in the whole cluster: ask for fewer or smaller ones, or wait for nodes by --timeout"
        )


def wait_for_room(options: Demand) -> None:
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
            print(f"{options.job}: waiting: {missing}{limit}", flush=True)
            told = now
        time.sleep(_LOOK_S)


def _free() -> list[Mapping[str, float]]:
    """List what nodes have free, but for those about to be taken away: nothing starts there any more."""
    leaving = state.get_draining_nodes()
    nodes = state.available_resources_per_node()  # type: ignore[no-untyped-call]
    return [free for node, free in nodes.items() if node not in leaving]


def places(need: Mapping[str, float], nodes: Iterable[Mapping[str, float]]) -> int:
    """Count how many times what a worker needs is to be had; no two nodes serve one worker together."""
    return sum(min(int(node.get(name, 0) // each) for name, each in need.items()) for node in nodes)


def whole_nodes() -> list[Mapping[str, float]]:
    """List what each node of the cluster has when nobody uses it."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]


def _missing(options: Demand, nodes: Iterable[Mapping[str, float]]) -> str:
    """Say what is short of what the least number of workers need; nothing if they have room."""
    need = options.resources
    room = places(need, nodes)
    if room >= options.least_places:
        return ""
    each = " and ".join(f"{amount} {name}" for name, amount in need.items())
    return f"{options.asked} need {each} each, and there is room for {room} of {options.least_places}"
