"""The Ray cluster that a job runs on: whether it can hold the workers, and waiting until it can."""

import json
import logging
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import ray
from ray._private.state import state
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from jobs.options import UsageError

_LOOK_S = 1.0
_TELL_S = 10.0
_GROUP = "ray.io/node-group"  # the label by which Ray marks what kind a node is


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
    """Connect to the cluster; refuse what it can never hold, with all the nodes that it may launch.

    Where it launches none, the user may be ready to wait for those that others add.

    Raises:
        UsageError: if there is no cluster, or it is too small.
    """
    try:
        ray.init(logging_level=logging.WARNING, namespace="gdl_ray", ignore_reinit_error=True)
    except ConnectionError as error:
        raise UsageError(f"no Ray cluster answers at RAY_ADDRESS ({error}); `python -m infra up`") from error
    types = node_types()
    if options.timeout_s is not None and not types:
        return
    if missing := _missing(options, [*whole_nodes(), *_launchable(types)]):
        if types:
            raise UsageError(
                f"{missing} when all nodes are up that the cluster may launch: "
                "ask for fewer or smaller ones, or raise max in the stack file"
            )
        raise UsageError(
            f"{missing} in the whole cluster: ask for fewer or smaller ones, or wait for nodes by --timeout"
        )


def node_types() -> dict[str, dict[str, Any]]:
    """Tell what kinds of nodes the cluster may launch: the resources of one, and how many at most.

    Ray's autoscaler knows them, and tells nobody; so they are read from its file, which each `up` writes anew
    and whose place the head gives in GDL_RAY_CLUSTER_FILE. None where nothing launches nodes.
    """
    file = os.environ.get("GDL_RAY_CLUSTER_FILE")
    if not file or not Path(file).exists():
        return {}
    cluster = json.loads(Path(file).read_text())
    return {
        name: {"resources": kind["resources"], "max": kind["max_workers"]}
        for name, kind in cluster["available_node_types"].items()
        if name != cluster["head_node_type"]
    }


def _launchable(types: Mapping[str, Mapping[str, Any]]) -> list[Mapping[str, float]]:
    """List what each node would have that may be launched besides those that are up."""
    up = [node["Labels"].get(_GROUP) for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    return [
        kind["resources"] for name, kind in types.items() for _ in range(max(0, kind["max"] - up.count(name)))
    ]


def wait_for_room(options: Demand) -> None:
    """Wait until the least number of workers has room, and say every ten seconds what is missing.

    A cluster that launches nodes is asked for them meanwhile.

    Raises:
        TimeoutExpired: if `--timeout` is over before.
    """
    begin = told = time.monotonic()
    asked: PlacementGroup | None = None
    try:
        while not (asked and asked.wait(0)) and (missing := _missing(options, _free())):
            asked = asked or _ask_for(options)
            now = time.monotonic()
            waited_s = now - begin
            if options.timeout_s is not None and waited_s > options.timeout_s:
                raise TimeoutExpired(f"{missing} after --timeout {options.timeout}")
            if now - told >= _TELL_S or begin == told:
                limit = f" (until --timeout {options.timeout})" if options.timeout else ""
                print(f"{options.job}: waiting: {missing}{limit}", flush=True)
                told = now
            time.sleep(_LOOK_S)
    finally:
        if asked:
            remove_placement_group(asked)


def _ask_for(options: Demand) -> PlacementGroup | None:
    """Show an autoscaler, if there is one, what is waited for: it launches nodes for what is pending."""
    return placement_group([dict(options.resources)] * options.least_places) if node_types() else None


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
