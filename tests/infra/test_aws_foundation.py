"""Whatever is changed by hand is seen, told in a line, and put right; nothing else is touched."""

import json
import stat
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import boto3  # type: ignore[import-untyped]
import pytest

from infra import aws_foundation
from infra.aws_cloud import Cloud
from infra.aws_foundation import SETTINGS, matches
from infra.aws_network import default_vpc
from infra.folder import make_key, public_key
from infra.plan import Refused
from infra.stack import Access
from tests.infra.moto_aws import ADDRESS, REGION, STACK, FakeAws, fake_aws, inventory

HEAD, WORKER = "gdl-ray-demo-us-west-2-head", "gdl-ray-demo-us-west-2-worker"
BUCKET = "gdl-demo-123456789012-us-west-2"
ANYONE = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "*", "Resource": "*"}]}
TRUST_ALL = {
    "Version": "2012-10-17",
    "Statement": [{"Effect": "Allow", "Principal": {"AWS": "*"}, "Action": "sts:AssumeRole"}],
}


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The key of a stack whose foundation stands, in an AWS of this file's own."""
    home = tmp_path_factory.mktemp("home")
    with fake_aws(home):
        key = home / "key.pem"
        assert heal(key)
        yield key


def heal(key: Path) -> list[str]:
    """Do what is to be done; what that was."""
    todo = aws_foundation.steps(Cloud("demo", REGION), STACK, key, ADDRESS)
    for step in todo:
        step.do()
    return [step.what for step in todo]


def ec2() -> Any:
    return boto3.client("ec2")


def s3() -> Any:
    return boto3.client("s3")


def iam() -> Any:
    return boto3.client("iam")


def group() -> str:
    return str(ec2().describe_security_groups(GroupNames=["gdl-ray-demo"])["SecurityGroups"][0]["GroupId"])


def open_to_all(port: int) -> None:
    ec2().authorize_security_group_ingress(
        GroupId=group(), IpProtocol="tcp", FromPort=port, ToPort=port, CidrIp="0.0.0.0/0"
    )


def close_ssh() -> None:
    ec2().revoke_security_group_ingress(
        GroupId=group(), IpProtocol="tcp", FromPort=22, ToPort=22, CidrIp=ADDRESS
    )


def close_outward() -> None:
    everything = [{"IpProtocol": "-1", "IpRanges": [{"CidrIp": "0.0.0.0/0"}]}]
    ec2().revoke_security_group_egress(GroupId=group(), IpPermissions=everything)


def suspend_versions() -> None:
    s3().put_bucket_versioning(Bucket=BUCKET, VersioningConfiguration={"Status": "Suspended"})


def open_bucket() -> None:
    closed = dict.fromkeys(aws_foundation.CLOSED, True) | {"BlockPublicPolicy": False}
    s3().put_public_access_block(Bucket=BUCKET, PublicAccessBlockConfiguration=closed)


def expire_objects() -> None:
    rule = {"ID": "x", "Status": "Enabled", "Filter": {"Prefix": ""}, "Expiration": {"Days": 1}}
    rules = {"Rules": [aws_foundation.LIFECYCLE, rule]}
    s3().put_bucket_lifecycle_configuration(Bucket=BUCKET, LifecycleConfiguration=rules)


def share_ownership() -> None:
    rules = {"Rules": [{"ObjectOwnership": "ObjectWriter"}]}
    s3().put_bucket_ownership_controls(Bucket=BUCKET, OwnershipControls=rules)


def allow_more() -> None:
    document = json.dumps(ANYONE)
    iam().put_role_policy(RoleName=HEAD, PolicyName="gdl-ray", PolicyDocument=document)


def add_policy() -> None:
    iam().put_role_policy(RoleName=WORKER, PolicyName="more", PolicyDocument=json.dumps(ANYONE))


def attach_policy() -> None:
    made = iam().create_policy(PolicyName="much", PolicyDocument=json.dumps(ANYONE))
    iam().attach_role_policy(RoleName=WORKER, PolicyArn=made["Policy"]["Arn"])


def trust_all() -> None:
    iam().update_assume_role_policy(RoleName=HEAD, PolicyDocument=json.dumps(TRUST_ALL))


def empty_profile() -> None:
    iam().remove_role_from_instance_profile(InstanceProfileName=HEAD, RoleName=HEAD)


def swap_roles() -> None:
    empty_profile()
    iam().add_role_to_instance_profile(InstanceProfileName=HEAD, RoleName=WORKER)


DRIFTS: list[tuple[Callable[[], object], list[str]]] = [
    (
        lambda: open_to_all(8265),
        ["close security group gdl-ray-demo: tcp 8265 from 0.0.0.0/0, which is not ours"],
    ),
    (
        lambda: open_to_all(22),
        ["close security group gdl-ray-demo: tcp 22 from 0.0.0.0/0, which is not ours"],
    ),
    (close_ssh, [f"open security group gdl-ray-demo: tcp 22 from {ADDRESS}"]),
    (close_outward, ["open security group gdl-ray-demo: everything to 0.0.0.0/0"]),
    (suspend_versions, [f"make bucket {BUCKET} versioned"]),
    (open_bucket, [f"make bucket {BUCKET} closed to the public"]),
    (lambda: s3().delete_bucket_encryption(Bucket=BUCKET), [f"make bucket {BUCKET} encrypted"]),
    (
        expire_objects,
        [f"make bucket {BUCKET} rid of abandoned uploads after 3 days and of replaced versions after 30"],
    ),
    (share_ownership, [f"make bucket {BUCKET} owned by this account alone"]),
    (lambda: s3().delete_bucket_tagging(Bucket=BUCKET), [f"tag bucket {BUCKET}"]),
    (allow_more, [f"set what role {HEAD} may do"]),
    (add_policy, [f"take policy more, which is not ours, from role {WORKER}"]),
    (attach_policy, [f"take policy much, which is not ours, from role {WORKER}"]),
    (trust_all, [f"let EC2 alone assume role {HEAD}"]),
    (lambda: iam().untag_role(RoleName=HEAD, TagKeys=["gdl-ray:owner"]), [f"tag role {HEAD}"]),
    (empty_profile, [f"put role {HEAD} in its instance profile"]),
    (
        swap_roles,
        [f"take role {WORKER} from instance profile {HEAD}", f"put role {HEAD} in its instance profile"],
    ),
    (lambda: ec2().delete_key_pair(KeyName="gdl-ray-demo"), ["register key pair gdl-ray-demo"]),
]


@pytest.mark.parametrize(("drift", "told"), DRIFTS, ids=[told[-1] for _, told in DRIFTS])
def test_drift_is_told_and_healed(key: Path, drift: Callable[[], object], told: list[str]) -> None:
    before = inventory()
    drift()
    assert heal(key) == told
    assert heal(key) == []
    assert inventory() == before


def test_bucket_has_every_setting_as_s3_itself_tells_it(key: Path) -> None:
    client = s3()
    closed = client.get_public_access_block(Bucket=BUCKET)["PublicAccessBlockConfiguration"]
    assert len(closed) == 4
    assert all(closed.values())
    assert client.get_bucket_versioning(Bucket=BUCKET)["Status"] == "Enabled"
    (rule,) = client.get_bucket_lifecycle_configuration(Bucket=BUCKET)["Rules"]
    assert rule["AbortIncompleteMultipartUpload"]["DaysAfterInitiation"] == 3
    assert rule["NoncurrentVersionExpiration"]["NoncurrentDays"] == 30
    assert "Days" not in rule["Expiration"]  # what is current never expires
    assert len(SETTINGS) == 5


def test_another_address_takes_the_place_of_the_former(key: Path) -> None:
    cloud = Cloud("demo", REGION)
    moved = aws_foundation.steps(cloud, STACK, key, "198.51.100.9/32")
    assert [step.what.partition(": ")[2] for step in moved] == [
        "tcp 22 from 198.51.100.9/32",
        f"tcp 22 from {ADDRESS}, which is not ours",
    ]
    closed = aws_foundation.steps(cloud, replace(STACK, access=Access(mode="ssm")), key, "")
    assert f"tcp 22 from {ADDRESS}, which is not ours" in " ".join(step.what for step in closed)
    assert not [step.what for step in closed if step.what.startswith("open")]


def test_the_key_is_private_and_the_registered_one(key: Path) -> None:
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    (registered,) = ec2().describe_key_pairs(IncludePublicKey=True)["KeyPairs"]
    assert registered["PublicKey"].split()[:2] == public_key(key).split()[:2]


def test_a_key_that_is_on_another_machine_is_replaced_unless_a_head_uses_it(
    key: Path, tmp_path: Path
) -> None:
    cloud = Cloud("demo", REGION)
    make_key(tmp_path / "mine.pem", "mine")
    told = [step.what for step in aws_foundation.steps(cloud, STACK, tmp_path / "mine.pem", ADDRESS)]
    assert told == [
        "delete key pair gdl-ray-demo, whose private half is not on this machine",
        "register key pair gdl-ray-demo",
    ]
    tags = [{"Key": "gdl-ray:stack", "Value": "demo"}, {"Key": "ray-node-type", "Value": "head"}]
    specification = [{"ResourceType": "instance", "Tags": tags}]
    made = ec2().run_instances(ImageId="ami-1", MinCount=1, MaxCount=1, TagSpecifications=specification)
    for file in ("mine.pem", "none.pem"):
        (problem,) = aws_foundation.key_problems(cloud, tmp_path / file)
        assert "on another machine: copy" in problem
        assert list(aws_foundation.steps(cloud, STACK, tmp_path / file, ADDRESS)) == []
    assert aws_foundation.key_problems(cloud, key) == []
    ec2().terminate_instances(InstanceIds=[made["Instances"][0]["InstanceId"]])


def test_a_region_without_a_default_network_is_refused(tmp_path: Path) -> None:
    with fake_aws(tmp_path) as fake:
        assert isinstance(fake, FakeAws)
        fake.answers["DescribeVpcs"] = lambda _: {"Vpcs": []}
        with pytest.raises(Refused, match="aws ec2 create-default-vpc --region us-west-2"):
            default_vpc(Cloud("demo", REGION))


@pytest.mark.parametrize(
    ("want", "have", "same"),
    [
        ({"a": 1}, {"a": 1, "b": 2}, True),
        ({"a": 1}, {"a": 2}, False),
        ({"a": 1}, None, False),
        ([1, 2], [2, 1], True),
        ([1], [1, 2], False),
        ([{"a": 1}], [{"a": 1, "b": 3}], True),
        ("Enabled", "Suspended", False),
    ],
)
def test_an_answer_may_say_more_than_what_is_wanted(want: object, have: object, same: bool) -> None:
    assert matches(want, have) == same
