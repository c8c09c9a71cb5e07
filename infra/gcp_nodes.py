"""Nodes on Google Cloud: which a stack has, and what their labels say."""

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from infra.gcloud import gcloud
from infra.nodes import HEAD, TAG
from infra.stack import Stack

STARTED = f"{TAG}-started"
"""Label that `up` gives to a head on which Ray, MLflow and Serve were once started."""
SET_UP = "up-to-date"
"""What Ray's launcher writes on a node when all that it does there is done."""

Instance = Mapping[str, Any]
"""A machine, as Google describes it."""


def instances(project: str, name: str = "*") -> list[dict[str, Any]]:
    """List the nodes of a stack in a project, or of all stacks.

    Raises:
        GcloudError: Google does not tell, also where there is no such project.
    """
    return _listed("instances", project, name)


def loose_disks(project: str, name: str = "*") -> list[dict[str, Any]]:
    """List the disks of a stack, or of all stacks, that no node uses."""
    return [each for each in _listed("disks", project, name) if not each.get("users")]


def _listed(kind: str, project: str, name: str) -> list[dict[str, Any]]:
    only = f"--filter=labels.{TAG}-stack{':*' if name == '*' else f'={name}'}"
    listed: list[dict[str, Any]] = gcloud("compute", kind, "list", f"--project={project}", only) or []
    return listed


def stack_of(resource: Mapping[str, Any]) -> str:
    """Tell by its label which stack something belongs to."""
    return str(labels(resource).get(f"{TAG}-stack", ""))


def labels(resource: Mapping[str, Any]) -> Mapping[str, str]:
    """Read the labels of something."""
    found: Mapping[str, str] = resource.get("labels") or {}
    return found


def running_head(stack: Stack) -> dict[str, Any] | None:
    """Find the head that runs, if one does."""
    every = instances(stack.project, stack.stack)
    return next((each for each in every if is_head(each) and each["status"] == "RUNNING"), None)


def is_head(instance: Instance) -> bool:
    """Tell whether it is the head of a cluster, or the one machine of a stack without workers."""
    return bool(labels(instance).get("ray-node-type", HEAD) == HEAD)


def is_off(instance: Instance) -> bool:
    """Tell whether it is stopped, so that only its disk is paid for."""
    return instance["status"] in ("TERMINATED", "STOPPED", "SUSPENDED")


def is_spot(instance: Instance) -> bool:
    """Tell whether Google may take it away, and counts it in another quota."""
    return bool((instance.get("scheduling") or {}).get("provisioningModel") == "SPOT")


def has_started(instance: Instance) -> bool:
    """Tell whether Ray, MLflow and Serve were once started on a head, though it may have failed since."""
    given = labels(instance)
    return given.get("ray-node-status") == SET_UP or STARTED in given


def mark_started(stack: Stack) -> None:
    """Note on the head that its services were started, for an `up` that comes after a failed one."""
    head = running_head(stack)
    if head and STARTED not in labels(head):
        place = (f"--project={stack.project}", f"--zone={last(head['zone'])}")
        gcloud("compute", "instances", "add-labels", head["name"], *place, f"--labels={STARTED}=yes")


def expiry(resource: Mapping[str, Any]) -> datetime | None:
    """Read when a node ends from its labels, which have no colons; None where they do not say."""
    try:
        when = labels(resource).get(f"{TAG}-expires-at", "")
        return datetime.strptime(when, "%Y-%m-%dt%H_%M_%Sz").replace(tzinfo=UTC)
    except ValueError:
        return None


def told(instance: Instance) -> str:
    """Name a node, in a line."""
    return f"{instance['name']} in {last(instance['zone'])}, {instance['status'].lower()}"


def by_zone(resources: Iterable[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Sort the names of nodes or disks by the zone that they are in."""
    found: dict[str, list[str]] = {}
    for each in resources:
        found.setdefault(last(each["zone"]), []).append(each["name"])
    return found


def last(address: str) -> str:
    """Take the name at the end of a resource's address."""
    return address.rpartition("/")[2]
