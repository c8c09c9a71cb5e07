"""The verbs of a stack on AWS, against moto: what they do, and that it holds wherever they are ended."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path
from typing import Any

import boto3  # type: ignore[import-untyped]
import pytest
import yaml

from infra import aws, aws_launch, preflight
from infra.folder import folder_of
from infra.plan import Job, Refused
from infra.stack import Access, Budget, Stack, Storage
from tests.infra.moto_aws import (
    REGION,
    STACK,
    Call,
    FakeAws,
    error,
    fake_aws,
    inventory,
    launch,
    run_into_the_end,
)

ACCOUNTS_OWN = "role AWSServiceRoleForspot"
"""Belongs to the account, and stays."""
OTHER = replace(STACK, stack="other")


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeAws]:
    """An empty AWS."""
    with fake_aws(tmp_path) as fake:
        yield fake


def launch_worker(stack: Stack) -> str:
    """Launch a worker as the head's autoscaler does; its id."""
    rendered = yaml.safe_load(folder_of(stack).cluster.read_text())
    tags = {"ray-cluster-name": stack.stack, "ray-node-type": "worker", "ray-user-node-type": "l4"}
    return launch(boto3.client("ec2"), rendered["available_node_types"]["l4"]["node_config"], tags)


def test_a_plan_asks_and_changes_nothing(fake: FakeAws) -> None:
    planned = aws.plan(STACK, Job.parse("workers=4,gpu=1,cpu=3"))
    assert fake.changes == []
    assert inventory() == {}
    assert any("create bucket" in step for step in planned.steps)
    assert any("launch the head" in step for step in planned.steps)
    assert planned.worst_usd_per_hour == pytest.approx(0.1 + 6 * 0.8)
    assert planned.problems == []
    assert "4 x l4-spot" in planned.fits["workers=4,cpu=3,gpu=1"]


def test_a_plan_refuses_a_job_that_never_fits(fake: FakeAws) -> None:
    (problem,) = aws.plan(STACK, Job.parse("workers=2,gpu=1,cpu=8")).problems
    assert problem.startswith("job workers=2,cpu=8,gpu=1: never fits")


def test_up_does_what_the_plan_says(fake: FakeAws, capsys: pytest.CaptureFixture[str]) -> None:
    planned = aws.plan(STACK)
    aws.up(STACK, yes=True)
    done = re.findall(r"^\[\d+/\d+\] (.*)", capsys.readouterr().out, re.MULTILINE)
    assert done == planned.steps


def test_up_a_second_time_does_nothing(fake: FakeAws) -> None:
    aws.up(STACK, yes=True)
    fake.calls.clear()
    fake.ray.clear()
    aws.up(STACK, yes=True)
    assert fake.changes == []
    assert fake.ray == []
    assert aws.plan(STACK).steps == []


def test_up_makes_the_foundation_alone_where_asked(fake: FakeAws) -> None:
    aws.up(STACK, yes=True, foundation_only=True)
    assert fake.ray == []
    assert "instance demo" not in inventory()
    fake.calls.clear()
    aws.up(STACK, yes=True, foundation_only=True)
    assert fake.changes == []


@pytest.mark.slow
def test_up_converges_wherever_it_was_interrupted(fake: FakeAws, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes on from before each change; at the calls in between, AWS is as it is at the next change.

    What the preflight asks, it asks before the first change: here, once for all.
    """
    survey = aws._look(STACK).survey
    monkeypatch.setattr(preflight, "survey", lambda *_: survey)
    monkeypatch.setattr(preflight, "permission_problems", lambda *_: ())
    fake.moments = []
    aws.up(STACK, yes=True)
    moments, fake.moments = fake.moments, None
    whole = inventory()
    assert len(moments) > 20
    for moment in moments:
        moment.come_back()
        before = len(fake.changes)
        aws.up(STACK, yes=True)  # whose last look finds nothing to do any more
        assert fake.changes[before] == moment.change
        assert inventory() == whole, moment.change


@pytest.mark.slow
def test_up_and_down_converge_when_no_answer_ever_arrives(fake: FakeAws) -> None:
    """Each run is ended when its first change is done but not yet known; the next goes on from there."""
    assert run_into_the_end(fake, lambda: aws.up(STACK, yes=True)) > 20
    assert set(inventory().values()) == {1}
    assert inventory()["instance demo"] == 1
    assert aws._look(STACK).steps == []
    assert run_into_the_end(fake, lambda: aws.down(STACK, yes=True, delete_data=True)) > 10
    assert inventory() == {ACCOUNTS_OWN: 1}


def test_what_others_made_meanwhile_is_not_made_twice(fake: FakeAws) -> None:
    aws.up(STACK, yes=True)
    before = inventory()
    seen = fake.answers
    fake.answers = seen | {"DescribeSecurityGroups": lambda _: {"SecurityGroups": []}}
    with pytest.raises(Refused, match="Duplicate"):
        aws.up(STACK, yes=True)
    fake.answers = seen
    assert inventory() == before


def test_a_head_that_was_left_half_set_up_is_set_up_with_ray_started(fake: FakeAws) -> None:
    aws.up(STACK, yes=True)
    head = boto3.client("ec2").describe_instances()["Reservations"][0]["Instances"][0]["InstanceId"]
    never = [{"Key": "gdl-ray:config"}]  # what the end of the first launch writes
    boto3.client("ec2").delete_tags(Resources=[head], Tags=never)
    tag = {"Key": "ray-node-status", "Value": "syncing-files"}
    boto3.client("ec2").create_tags(Resources=[head], Tags=[tag])
    fake.ray.clear()
    aws.up(STACK, yes=True)
    assert [line[:3] for line in fake.ray] == [("up", "-y", "--no-config-cache")]
    assert "--no-restart" not in fake.ray[0]


def test_an_update_that_was_cut_off_goes_on_and_restarts_nothing(fake: FakeAws) -> None:
    """Once a launch has come to its end, the services run, whatever Ray's launcher left half done since."""
    aws.up(STACK, yes=True)
    head = boto3.client("ec2").describe_instances()["Reservations"][0]["Instances"][0]["InstanceId"]
    tag = {"Key": "ray-node-status", "Value": "waiting-for-ssh"}
    boto3.client("ec2").create_tags(Resources=[head], Tags=[tag])
    fake.ray.clear()
    larger = replace(STACK, head=replace(STACK.head, type="m7i.xlarge"), budget=Budget(max_hourly_usd=99))
    with pytest.raises(Refused, match=r"Ray would replace it.*--restart"):
        aws.up(larger, yes=True)
    assert fake.ray == []
    aws.up(STACK, yes=True)
    assert len(fake.ray) == 1
    assert "--no-restart" in fake.ray[0]


def test_a_change_of_the_stack_updates_the_head_and_restarts_nothing(fake: FakeAws) -> None:
    aws.up(STACK, yes=True)
    fake.ray.clear()
    aws.up(replace(STACK, workers=STACK.workers[:1]), yes=True)
    assert len(fake.ray) == 1
    assert "--no-restart" in fake.ray[0]
    aws.up(replace(STACK, workers=STACK.workers[:1]), yes=True, restart=True)
    assert len(fake.ray) == 2
    assert "--no-restart" not in fake.ray[1]


def test_a_head_of_another_kind_is_replaced_only_where_asked(fake: FakeAws) -> None:
    """Ray itself would end it without a word, and with it what is on its disk."""
    aws.up(STACK, yes=True)
    fake.ray.clear()
    larger = replace(STACK, head=replace(STACK.head, type="m7i.xlarge"), budget=Budget(max_hourly_usd=99))
    with pytest.raises(Refused, match=r"Ray would replace it.*--restart"):
        aws.up(larger, yes=True)
    assert fake.ray == []
    assert any(
        step.startswith("replace head") for step in (s.what for s in aws._look(larger, restart=True).steps)
    )


def test_nodes_keep_image_zones_and_expiry_while_the_head_runs(fake: FakeAws) -> None:
    """Other ones would be another head to Ray, which would end the one that runs."""
    aws.up(STACK, yes=True)
    file = folder_of(STACK).cluster
    before = file.read_text()
    fake.answers["GetParameter"] = lambda _: {"Parameter": {"Value": "ami-0fedcba9876543210"}}
    dear = {"AvailabilityZone": "us-west-2a", "InstanceType": "g6.xlarge", "SpotPrice": "9"}
    fake.answers["DescribeSpotPriceHistory"] = lambda _: {"SpotPriceHistory": [dear]}
    assert aws.plan(STACK).steps == []
    aws.up(STACK, yes=True, restart=True)
    assert file.read_text() == before


def test_a_new_head_has_the_newest_image_and_the_cheapest_zone_first(fake: FakeAws) -> None:
    prices = {"us-west-2a": "0.4", "us-west-2b": "0.5", "us-west-2c": "0.2", "us-west-2d": "0.3"}
    history = [
        {"AvailabilityZone": zone, "InstanceType": "g6.xlarge", "SpotPrice": price}
        for zone, price in prices.items()
    ]
    fake.answers["DescribeSpotPriceHistory"] = lambda _: {"SpotPriceHistory": history}
    aws.up(STACK, yes=True)
    (head,) = (node for node in aws.status(STACK).nodes)
    assert head.zone == "us-west-2c"
    subnets = boto3.client("ec2").describe_subnets()["Subnets"]
    zone_of = {subnet["SubnetId"]: subnet["AvailabilityZone"] for subnet in subnets}
    config = yaml.safe_load(folder_of(STACK).cluster.read_text())["available_node_types"]["l4-spot"]
    tried = [zone_of[subnet] for subnet in config["node_config"]["SubnetIds"]]
    assert tried == ["us-west-2c", "us-west-2d", "us-west-2a", "us-west-2b"]


@pytest.mark.parametrize(
    ("stack", "told"),
    [
        (replace(STACK, budget=Budget(max_hourly_usd=4)), "budget.max_hourly_usd: 4 is less than 4.90 "),
        (replace(STACK, zones=("us-west-2a", "us-west-2z")), "zones: 'us-west-2z' has no default subnet"),
        (replace(STACK, head=replace(STACK.head, type="m7g.large")), "head: m7g.large is arm64"),
        (replace(STACK, head=replace(STACK.head, type="m7i.larg")), "m7i.larg is no machine type"),
        (replace(STACK, storage=Storage(bucket="not-there")), "storage.bucket: 'not-there' does not exist"),
    ],
)
def test_up_refuses_before_anything_is_made(fake: FakeAws, stack: Stack, told: str) -> None:
    with pytest.raises(Refused, match=told):
        aws.up(stack, yes=True)
    assert fake.changes == []


def test_a_quota_counts_what_others_run_and_says_how_to_raise_it(fake: FakeAws) -> None:
    fake.answers["GetServiceQuota"] = lambda _: {"Quota": {"Value": 8.0}}
    aws.up(replace(STACK, workers=()), yes=True)
    ec2 = boto3.client("ec2")
    ec2.run_instances(ImageId="ami-1", InstanceType="g6.xlarge", MinCount=1, MaxCount=1)
    problems = aws.plan(replace(STACK, workers=STACK.workers[1:])).problems
    assert len(problems) == 1
    assert "may need 8 vCPUs of G and VT on-demand machines, and 4 of 8 are free" in problems[0]
    assert "--quota-code L-DB2E81BA --desired-value 12" in problems[0]


def test_up_asks_before_it_begins(fake: FakeAws, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Refused, match="--yes"):
        aws.up(STACK, yes=False)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda _: "n")
    with pytest.raises(Refused, match="nothing was done"):
        aws.up(STACK, yes=False)
    assert fake.changes == []


def test_a_bucket_of_the_user_is_used_as_it_is_and_never_deleted(fake: FakeAws) -> None:
    place = {"LocationConstraint": REGION}
    boto3.client("s3").create_bucket(Bucket="mine", CreateBucketConfiguration=place)
    stack = replace(STACK, storage=Storage(bucket="mine"))
    aws.up(stack, yes=True)
    assert not [
        name for name in fake.changes if name.startswith("PutBucket") or name == "PutPublicAccessBlock"
    ]
    assert "s3://mine" in folder_of(stack).cluster.read_text()
    assert aws.down(stack, yes=True, delete_data=True) == []
    assert inventory() == {ACCOUNTS_OWN: 1, "bucket mine": 1}


def test_down_ends_all_of_a_stack_and_nothing_of_another(fake: FakeAws) -> None:
    aws.up(OTHER, yes=True)
    launch_worker(OTHER)
    others = inventory()
    aws.up(STACK, yes=True)
    stopped, _ = launch_worker(STACK), launch_worker(STACK)
    boto3.client("ec2").stop_instances(InstanceIds=[stopped])
    ec2 = boto3.client("ec2")
    tag = {"ResourceType": "volume", "Tags": [{"Key": "gdl-ray:stack", "Value": "demo"}]}
    ec2.create_volume(AvailabilityZone="us-west-2a", Size=1, TagSpecifications=[tag])
    assert aws.down(STACK, yes=True) == []
    bucket = next(name for name in inventory() if name.startswith("bucket gdl-demo"))
    assert inventory() == others + type(others)([bucket])
    assert not folder_of(STACK).path.exists()
    fake.calls.clear()
    assert aws.down(STACK, yes=True) == []
    assert fake.changes == []
    assert ("down", "-y", str(folder_of(STACK).cluster)) in fake.ray


def test_down_deletes_the_bucket_with_every_version_where_asked(fake: FakeAws) -> None:
    aws.up(STACK, yes=True, foundation_only=True)
    s3 = boto3.client("s3")
    (bucket,) = (each["Name"] for each in s3.list_buckets()["Buckets"])
    for body in (b"old", b"new"):
        s3.put_object(Bucket=bucket, Key="runs/model", Body=body)
    s3.delete_object(Bucket=bucket, Key="runs/model")
    s3.create_multipart_upload(Bucket=bucket, Key="runs/half")
    assert aws.down(STACK, yes=True) == []
    assert f"bucket {bucket}" in inventory()
    assert aws.down(STACK, yes=True, delete_data=True) == []
    assert inventory() == {ACCOUNTS_OWN: 1}


def test_down_in_an_account_that_has_nothing_of_it_keeps_the_key(
    fake: FakeAws, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    aws.up(STACK, yes=True)
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("MOTO_ACCOUNT_ID", "210987654321")
        assert aws.down(STACK, yes=True) == []
    assert "account 210987654321 has nothing of demo in us-west-2" in capsys.readouterr().out
    assert folder_of(STACK).key.exists()


def test_from_a_machine_without_the_key_all_can_be_looked_at_and_ended(fake: FakeAws) -> None:
    aws.up(STACK, yes=True)
    shutil.rmtree(folder_of(STACK).path)
    planned = aws.plan(STACK, Job.parse("workers=2,gpu=1"))
    assert planned.steps == []
    assert len(planned.problems) == 1
    assert f"on another machine: copy {folder_of(STACK).path} from it" in planned.problems[0]
    status = aws.status(STACK)
    assert (len(status.nodes), status.drift) == (1, [])
    fake.calls.clear()
    with pytest.raises(Refused, match="on another machine"):
        aws.up(STACK, yes=True)
    assert fake.changes == []
    assert aws.down(STACK, yes=True) == []


def test_down_names_what_it_cannot_end(fake: FakeAws, monkeypatch: pytest.MonkeyPatch) -> None:
    aws.up(STACK, yes=True, foundation_only=True)
    monkeypatch.setattr("infra.aws_teardown.PATIENCE_S", 0)
    fake.answers["DeleteSecurityGroup"] = error("DependencyViolation", "has a dependent object")
    (left,) = aws.down(STACK, yes=True)
    assert left.startswith("security group sg-")
    assert folder_of(STACK).key.exists()  # for the next try
    del fake.answers["DeleteSecurityGroup"]
    assert aws.down(STACK, yes=True) == []


def test_down_ends_what_a_head_launches_while_it_is_ended(fake: FakeAws) -> None:
    aws.up(STACK, yes=True)
    late: list[str] = []

    def launch_once(_: object) -> None:
        if not late:
            late.append("")
            late[0] = launch_worker(STACK)

    fake.answers["TerminateInstances"] = launch_once
    assert aws.down(STACK, yes=True) == []
    assert late[0].startswith("i-")
    assert "instance demo" not in inventory()


def test_up_waits_until_machines_may_have_a_new_profile(
    fake: FakeAws, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusals = [error("InvalidParameterValue", "Invalid IAM Instance Profile name")] * 3
    waited: list[float] = []
    monkeypatch.setattr("infra.aws_launch.time.sleep", waited.append)

    def refuse(call: Call) -> dict[str, Any] | None:
        return refusals.pop()(call) if "IamInstanceProfile.Arn" in call.body and refusals else None

    fake.answers["RunInstances"] = refuse
    aws.up(STACK, yes=True)
    assert len(waited) == 3
    assert inventory()["instance demo"] == 1


def test_status_tells_nodes_costs_drift_and_orphans(fake: FakeAws) -> None:
    assert aws.status(STACK).lines() == ["no nodes"]
    aws.up(STACK, yes=True)
    worker = launch_worker(STACK)
    status = aws.status(STACK)
    assert [(node.type, node.state) for node in status.nodes] == [
        ("m7i.large", "running"),
        ("g6.xlarge", "running"),
    ]
    ends = datetime.fromisoformat(status.expires_at) - datetime.now(UTC)
    assert timedelta(hours=11.9) < ends <= timedelta(hours=12)
    assert (status.drift, status.orphans) == ([], [])
    ec2 = boto3.client("ec2")
    (group,) = ec2.describe_security_groups(GroupNames=["gdl-ray-demo"])["SecurityGroups"]
    ec2.authorize_security_group_ingress(
        GroupId=group["GroupId"], IpProtocol="tcp", FromPort=8265, ToPort=8265, CidrIp="0.0.0.0/0"
    )
    head = next(node.name.split()[1] for node in status.nodes if node.name.startswith("head"))
    ec2.terminate_instances(InstanceIds=[head])
    status = aws.status(STACK)
    assert status.drift == ["close security group gdl-ray-demo: tcp 8265 from 0.0.0.0/0, which is not ours"]
    assert status.orphans == [f"l4 {worker} (g6.xlarge, running) has no head"]


def test_cost_so_far_is_age_times_price(fake: FakeAws, monkeypatch: pytest.MonkeyPatch) -> None:
    aws.up(STACK, yes=True)

    class Later(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> "Later":
            return super().now(tz) + timedelta(hours=5)

    monkeypatch.setattr(aws, "datetime", Later)
    status = aws.status(STACK)
    assert status.usd_so_far == pytest.approx(0.5, rel=1e-2)
    assert status.nodes[0].age_h == pytest.approx(5, rel=1e-2)


def test_gc_ends_what_is_over_and_spares_what_runs(fake: FakeAws) -> None:
    aws.up(STACK, yes=True)
    aws.up(OTHER, yes=True)
    launch_worker(OTHER)
    ec2 = boto3.client("ec2")
    ours = [{"Name": "tag:gdl-ray:stack", "Values": ["other"]}]
    groups = [each["GroupId"] for each in ec2.describe_security_groups(Filters=ours)["SecurityGroups"]]
    nodes = [
        each["InstanceId"]
        for group in ec2.describe_instances(Filters=ours)["Reservations"]
        for each in group["Instances"]
    ]
    nodes += [each["VolumeId"] for each in ec2.describe_volumes(Filters=ours)["Volumes"]]
    before = inventory()
    assert aws.gc(regions=[REGION]) == []
    past = {"Key": "gdl-ray:expires-at", "Value": "2026-01-01T00:00:00Z"}
    ec2.create_tags(Resources=[*groups, *nodes], Tags=[past])
    listed = aws.gc(regions=[REGION])
    assert len([line for line in listed if line.startswith("instance i-")]) == 2
    assert inventory() == before
    assert aws.gc(regions=[REGION], yes=True) == []
    left = {name: count for name, count in before.items() if "other" not in name or name.startswith("bucket")}
    assert inventory() == left


def test_gc_finds_what_a_down_that_was_cut_short_has_left_in_any_region(fake: FakeAws) -> None:
    aws.up(STACK, yes=True, foundation_only=True)
    regions = [{"RegionName": name} for name in ("eu-west-1", REGION)]
    fake.answers["DescribeRegions"] = lambda _: {"Regions": regions}
    fake.answers["DeleteRolePolicy"] = error("Throttling")
    with pytest.raises(Refused):
        aws.down(STACK, yes=True)
    del fake.answers["DeleteRolePolicy"]
    assert len(aws.gc()) == 4
    assert aws.gc(yes=True) == []
    assert not any(name.startswith(("role gdl", "profile", "key")) for name in inventory())


@pytest.mark.parametrize("access", [Access(mode="ssh", cidr="198.51.100.4/32"), Access(mode="ssm")])
def test_the_tunnel_is_one_that_ssh_takes(fake: FakeAws, access: Access) -> None:
    stack = replace(STACK, access=access)
    with pytest.raises(Refused, match="no head"):
        aws.tunnel_command(stack)
    aws.up(stack, yes=True)
    command = aws.tunnel_command(stack)
    shown = subprocess.run(
        [command[0], "-G", *command[1:]], capture_output=True, text=True, check=True
    ).stdout
    settings = dict(line.split(" ", 1) for line in shown.splitlines() if " " in line)
    assert settings["user"] == "ubuntu"
    assert settings["exitonforwardfailure"] == "yes"
    forwards = {line for line in shown.splitlines() if line.startswith("localforward")}
    assert forwards == {f"localforward [127.0.0.1]:{port} [127.0.0.1]:{port}" for port in (8265, 5000, 8000)}
    if access.mode == "ssm":
        assert settings["hostname"].startswith("i-")
        assert "start-session" in settings["proxycommand"]
        folder_of(stack).key.unlink()
        with pytest.raises(Refused, match="another machine"):
            aws.tunnel_command(stack)


def test_ray_that_fails_is_explained(fake: FakeAws, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = "botocore.exceptions.ClientError: An error occurred (InsufficientInstanceCapacity) when calling"
    monkeypatch.setattr(aws_launch, "ray", lambda *_: (1, shown))
    with pytest.raises(Refused, match="AWS has no such machine free now"):
        aws.up(STACK, yes=True)
    monkeypatch.setattr(aws_launch, "ray", lambda *_: (1, "no idea"))
    with pytest.raises(Refused, match=r"launched no head .*run `up` again"):
        aws.up(STACK, yes=True)
