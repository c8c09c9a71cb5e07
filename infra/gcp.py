"""A stack on Google Cloud, through `gcloud`: the same verbs, and a single machine where there are no workers.

With workers, Ray's own launcher is given a cluster file as on AWS; it keeps a cluster in one zone. Without,
`up` makes one machine, with or without a GPU, that runs the local platform, in the first zone that has one.
There is no state file: labels and names say what belongs to a stack.
"""

import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

from infra import cluster, gcp_machine
from infra.folder import folder_of
from infra.gcloud import GcloudError, executable, found, gcloud, gone
from infra.gcp_foundation import account_of, bucket_of, missing, name_of, things
from infra.nodes import HEAD, TAG, Facts, Machine
from infra.plan import Job, Node, NodePlan, Plan, Refused, Status
from infra.stack import Stack

PORTS = (8265, 5000, 8000)


@dataclass(frozen=True)
class Step:
    """Something that `up` is to do: what, in a line, and the call that does it."""

    what: str
    do: Callable[[], object]


@dataclass(frozen=True)
class Survey:
    """What was found out before anything is made: machine types, zones in the order to try, the image."""

    machines: Mapping[str, Machine]
    zones: tuple[str, ...]
    image: str
    expires_at: str
    problems: list[str]
    head: Mapping[str, Any] | None
    """The head that runs, as Google describes it."""


def plan(stack: Stack, job: Job | None = None) -> Plan:
    """Say what `up` would do and why it would refuse; nothing is changed.

    Raises:
        Refused: Google could not be asked.
    """
    try:
        survey = _survey(stack)
        return _plan(stack, survey, _steps(stack, survey), job)
    except GcloudError as error:
        raise error.refusal() from error


def _plan(stack: Stack, survey: Survey, steps: list[Step], job: Job | None) -> Plan:
    problems, fits = list(survey.problems), {}
    if job and stack.workers and not problems:
        fit = cluster.fit(_render(stack, survey, code="-"), job.bundles)
        fits[str(job)] = str(fit)
        problems += [f"job {job}: never fits: {fit.reason}"] if fit.reason else []
    kinds = [(HEAD, stack.head.type, "on-demand", 1)]
    kinds += [(each.name, each.type, each.market, each.max) for each in stack.workers]
    return Plan(
        steps=[step.what for step in steps],
        nodes=[
            NodePlan(name=name, type=kind, market=market, max=most, zones=survey.zones, usd_per_hour=None)
            for name, kind, market, most in kinds
        ],
        worst_usd_per_hour=None,  # Google tells prices to nobody but who has a key for that
        image=survey.image,
        problems=problems,
        fits=fits,
    )


def _survey(stack: Stack) -> Survey:
    head = next((each for each in _instances(stack) if _is_head(each) and each["status"] == "RUNNING"), None)
    labels: Mapping[str, str] = (head or {}).get("labels", {})
    machines, zones = _machine_types(stack)
    if head:  # others would be other nodes to Ray, which would end those that run
        zones = (_last(head["zone"]),)
    problems = (
        [] if zones else [f"no zone of {stack.region} has {_kinds(stack)}: choose another region, or types"]
    )
    image = gcp_machine.image(labels.get(f"{TAG}-image", ""))
    expires_at = _moment(labels) or datetime.now(UTC) + timedelta(hours=stack.ttl_hours)
    problems += gcp_machine.quota_problems(stack, machines)
    return Survey(machines, zones, image, f"{expires_at:%Y-%m-%dT%H:%M:%SZ}", problems, head)


def _machine_types(stack: Stack) -> tuple[dict[str, Machine], tuple[str, ...]]:
    """Ask what the machine types have, and which zones have all of them."""
    kinds = {stack.head.type, *(each.type for each in stack.workers)}
    wanted = f"name=({' '.join(sorted(kinds))}) AND zone~^{stack.region}-"
    rows = (
        gcloud("compute", "machine-types", "list", f"--project={stack.project}", f"--filter={wanted}") or []
    )
    machines = {row["name"]: gcp_machine.machine(row, stack) for row in rows}
    offered: dict[str, set[str]] = {}
    for row in rows:
        offered.setdefault(_last(row["zone"]), set()).add(row["name"])
    zones = sorted(zone for zone, names in offered.items() if names == kinds)
    if stack.zones != "auto":
        zones = [zone for zone in stack.zones if zone in zones]
    return machines, tuple(zones)


def up(stack: Stack, *, yes: bool, foundation_only: bool = False, restart: bool = False) -> None:
    """Make what there is as the stack says, and launch its head or its one machine.

    Args:
        stack: What should be.
        yes: Do not ask before it begins.
        foundation_only: Make what nodes need, and no node.
        restart: Start Ray on the head again, which ends the jobs that run.

    Raises:
        Refused: It may not or cannot be; run again, it goes on where it stopped.
    """
    try:
        survey = _survey(stack)
        todo = _steps(stack, survey, foundation_only=foundation_only, restart=restart)
        planned = _plan(stack, survey, todo, None)
        print("\n".join(planned.lines()), flush=True)
        if planned.problems:
            raise Refused("\n".join(planned.problems))
        if todo:
            _confirm(f"Do this in {stack.project}?", yes)
        for step in todo:
            print(f"  {step.what}", flush=True)
            step.do()
    except GcloudError as error:
        raise error.refusal() from error


def _steps(
    stack: Stack, survey: Survey, *, foundation_only: bool = False, restart: bool = False
) -> list[Step]:
    todo = [Step(f"make {thing.what}", thing.create) for thing in missing(stack)]
    if foundation_only:
        return todo
    if stack.workers:
        ray_up = partial(_ray_up, stack, survey, no_restart=bool(survey.head) and not restart)
        what = "update the head" if survey.head else f"launch the head, {stack.head.type},"
        return [*todo, Step(f"{what} with `ray up`", ray_up)]
    if survey.head:
        return todo
    create = partial(
        gcp_machine.create, stack, survey.zones, survey.image, survey.expires_at, folder_of(stack)
    )
    return [*todo, Step(f"make machine {name_of(stack)}, {stack.head.type}", create)]


def _ray_up(stack: Stack, survey: Survey, *, no_restart: bool) -> None:
    """Render the cluster file, and give it to Ray's launcher."""
    folder = folder_of(stack)
    folder.make()
    if survey.head and not folder.key.exists():
        raise Refused(
            f"{folder.key} is not here: copy {folder.path} from the machine that has made the stack"
        )
    gcp_machine.make_key(folder)
    rendered = _render(stack, survey, code=folder.pack())
    if problems := cluster.validate(rendered):
        raise Refused("\n".join(f"cluster file: {problem}" for problem in problems))
    options = ["--no-restart"] if no_restart else []
    if code := _ray("up", "-y", "--no-config-cache", *options, str(folder.write(rendered))):
        raise Refused(f"`ray up` ends with exit code {code}, see above; run `up` again to go on")


def _render(stack: Stack, survey: Survey, *, code: str) -> dict[str, Any]:
    folder = folder_of(stack)
    public = folder.key.with_suffix(".pub")
    facts = Facts(
        folder=folder,
        code=code,
        image_id=survey.image,
        machines=survey.machines,
        bucket=bucket_of(stack),
        expires_at=survey.expires_at,
        zones=dict.fromkeys([HEAD, *(each.name for each in stack.workers)], survey.zones),
        head_account=account_of(stack, "head"),
        worker_account=account_of(stack, "worker"),
        public_key=public.read_text().strip() if public.exists() else "",
    )
    return cluster.render(stack, facts)


def _ray(*arguments: str) -> int:
    command = [str(Path(sys.executable).with_name("ray")), *arguments]
    env = os.environ | {"RAY_USAGE_STATS_ENABLED": "0"}
    return subprocess.run(command, env=env, stdin=subprocess.DEVNULL).returncode  # noqa: S603


def status(stack: Stack) -> Status:
    """Say which nodes there are, when they end, and what is otherwise than it should be.

    Raises:
        Refused: Google could not be asked.
    """
    try:
        machines = _instances(stack)
        drift = [f"make {thing.what}" for thing in missing(stack)] if machines else []
    except GcloudError as error:
        raise error.refusal() from error
    moments = [moment for each in machines if (moment := _moment(each.get("labels", {})))]
    orphans = [
        f"{each['name']} is {each['status'].lower()}: its disk costs money"
        for each in machines
        if _is_off(each)
    ]
    if machines and not any(_is_head(each) for each in machines):
        orphans += [f"{each['name']} has no head" for each in machines]
    return Status(
        nodes=[_node(each) for each in machines],
        usd_so_far=None if machines else 0.0,
        expires_at=f"{max(moments):%Y-%m-%dT%H:%M:%SZ}" if moments else "",
        drift=drift,
        orphans=orphans,
    )


def _node(instance: Mapping[str, Any]) -> Node:
    age = datetime.now(UTC) - datetime.fromisoformat(instance["creationTimestamp"])
    return Node(
        name=instance["name"],
        type=_last(instance["machineType"]),
        zone=_last(instance["zone"]),
        state=instance["status"].lower(),
        age_h=age.total_seconds() / 3600,
        usd=None,
    )


def tunnel(stack: Stack) -> int:
    """Bring dashboard, MLflow and endpoints to this machine through Google's proxy, until Ctrl-C.

    Raises:
        Refused: There is no head.
    """
    folder = folder_of(stack)
    command = tunnel_command(stack)
    print(f"export RAY_ADDRESS=http://127.0.0.1:{PORTS[0]}")
    if stack.workers:
        print(f"export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={shlex.quote(str(folder.token))}")
        print(f"# MLflow, http://127.0.0.1:{PORTS[1]}: name and password are in {folder.secrets}")
    print(f"# endpoints: http://127.0.0.1:{PORTS[2]}; Ctrl-C ends it", flush=True)
    return subprocess.run(command).returncode  # noqa: S603


def tunnel_command(stack: Stack) -> list[str]:
    """Give the command that opens the tunnel.

    Raises:
        Refused: There is no head.
    """
    try:
        heads = [each for each in _instances(stack) if _is_head(each) and each["status"] == "RUNNING"]
    except GcloudError as error:
        raise error.refusal() from error
    if not heads:
        raise Refused(f"{stack.stack} has no head that runs: `python -m infra up -f` its file starts one")
    place = [f"--zone={_last(heads[0]['zone'])}", f"--project={stack.project}", "--tunnel-through-iap"]
    forwards = [word for port in PORTS for word in ("-L", f"{port}:localhost:{port}")]
    return [executable(), "compute", "ssh", heads[0]["name"], *place, "--", "-N", *forwards]


def down(stack: Stack, *, yes: bool, delete_data: bool = False) -> list[str]:
    """End nodes, network and accounts; the bucket stays unless data are to be deleted.

    Returns:
        What is left, a line for each.

    Raises:
        Refused: Google could not be asked, or nobody has agreed.
    """
    folder = folder_of(stack)
    try:
        machines = _instances(stack)
        _confirm(f"End {len(machines)} nodes and all else of {stack.stack}?", yes)
        if stack.workers and machines and folder.cluster.exists():
            _ray("down", "-y", str(folder.cluster))  # its way of saying goodbye; what it leaves is ended here
        _end_nodes(_instances(stack))
        for thing in reversed(things(stack)):
            if thing.end and (delete_data or not thing.is_data):
                print(f"  delete {thing.what}", flush=True)
                thing.delete()
        left = [f"{each['name']} in {_last(each['zone'])}" for each in _instances(stack)]
        absent = {thing.what for thing in missing(stack)}
        owned = [thing for thing in things(stack) if thing.end and (delete_data or not thing.is_data)]
        return left + [thing.what for thing in owned if thing.what not in absent]
    except GcloudError as error:
        raise error.refusal() from error


def gc(*, regions: tuple[str, ...] = (), expired: bool = True, yes: bool = False) -> list[str]:
    """End nodes of any stack in the project that gcloud is set to: those past their time, or all.

    Returns:
        What is left, a line for each.

    Raises:
        Refused: Google could not be asked.
    """
    try:
        every = gcloud("compute", "instances", "list", f"--filter=labels.{TAG}-stack:*") or []
        chosen = [each for each in every if not regions or _last(each["zone"]).rpartition("-")[0] in regions]
        if expired:
            now = datetime.now(UTC)
            chosen = [each for each in chosen if (end := _moment(each.get("labels", {}))) and end < now]
        lines = [f"{each['name']} in {_last(each['zone'])}, {each['status'].lower()}" for each in chosen]
        if not chosen or not yes:
            return lines
        _end_nodes(chosen)
        names = {each["name"] for each in gcloud("compute", "instances", "list") or []}
        return [line for line, each in zip(lines, chosen, strict=True) if each["name"] in names]
    except GcloudError as error:
        raise error.refusal() from error


def _end_nodes(instances: Iterable[Mapping[str, Any]]) -> None:
    """Delete nodes with their disks, those of a zone in one command."""
    by_zone: dict[tuple[str, str], list[str]] = {}
    for each in instances:
        project = each["zone"].partition("/projects/")[2].partition("/")[0]
        by_zone.setdefault((_last(each["zone"]), project), []).append(each["name"])
    for (zone, project), names in by_zone.items():
        print(f"  delete {', '.join(names)}", flush=True)
        place = [f"--zone={zone}", *([f"--project={project}"] if project else [])]
        gone("compute", "instances", "delete", *names, *place, "--delete-disks=all")


def _instances(stack: Stack) -> list[dict[str, Any]]:
    only = f"--filter=labels.{TAG}-stack={stack.stack}"
    listed: list[dict[str, Any]] = (
        found("compute", "instances", "list", f"--project={stack.project}", only) or []
    )
    return listed


def _is_head(instance: Mapping[str, Any]) -> bool:
    """Tell whether it is the head of a cluster, or the one machine of a stack without workers."""
    return bool(instance.get("labels", {}).get("ray-node-type", HEAD) == HEAD)


def _is_off(instance: Mapping[str, Any]) -> bool:
    return instance["status"] in ("TERMINATED", "STOPPED", "SUSPENDED")


def _moment(labels: Mapping[str, str]) -> datetime | None:
    """Read when a node ends from its labels, which have no colons."""
    try:
        return datetime.strptime(labels.get(f"{TAG}-expires-at", ""), "%Y-%m-%dt%H_%M_%Sz").replace(
            tzinfo=UTC
        )
    except ValueError:
        return None


def _last(address: str) -> str:
    """Take the name at the end of a resource's address."""
    return address.rpartition("/")[2]


def _kinds(stack: Stack) -> str:
    return " and ".join(dict.fromkeys([stack.head.type, *(each.type for each in stack.workers)]))


def _confirm(question: str, yes: bool) -> None:
    if yes:
        return
    if not sys.stdin.isatty():
        raise Refused(f"nobody is there to ask {question!r}: give --yes to go on without")
    if input(f"{question} [y/N] ").strip().lower() not in ("y", "yes"):
        raise Refused("not confirmed: nothing was done")
