"""A stack on Amazon's cloud: plan it, make it so, look at it, reach it, end it, and find what is left behind.

`boto3` makes what Ray's launcher does badly or not at all: a closed network, narrow roles, a bucket, a key,
and checks of permission, quota and price before anything is paid for. An ordinary cluster file is rendered
from that, and Ray's own `ray up` launches the head, which launches the workers.
"""

import ipaddress
import shlex
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from infra import aws_launch, aws_teardown, preflight
from infra.aws_cloud import EXPIRES, ZONES, Cloud, Machine, tags_of
from infra.aws_errors import explained
from infra.aws_foundation import key_problems, steps
from infra.folder import folder_of
from infra.plan import Job, Node, Plan, Refused, Status, Step, confirm
from infra.preflight import Survey
from infra.stack import Stack

ROUNDS = 4
"""How often `up` looks again at most; a second look finds nothing unless others are at work there too."""
PORTS = {"ray": 8265, "mlflow": 5000, "serve": 8000}
CHECKIP = "https://checkip.amazonaws.com"


@dataclass(frozen=True)
class View:
    """What was seen of a stack: AWS, what was found out, what is to be done, and what stands against it."""

    cloud: Cloud
    survey: Survey
    steps: list[Step]
    problems: list[str]


def plan(stack: Stack, job: Job | None = None) -> Plan:
    """Say what `up` would do, what it may cost and why it would refuse; nothing is changed.

    Raises:
        Refused: AWS could not be asked.
    """
    with explained():
        return _plan(stack, _look(stack), job)


def up(stack: Stack, *, yes: bool, foundation_only: bool = False, restart: bool = False) -> None:
    """Make what there is as the stack says, and launch its head; nothing is done where all is so already.

    Args:
        stack: What should be.
        yes: Do not ask before it begins.
        foundation_only: Make what nodes need, and no node.
        restart: Start Ray on the head again, which ends the jobs that run.

    Raises:
        Refused: It may not or cannot be; run again, it goes on where it stopped.
    """
    with explained():
        view = _look(stack, foundation_only=foundation_only, restart=restart)
        planned = _plan(stack, view, None)
        print("\n".join(planned.lines()), flush=True)
        if planned.problems:
            raise Refused("\n".join(planned.problems))
        if view.steps:
            confirm(f"Do this in {stack.region}?", yes)
        for _ in range(ROUNDS):
            if not view.steps:
                return
            for number, step in enumerate(view.steps, 1):
                print(f"[{number}/{len(view.steps)}] {step.what}", flush=True)
                step.do()
            view = _look(stack, survey=view.survey, foundation_only=foundation_only)
        raise Refused(
            f"{stack.stack} is changed by others too ({view.steps[0].what}): find out who works on it"
        )


def _look(
    stack: Stack, *, survey: Survey | None = None, foundation_only: bool = False, restart: bool = False
) -> View:
    """See what there is of a stack, and what is to be done.

    Image and zones stay those with which the running head was launched: others would be other nodes to Ray,
    which would end those that run.
    """
    cloud = Cloud(stack.stack, stack.region)
    folder = folder_of(stack)
    head = cloud.head()
    if survey is None:
        zones = tags_of(cloud.group() or {}).get(ZONES, "") if head else ""
        survey = preflight.survey(cloud, stack, head.image if head else "", zones.split())
    todo, problems = steps(cloud, stack, folder.key, _cidr(stack)), key_problems(cloud, folder.key)
    if not foundation_only and not problems:  # without the key, nothing can be done to the head
        todo += aws_launch.steps(cloud, stack, survey, folder, restart=restart)
    return View(cloud, survey, todo, problems)


def _plan(stack: Stack, view: View, job: Job | None) -> Plan:
    survey = view.survey
    problems = [
        *aws_launch.tools_missing(stack),
        *view.problems,
        *survey.problems,
        *preflight.budget_problems(stack, survey),
        *preflight.permission_problems(view.cloud, stack, survey),
    ]
    fit = aws_launch.fit(view.cloud, stack, survey, folder_of(stack), job) if job else None
    if fit and fit.reason:
        problems.append(f"job {job}: never fits: {fit.reason}")
    return Plan(
        steps=[step.what for step in view.steps],
        nodes=preflight.node_plans(stack, survey),
        worst_usd_per_hour=preflight.worst_usd_per_hour(stack, survey),
        image=survey.image,
        problems=list(dict.fromkeys(problems)),
        fits={str(job): str(fit)} if fit else {},
    )


def _cidr(stack: Stack) -> str:
    """Tell which addresses may connect by ssh; none where users come through AWS Systems Manager."""
    if stack.access.mode == "ssm":
        return ""
    return caller_cidr() if stack.access.cidr == "auto" else stack.access.cidr


def caller_cidr() -> str:
    """Ask Amazon which address this machine has on the internet.

    Raises:
        Refused: There is no answer.
    """
    try:
        with urllib.request.urlopen(CHECKIP, timeout=10) as answer:
            return f"{ipaddress.IPv4Address(answer.read().decode().strip())}/32"
    except (OSError, ValueError) as error:
        raise Refused(
            f"access.cidr: 'auto' finds no address of this machine ({error}): write one, as 203.0.113.7/32"
        ) from error


def status(stack: Stack) -> Status:
    """Say which nodes there are, what they have cost, when they end, and what is otherwise than it should be.

    Raises:
        Refused: AWS could not be asked.
    """
    with explained():
        view = _look(stack, foundation_only=True)
        machines = view.cloud.machines()
        exists = machines or view.cloud.groups()
        nodes = [_node(machine, view.survey) for machine in machines]
        costs = [node.usd for node in nodes]
        moments = [machine.tags[EXPIRES] for machine in machines if EXPIRES in machine.tags]
        return Status(
            nodes=nodes,
            usd_so_far=None if None in costs else sum(cost or 0 for cost in costs),
            expires_at=max(moments, default=""),
            drift=[step.what for step in view.steps] if exists else [],
            orphans=_orphans(view.cloud, machines),
        )


def _node(machine: Machine, survey: Survey) -> Node:
    age_h = (datetime.now(UTC) - machine.launched).total_seconds() / 3600
    price = survey.price(machine.type, "spot" if machine.spot else preflight.ON_DEMAND, machine.zone)
    return Node(
        name=f"{machine.kind} {machine.id}",
        type=machine.type,
        zone=machine.zone,
        state=machine.state,
        age_h=age_h,
        usd=None if price is None else price * age_h,
    )


def _orphans(cloud: Cloud, machines: Sequence[Machine]) -> list[str]:
    """Tell what costs money for nothing: nodes without a head, stopped or overdue nodes, loose disks."""
    heads = [machine for machine in machines if machine.is_head and machine.runs]
    found = [f"{head.kind} {head.id} ({head.type}, {head.state}) is one head too many" for head in heads[1:]]
    for machine in machines:
        told = f"{machine.kind} {machine.id} ({machine.type}, {machine.state})"
        if machine.state == "stopped":
            found.append(f"{told} is stopped, and its disk is paid for")
        elif machine.runs and not heads:
            found.append(f"{told} has no head")
        elif machine.runs and aws_teardown.is_over(machine.tags):
            found.append(f"{told} should have ended at {machine.tags[EXPIRES]}")
    return found + [f"volume {volume} belongs to no machine" for volume in cloud.volumes(("available",))]


def tunnel(stack: Stack) -> int:
    """Bring Ray's dashboard, MLflow and Serve to this machine's loopback, until Ctrl-C.

    Returns:
        Exit code of ssh.

    Raises:
        Refused: No head runs, or its key is on another machine.
    """
    with explained():
        command = tunnel_command(stack)
    folder = folder_of(stack)
    print(f"export RAY_ADDRESS=http://127.0.0.1:{PORTS['ray']} RAY_AUTH_MODE=token")
    print(f"export RAY_AUTH_TOKEN_PATH={shlex.quote(str(folder.token))}")
    print(f"export MLFLOW_TRACKING_URI=http://127.0.0.1:{PORTS['mlflow']}")
    print(f"set -a; . {shlex.quote(str(folder.secrets))}; set +a    # MLflow's user and password")
    print(f"Serve: http://127.0.0.1:{PORTS['serve']}; Ctrl-C closes the tunnel", flush=True)
    return subprocess.call(command)  # noqa: S603


def tunnel_command(stack: Stack) -> list[str]:
    """Write the ssh command that forwards the ports of the platform, and does nothing else.

    Raises:
        Refused: No head runs, or its key is on another machine.
    """
    head = Cloud(stack.stack, stack.region).head()
    key = folder_of(stack).key
    if head is None:
        raise Refused(
            f"no head of {stack.stack} runs in {stack.region}: `python -m infra up -f` its file starts one"
        )
    if not key.exists():
        raise Refused(f"the key of {stack.stack} is on another machine: copy {key.parent} from it")
    command = ["ssh", "-N", "-i", str(key), "-o", "IdentitiesOnly=yes", "-o", "ExitOnForwardFailure=yes"]
    command += [
        "-o",
        "StrictHostKeyChecking=accept-new",
        "-o",
        f"UserKnownHostsFile={key.parent}/known_hosts",
    ]
    for port in PORTS.values():
        command += ["-L", f"127.0.0.1:{port}:127.0.0.1:{port}"]
    if stack.access.mode == "ssm":
        proxy = f"aws ssm start-session --region {stack.region} --target %h "
        command += [
            "-o",
            f"ProxyCommand={proxy}--document-name AWS-StartSSHSession --parameters portNumber=%p",
        ]
        return [*command, f"ubuntu@{head.id}"]
    return [*command, f"ubuntu@{head.address}"]


def down(stack: Stack, *, yes: bool, delete_data: bool = False) -> list[str]:
    """End all of a stack, and make sure that it is gone.

    Args:
        stack: Which; its name and region count.
        yes: Do not ask before it begins.
        delete_data: Delete the bucket that was made for it too, with all that is in it.

    Returns:
        What is left, a line for each; empty when all is gone.

    Raises:
        Refused: AWS could not be asked, or does not allow it.
    """
    with explained():
        cloud, folder = Cloud(stack.stack, stack.region), folder_of(stack)
        found = aws_teardown.remaining(cloud, with_data=delete_data)
        if not found:  # perhaps only because another account was asked: its key stays
            _tell(f"account {cloud.account} has nothing of {stack.stack} in {stack.region}")
            return []
        print("\n".join(f"  {line}" for line in found), flush=True)
        confirm("End all of this?", yes)
        if cloud.head() is not None and folder.cluster.exists():
            aws_launch.ray("down", "-y", str(folder.cluster))  # what it does not end, is ended below
        left = aws_teardown.end(cloud, delete_data=delete_data, tell=_tell)
    if not left:
        shutil.rmtree(folder.path, ignore_errors=True)
    return left


def gc(
    *, regions: Sequence[str] = (), expired: bool = True, yes: bool = False, project: str = ""
) -> list[str]:
    """Find what stacks have left behind, and end it after asking; where nobody is to be asked, only find it.

    Args:
        regions: Where to look; all regions of the account when empty.
        expired: Only stacks whose time is over, and remains of a `down` that was cut short.
        yes: End it without asking.
        project: Of Google Cloud; AWS has none.

    Returns:
        What is left, a line for each.

    Raises:
        Refused: AWS could not be asked, or does not allow it.
    """
    with explained():
        clouds = [
            Cloud(name, region)
            for region in regions or aws_teardown.regions()
            for name, expires in sorted(aws_teardown.stacks_in(region).items())
            if not expired or expires < datetime.now(UTC)
        ]
        found = [line for cloud in clouds for line in aws_teardown.remaining(cloud, with_data=False)]
        if not found or not (yes or sys.stdin.isatty()):
            return found
        print("\n".join(f"  {line}" for line in found), flush=True)
        confirm("End all of this?", yes)
        ended = [aws_teardown.end(cloud, delete_data=False, tell=_tell) for cloud in clouds]
    return [line for left in ended for line in left]


def _tell(line: str) -> None:
    print(f"  {line}", flush=True)
