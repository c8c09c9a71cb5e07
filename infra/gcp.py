"""A stack on Google Cloud, through `gcloud`: the same verbs, and a single machine where there are no workers.

With workers, Ray's own launcher is given a cluster file as on AWS; it keeps a cluster in one zone. Without,
`up` makes one machine, with or without a GPU, that runs the local platform, in the first zone that has one.
There is no state file: labels and names say what belongs to a stack.
"""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from infra import cluster, gcp_machine, gcp_teardown
from infra.folder import folder_of, make_key, public_key
from infra.gcloud import GcloudError, executable, gcloud, may_be_used, set_project
from infra.gcp_foundation import account_of, bucket_of, bucket_problems, missing, name_of
from infra.gcp_nodes import (
    expiry,
    has_started,
    instances,
    is_head,
    is_off,
    labels,
    last,
    loose_disks,
    mark_started,
    running_head,
)
from infra.nodes import HEAD, TAG, Facts, Machine
from infra.plan import Job, Node, NodePlan, Plan, Refused, Status, Step, confirm
from infra.programs import LAUNCHER, programs_missing
from infra.stack import Stack

PORTS = (8265, 5000, 8000)


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
    if job and not problems:
        fit = _fit(stack, survey, job)
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


def _fit(stack: Stack, survey: Survey, job: Job) -> cluster.Fit:
    """Tell which nodes a job would get; without workers, whether the one machine holds it."""
    if stack.workers:
        return cluster.fit(_render(stack, survey, code="-"), job.bundles)
    has = survey.machines[stack.head.type]
    if job.workers * job.cpu <= has.cpus and job.workers * job.gpu <= has.gpus:
        return cluster.Fit({})
    return cluster.Fit(
        {},
        f"the one machine, {stack.head.type}, has {has.cpus} CPU, {has.gpus} GPU: "
        "ask for less, or choose a larger machine type, or workers",
    )


def _survey(stack: Stack) -> Survey:
    head = running_head(stack)
    machines, zones = _machine_types(stack)
    if head:  # others would be other nodes to Ray, which would end those that run
        zones = (last(head["zone"]),)
    problems = (
        [] if zones else [f"no zone of {stack.region} has {_kinds(stack)}: choose another region, or types"]
    )
    image = gcp_machine.image(labels(head or {}).get(f"{TAG}-image", ""))
    expires_at = expiry(head or {}) or datetime.now(UTC) + timedelta(hours=stack.ttl_hours)
    problems += [
        *gcp_machine.quota_problems(stack, machines),
        *bucket_problems(stack),
        *_launcher_problems(stack),
    ]
    return Survey(machines, zones, image, f"{expires_at:%Y-%m-%dT%H:%M:%SZ}", problems, head)


def _launcher_problems(stack: Stack) -> list[str]:
    """Say what Ray's launcher would miss: it asks Google by itself, with credentials of its own."""
    if not stack.workers:
        return []
    problems = programs_missing(LAUNCHER)
    if find_spec("googleapiclient") is None:
        problems.append("google-api-python-client is not installed: `pip install 'gdl_ray[gcp]'`")
    if not may_be_used("auth", "application-default", "print-access-token"):
        problems.append(
            "Ray's launcher finds no credentials for Google Cloud: `gcloud auth application-default login`"
        )
    return problems


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
        offered.setdefault(last(row["zone"]), set()).add(row["name"])
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
            confirm(f"Do this in {stack.project}?", yes)
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
        no_restart = bool(survey.head and has_started(survey.head)) and not restart
        ray_up = partial(_ray_up, stack, survey, no_restart=no_restart)
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
    if not folder.key.exists():
        make_key(folder.key, name_of(stack))
    rendered = _render(stack, survey, code=folder.pack())
    if problems := cluster.validate(rendered):
        raise Refused("\n".join(f"cluster file: {problem}" for problem in problems))
    options = ["--no-restart"] if no_restart else []
    if code := _ray("up", "-y", "--no-config-cache", *options, str(folder.write(rendered))):
        raise Refused(f"`ray up` ends with exit code {code}, see above; run `up` again to go on")
    mark_started(stack)


def _render(stack: Stack, survey: Survey, *, code: str) -> dict[str, Any]:
    folder = folder_of(stack)
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
        public_key=public_key(folder.key) if folder.key.exists() else "",
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
        machines = instances(stack.project, stack.stack)
        disks = loose_disks(stack.project, stack.stack)
        drift = [f"make {thing.what}" for thing in missing(stack)] if machines else []
    except GcloudError as error:
        raise error.refusal() from error
    moments = [moment for each in machines if (moment := expiry(each))]
    orphans = [
        f"{each['name']} is {each['status'].lower()}: its disk costs money"
        for each in machines
        if is_off(each)
    ]
    orphans += [f"disk {each['name']} belongs to no machine" for each in disks]
    if machines and not any(is_head(each) for each in machines):
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
        type=last(instance["machineType"]),
        zone=last(instance["zone"]),
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
    try:
        return subprocess.run(command).returncode  # noqa: S603
    except KeyboardInterrupt:  # which is how it ends
        return 0


def tunnel_command(stack: Stack) -> list[str]:
    """Give the command that opens the tunnel.

    Raises:
        Refused: There is no head.
    """
    try:
        head = running_head(stack)
    except GcloudError as error:
        raise error.refusal() from error
    if head is None:
        raise Refused(f"{stack.stack} has no head that runs: `python -m infra up -f` its file starts one")
    place = [f"--zone={last(head['zone'])}", f"--project={stack.project}", "--tunnel-through-iap"]
    forwards = [word for port in PORTS for word in ("-L", f"{port}:localhost:{port}")]
    return [executable(), "compute", "ssh", head["name"], *place, "--", "-N", *forwards]


def down(stack: Stack, *, yes: bool, delete_data: bool = False) -> list[str]:
    """End nodes, network and accounts; the bucket stays unless data are to be deleted.

    Returns:
        What is left, a line for each.

    Raises:
        Refused: Google could not be asked, or nobody has agreed.
    """
    folder = folder_of(stack)
    try:
        found = gcp_teardown.remains(stack, with_data=delete_data)
        if not found.lines:
            return []
        print("\n".join(f"  {line}" for line in found.lines), flush=True)
        confirm("End all of this?", yes)
        if stack.workers and found.nodes and folder.cluster.exists():
            _ray("down", "-y", str(folder.cluster))  # its way of saying goodbye; what it leaves is ended here
        left = gcp_teardown.end(stack, with_data=delete_data)
    except GcloudError as error:
        raise error.refusal() from error
    if not left:
        shutil.rmtree(folder.path, ignore_errors=True)
    return left


def gc(
    *, regions: tuple[str, ...] = (), expired: bool = True, yes: bool = False, project: str = ""
) -> list[str]:
    """Find what stacks have left behind, and end it after asking; where nobody is to be asked, only find it.

    Args:
        regions: Where to look; everywhere when empty.
        expired: Only stacks whose time is over, and remains of a `down` that was cut short.
        yes: End it without asking.
        project: Where to look; the project that gcloud is set to when empty.

    Returns:
        What is left, a line for each.

    Raises:
        Refused: Google could not be asked, or does not allow it.
    """
    try:
        stacks = gcp_teardown.stacks_in(project or set_project(), regions=regions, expired=expired)
        found = [line for each in stacks for line in gcp_teardown.remains(each, with_data=False).lines]
        found = list(dict.fromkeys(found))  # a stack that is in two regions has one network
        if not found or not (yes or sys.stdin.isatty()):
            return found
        print("\n".join(f"  {line}" for line in found), flush=True)
        confirm("End all of this?", yes)
        # Tried again where something is left: the network of two regions goes after both of its subnets.
        again = [each for each in stacks if gcp_teardown.end(each, with_data=False)]
        return [line for each in again for line in gcp_teardown.end(each, with_data=False)]
    except GcloudError as error:
        raise error.refusal() from error


def _kinds(stack: Stack) -> str:
    return " and ".join(dict.fromkeys([stack.head.type, *(each.type for each in stack.workers)]))
