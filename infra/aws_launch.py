"""From a foundation on AWS to a running head: the cluster file, and Ray's own launcher, called with it."""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

from botocore.exceptions import ClientError  # type: ignore[import-untyped]

from infra import aws_network, aws_teardown, cluster
from infra.aws_cloud import CONFIG, EXPIRES, IMAGE, PATH, ZONES, Cloud, expiry, tag_list, tags_of
from infra.aws_errors import code_of, explain_output
from infra.aws_foundation import bucket_name
from infra.folder import Folder
from infra.nodes import Facts, Machine
from infra.plan import Job, Refused, Step
from infra.preflight import Survey
from infra.programs import LAUNCHER, programs_missing
from infra.stack import Stack

SET_UP = "up-to-date"
"""What Ray's launcher writes on a node when all that it does there is done."""
PROFILE_S = 60.0
"""How long AWS may take to let EC2 know of a new instance profile."""
JUST_NOW = timedelta(minutes=10)
UNMADE = "sg-00000000000000000"
"""Stands in a plan for the security group that is not there yet."""


def steps(cloud: Cloud, stack: Stack, survey: Survey, folder: Folder, *, restart: bool) -> list[Step]:
    """List what is to be done until a head runs as the stack says; the foundation is there by then."""
    head = cloud.head()
    launch = partial(_launch, cloud, stack, survey, folder)
    if head is None:
        call = partial(launch, no_restart=False)
        return [
            *_pins(cloud, stack, survey),
            Step(f"launch the head ({stack.head.type}) with `ray up`", call),
        ]
    if cloud.group() is None:
        return []  # until the foundation stands again, nothing can be said of the head's file
    have = head.tags.get(CONFIG, "")  # from the end of the first launch on: by then its services run
    unfinished = head.tags.get("ray-node-status") != SET_UP
    if unfinished and not have:
        return [Step(f"set up head {head.id}, which was left unfinished", partial(launch, no_restart=False))]
    folder.make()
    want = _digest(render(cloud, stack, survey, folder, code=folder.pack()))
    of_head = want.partition("-")[0]
    if have and not have.startswith(of_head):
        if not restart:
            raise Refused(
                f"head {head.id} is of another kind than the stack now says, and Ray would replace it: jobs "
                "end and its disk goes, with MLflow's runs; to do so give --restart, else undo the change"
            )
        call = partial(launch, no_restart=False)
        return [Step(f"replace head {head.id} with another, which ends the jobs that run", call)]
    if restart:
        call = partial(launch, no_restart=False)
        return [Step(f"start Ray on head {head.id} again, which ends the jobs that run", call)]
    if have != want or unfinished:
        return [Step(f"update head {head.id}, on which jobs go on", partial(launch, no_restart=True))]
    return []


def tools_missing(stack: Stack) -> list[str]:
    """Name the programs that `ray up` calls and that are not on this machine, with what to do about it."""
    ssm = {"aws": "AWS's command line", "session-manager-plugin": "its Session Manager plugin"}
    return programs_missing(LAUNCHER | (ssm if stack.access.mode == "ssm" else {}))


def fit(cloud: Cloud, stack: Stack, survey: Survey, folder: Folder, job: Job) -> cluster.Fit:
    """Ask which nodes a job would get on the cluster, or why it never fits."""
    return cluster.fit(render(cloud, stack, survey, folder, code="-"), job.bundles)


def render(cloud: Cloud, stack: Stack, survey: Survey, folder: Folder, *, code: str) -> dict[str, Any]:
    """Render the cluster file from what was made and found; what is not made yet has a name in its place."""
    group, head = cloud.group() or {}, cloud.head()
    lasting = head.tags if head else tags_of(group)
    partition = cloud.ec2.meta.partition
    profile = f"arn:{partition}:iam::{cloud.account}:instance-profile{PATH}"
    types = {"head": stack.head.type} | {workers.name: workers.type for workers in stack.workers}
    zones = {name: survey.zones[type_] for name, type_ in types.items()}
    facts = Facts(
        folder=folder,
        code=code,
        image_id=survey.image,
        machines={
            name: Machine(cpus=each.vcpus, gpus=each.gpus, accelerator=each.gpu)
            for name, each in survey.machines.items()
        },
        bucket=f"s3://{bucket_name(cloud, stack)}",
        expires_at=lasting.get(EXPIRES) or expiry(stack.ttl_hours),
        zones=zones,
        key_name=cloud.cluster,
        subnet_ids={name: tuple(survey.subnets[zone] for zone in zones[name]) for name in types},
        security_group_id=group.get("GroupId", UNMADE),
        head_profile_arn=profile + cloud.role("head"),
        worker_profile_arn=profile + cloud.role("worker"),
    )
    return cluster.render(stack, facts)


def ray(*arguments: str) -> tuple[int, str]:
    """Run a command of Ray's launcher, and show what it says.

    Returns:
        Its exit code, and the last of its output.
    """
    verb, *rest = arguments
    style = ["--log-style", "pretty", "--log-color", "false"]
    command = [str(Path(sys.executable).with_name("ray")), verb, *style, *rest]
    env = os.environ | {"PYTHONUNBUFFERED": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    last: deque[str] = deque(maxlen=400)
    with subprocess.Popen(  # noqa: S603
        command,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        for line in process.stdout or ():
            print(f"    {line}", end="", flush=True)
            last.append(line)
    return process.returncode, "".join(last)


def _pins(cloud: Cloud, stack: Stack, survey: Survey) -> Iterator[Step]:
    """Write on the security group what the next head is launched with, unless that was done just now."""
    tags = tags_of(cloud.group() or {})
    pins = {IMAGE: survey.image, ZONES: " ".join(survey.subnets)}
    lasts = aws_teardown.moment(tags.get(EXPIRES, "")) - datetime.now(UTC)
    if pins.items() <= tags.items() and lasts > timedelta(hours=stack.ttl_hours) - JUST_NOW:
        return

    def pin() -> None:
        now = pins | {EXPIRES: expiry(stack.ttl_hours)}
        cloud.ec2.create_tags(Resources=[aws_network.group_id(cloud)], Tags=tag_list(now))

    yield Step(f"settle image {pins[IMAGE]}, zones {pins[ZONES]}, {stack.ttl_hours:g} hours to live", pin)


def _launch(cloud: Cloud, stack: Stack, survey: Survey, folder: Folder, *, no_restart: bool) -> None:
    """Render the cluster file, call `ray up` with it, and write on the head which file it was.

    Raises:
        Refused: Ray or AWS does not take the file, or `ray up` does not reach its end.
    """
    folder.make()
    rendered = render(cloud, stack, survey, folder, code=folder.pack())
    if problems := cluster.validate(rendered):
        raise Refused("\n".join(f"cluster file: {problem}" for problem in problems))
    file = folder.write(rendered)
    for node_type in rendered["available_node_types"].values():
        _wait_for_profile(cloud, node_type["node_config"])
    options = ["--no-restart"] if no_restart else []
    code, output = ray("up", "-y", "--no-config-cache", *options, str(file))
    head = cloud.head()
    if head is None:
        told = f"`ray up` launched no head (exit code {code}), see above; run `up` again to go on"
        raise explain_output(output) or Refused(told)
    if code:
        told = f"`ray up` did not finish on head {head.id} (exit code {code}), see above"
        raise Refused(f"{told}; run `up` again to go on")
    cloud.ec2.create_tags(Resources=[head.id], Tags=tag_list({CONFIG: _digest(rendered)}))


def _wait_for_profile(cloud: Cloud, node_config: dict[str, Any]) -> None:
    """Wait until EC2 knows the instance profile, which takes some seconds after it was made.

    EC2 is asked by a dry run, which also tells whether these credentials may give the role to a node.
    """
    arguments = {key: value for key, value in node_config.items() if key != "SubnetIds"}
    arguments |= {"SubnetId": node_config["SubnetIds"][0], "MinCount": 1, "MaxCount": 1, "DryRun": True}
    deadline = time.monotonic() + PROFILE_S
    while True:
        try:
            cloud.ec2.run_instances(**arguments)
        except ClientError as error:
            if code_of(error) == "DryRunOperation":
                return
            unknown = code_of(error) == "InvalidParameterValue" and "rofile" in str(error)
            if not unknown or time.monotonic() > deadline:
                raise
        time.sleep(2)


def _digest(rendered: dict[str, Any]) -> str:
    """Sum up what Ray knows the head by, and the whole cluster file: 16 letters each, with a dash between.

    Ray replaces a head whose description or login differs; where its key lies on this machine does not count.
    """
    login = {key: value for key, value in rendered["auth"].items() if key != "ssh_private_key"}
    head = rendered["available_node_types"][rendered["head_node_type"]]["node_config"]
    parts = [json.dumps(part, sort_keys=True).encode() for part in ([head, login], rendered)]
    return "-".join(hashlib.sha256(part).hexdigest()[:16] for part in parts)
