"""Ending a stack on Google Cloud, whole: what of it there is, and what is left after all was tried."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

from infra.gcloud import GcloudError, gcloud, gone
from infra.gcp_foundation import Thing, things
from infra.gcp_nodes import (
    by_zone,
    expiry,
    instances,
    last,
    loose_disks,
    stack_of,
    told,
)
from infra.nodes import TAG
from infra.stack import Stack

_JUST_NOW = timedelta(days=1)
"""As long as this after it was made, a network without nodes is not taken for a leftover."""


@dataclass(frozen=True)
class Remains:
    """What there is of a stack that costs money, gives rights, or stands in the way."""

    nodes: Sequence[Mapping[str, Any]]
    disks: Sequence[Mapping[str, Any]]
    things: Sequence[Thing]

    @property
    def lines(self) -> list[str]:
        """Name all of it, a line for each."""
        disks = [f"disk {each['name']} in {last(each['zone'])}" for each in self.disks]
        return [*map(told, self.nodes), *disks, *(thing.what for thing in self.things)]


def remains(stack: Stack, *, with_data: bool) -> Remains:
    """Look what there is of a stack; only its name, project and region count.

    Raises:
        GcloudError: Google does not tell.
    """
    owned = [each for each in things(stack) if each.end and (with_data or not each.is_data)]
    if not stack.region:  # no subnet was found, which alone is in a region
        owned = [each for each in owned if "subnets" not in each.look]
    with ThreadPoolExecutor(6) as pool:
        there = pool.map(Thing.is_there, owned)
        found = [thing for thing, is_there in zip(owned, there, strict=True) if is_there]
    where = (stack.project, stack.stack)
    return Remains(instances(*where), loose_disks(*where), found)


def end(stack: Stack, *, with_data: bool) -> list[str]:
    """Delete all of a stack; what cannot be deleted does not keep the rest from it.

    Returns:
        What is left, a line for each, with what Google said of it.

    Raises:
        GcloudError: Google does not tell what there is.
    """
    where = (stack.project, stack.stack)
    said: dict[str, str] = {}
    for _ in range(2):  # the head may have launched others while it was deleted
        said |= _delete("instances", instances(*where), stack.project)
    said |= _delete("disks", loose_disks(*where), stack.project)
    for thing in reversed(remains(stack, with_data=with_data).things):
        print(f"  delete {thing.what}", flush=True)
        said |= _tried(thing.what, thing.delete)
    left = remains(stack, with_data=with_data)
    kinds = [f"instances in {last(each['zone'])}" for each in left.nodes]
    kinds += [f"disks in {last(each['zone'])}" for each in left.disks]
    kinds += [thing.what for thing in left.things]
    return [
        f"{line}: {said[kind]}" if kind in said else line
        for line, kind in zip(left.lines, kinds, strict=True)
    ]


def _delete(kind: str, resources: Iterable[Mapping[str, Any]], project: str) -> dict[str, str]:
    """Delete `instances` with their disks, or `disks`, those of a zone in one command."""
    said: dict[str, str] = {}
    for zone, names in by_zone(resources).items():
        print(f"  delete {', '.join(names)}", flush=True)
        words = ["compute", kind, "delete", *names, f"--zone={zone}", f"--project={project}"]
        words += ["--delete-disks=all"] if kind == "instances" else []
        said |= _tried(f"{kind} in {zone}", partial(gone, *words))
    return said


def _tried(what: str, call: Callable[[], None]) -> dict[str, str]:
    """Delete something; returns what Google said, under its name, if it would not."""
    try:
        call()
    except GcloudError as error:
        return {what: str(error.refusal())}
    return {}


def stacks_in(project: str, *, regions: Sequence[str], expired: bool) -> list[Stack]:
    """Find the stacks of a project by labels and names, one for each region that it has something in.

    Args:
        project: Where to look.
        regions: Only stacks that have something in one of these; all when empty.
        expired: Only stacks whose nodes are all past their time, or that have none and no fresh network.

    Raises:
        GcloudError: Google does not tell.
    """
    nodes = instances(project)
    asked = f"--project={project}"
    networks = gcloud("compute", "networks", "list", asked, f"--filter=name~^{TAG}-") or []
    subnets = gcloud("compute", "networks", "subnets", "list", asked, f"--filter=name~^{TAG}-") or []
    accounts = gcloud("iam", "service-accounts", "list", asked) or []
    where: dict[str, set[str]] = {name: set() for name in _named(networks, accounts)}
    for each in [*nodes, *loose_disks(project)]:
        where.setdefault(stack_of(each), set()).add(last(each["zone"]).rpartition("-")[0])
    for each in subnets:
        where.setdefault(each["name"].removeprefix(f"{TAG}-"), set()).add(last(each["region"]))
    alive = _alive(nodes, networks) if expired else set()
    return [
        Stack(stack=name, cloud="gcp", project=project, region=region)
        for name, places in sorted(where.items())
        if name not in alive
        for region in sorted(places) or [""]
        if not regions or region in regions
    ]


def _named(networks: Iterable[Mapping[str, Any]], accounts: Iterable[Mapping[str, Any]]) -> set[str]:
    """Read the names of stacks from those of networks and accounts; of accounts, only from ours."""
    names = {each["name"].removeprefix(f"{TAG}-") for each in networks}
    for each in accounts:
        match = re.fullmatch(r"gdl_ray (\S+) (?:head|worker)", each.get("displayName", ""))
        if match and each["email"].startswith(f"gdl-{match[1]}-"):
            names.add(match[1])
    return names


def _alive(nodes: Iterable[Mapping[str, Any]], networks: Iterable[Mapping[str, Any]]) -> set[str]:
    """Name the stacks that have a node within its time, or of unknown time, or that are just being made."""
    now = datetime.now(UTC)
    names = {stack_of(each) for each in nodes if (expiry(each) or now) >= now}
    return names | {
        each["name"].removeprefix(f"{TAG}-")
        for each in networks
        if now - datetime.fromisoformat(each["creationTimestamp"]) < _JUST_NOW
    }
