"""What a stack needs on AWS before it has nodes, and the steps from what there is to what there should be.

`steps` observes and returns what is to be done, and nothing when all is as it should be. `plan` prints that;
`up` does it and observes again. Each thing carries its name and tags from the call that makes it, so an `up`
that was interrupted anywhere goes on where it stopped.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from infra import aws_network
from infra.aws_cloud import (
    KINDS,
    OWNER,
    PATH,
    TAG,
    Cloud,
    absent_is_none,
    tag_list,
    tags_of,
)
from infra.aws_policies import TRUST, head_policy, worker_policy
from infra.folder import make_key, public_key
from infra.plan import Refused, Step
from infra.stack import Stack

POLICY = "gdl-ray"
SPOT_ROLES = "/aws-service-role/spot.amazonaws.com/"
CLOSED = ("BlockPublicAcls", "IgnorePublicAcls", "BlockPublicPolicy", "RestrictPublicBuckets")
LIFECYCLE = {
    "ID": "gdl-ray",
    "Status": "Enabled",
    "Filter": {"Prefix": ""},
    "AbortIncompleteMultipartUpload": {"DaysAfterInitiation": 3},
    "NoncurrentVersionExpiration": {"NoncurrentDays": 30},
    "Expiration": {"ExpiredObjectDeleteMarker": True},
}


@dataclass(frozen=True)
class Setting:
    """A setting of the bucket: what it makes of it, S3's name for it, the argument that sets it."""

    what: str
    name: str
    argument: str
    value: dict[str, Any]

    def holds(self, cloud: Cloud, bucket: str) -> bool:
        """Tell whether a bucket has it."""
        answer = absent_is_none(getattr(cloud.s3, f"get_{self.name}"), Bucket=bucket)
        return answer is not None and matches(self.value, answer.get(self.argument, answer))

    def set(self, cloud: Cloud, bucket: str) -> None:
        """Give it to a bucket."""
        getattr(cloud.s3, f"put_{self.name}")(Bucket=bucket, **{self.argument: self.value})


SETTINGS = (
    Setting(
        "closed to the public",
        "public_access_block",
        "PublicAccessBlockConfiguration",
        dict.fromkeys(CLOSED, True),
    ),
    Setting(
        "owned by this account alone",
        "bucket_ownership_controls",
        "OwnershipControls",
        {"Rules": [{"ObjectOwnership": "BucketOwnerEnforced"}]},
    ),
    Setting(
        "encrypted",
        "bucket_encryption",
        "ServerSideEncryptionConfiguration",
        {"Rules": [{"ApplyServerSideEncryptionByDefault": {"SSEAlgorithm": "AES256"}}]},
    ),
    Setting("versioned", "bucket_versioning", "VersioningConfiguration", {"Status": "Enabled"}),
    Setting(
        "rid of abandoned uploads after 3 days and of replaced versions after 30",
        "bucket_lifecycle_configuration",
        "LifecycleConfiguration",
        {"Rules": [LIFECYCLE]},
    ),
)


def steps(cloud: Cloud, stack: Stack, key: Path, cidr: str) -> list[Step]:
    """List what is to be done until bucket, roles, key and security group are as the stack says.

    Args:
        cloud: AWS in the stack's region.
        stack: What should be.
        key: File of the stack's private key on this machine, which is there or is to be made.
        cidr: Addresses that may connect by ssh; none where users come through AWS Systems Manager.

    Raises:
        Refused: The stack names a bucket that is not there.
    """
    tags = {TAG: stack.stack, OWNER: stack.owner}
    return [
        *aws_network.steps(cloud, stack, cidr, tags),  # first, because it alone says when all of it expires
        *_bucket(cloud, stack, tags),
        *_roles(cloud, stack, tags),
        *_spot(cloud, stack),
        *_key(cloud, key, tags),
    ]


def bucket_name(cloud: Cloud, stack: Stack) -> str:
    """Name the bucket of a stack: the user's own, or the one that is made."""
    return cloud.bucket if stack.storage.bucket == "auto" else stack.storage.bucket


def _bucket(cloud: Cloud, stack: Stack, tags: dict[str, str]) -> Iterator[Step]:
    name = bucket_name(cloud, stack)
    exists = cloud.bucket_exists(name)
    if stack.storage.bucket != "auto":
        if not exists:
            raise Refused(f"storage.bucket: {name!r} does not exist; make it, or write auto")
        return  # the user's own: used as it is
    if not exists:
        yield Step(f"create bucket {name}", partial(_create_bucket, cloud, name))
    for setting in SETTINGS:
        if not exists or not setting.holds(cloud, name):
            yield Step(f"make bucket {name} {setting.what}", partial(setting.set, cloud, name))
    answer = absent_is_none(cloud.s3.get_bucket_tagging, Bucket=name) if exists else None
    have_tags = tags_of(answer or {})
    if not tags.items() <= have_tags.items():
        tagging = {"TagSet": tag_list(have_tags | tags)}
        yield Step(f"tag bucket {name}", partial(cloud.s3.put_bucket_tagging, Bucket=name, Tagging=tagging))


def _create_bucket(cloud: Cloud, name: str) -> None:
    place = {"CreateBucketConfiguration": {"LocationConstraint": cloud.region}}
    cloud.s3.create_bucket(Bucket=name, **({} if cloud.region == "us-east-1" else place))
    cloud.s3.get_waiter("bucket_exists").wait(Bucket=name)


def matches(want: object, have: object) -> bool:
    """Tell whether an answer of AWS holds what is wanted; it may say more, and list in another order."""
    if isinstance(want, dict):
        return isinstance(have, dict) and all(matches(value, have.get(key)) for key, value in want.items())
    if isinstance(want, list):
        if not isinstance(have, list) or len(have) != len(want):
            return False
        return all(any(matches(each, other) for other in have) for each in want)
    return want == have


def _roles(cloud: Cloud, stack: Stack, tags: dict[str, str]) -> Iterator[Step]:
    partition = str(cloud.ec2.meta.partition)
    ssm = stack.access.mode == "ssm"
    bucket = bucket_name(cloud, stack)
    worker_role = f"arn:{partition}:iam::{cloud.account}:role{PATH}{cloud.role('worker')}"
    documents = {
        "head": head_policy(
            stack=stack.stack,
            bucket=bucket,
            partition=partition,
            region=cloud.region,
            account=cloud.account,
            worker_role=worker_role,
            ssm=ssm,
        ),
        "worker": worker_policy(bucket=bucket, partition=partition, ssm=ssm),
    }
    for kind in KINDS:
        yield from _role(cloud, cloud.role(kind), documents[kind], tags)
        yield from _profile(cloud, cloud.role(kind), tags)


def _role(cloud: Cloud, name: str, document: dict[str, Any], tags: dict[str, str]) -> Iterator[Step]:
    iam, trust = cloud.iam, json.dumps(TRUST)
    role = absent_is_none(iam.get_role, RoleName=name)
    if role is None:
        arguments = {
            "RoleName": name,
            "Path": PATH,
            "Tags": tag_list(tags),
            "Description": f"{TAG}={cloud.name}",
        }
        yield Step(f"create role {name}", partial(_create_role, cloud, arguments))
    else:
        if role["Role"]["AssumeRolePolicyDocument"] != TRUST:
            call = partial(iam.update_assume_role_policy, RoleName=name, PolicyDocument=trust)
            yield Step(f"let EC2 alone assume role {name}", call)
        if not tags.items() <= tags_of(role["Role"]).items():
            yield Step(f"tag role {name}", partial(iam.tag_role, RoleName=name, Tags=tag_list(tags)))
        yield from _strangers(cloud, name)
    policy = absent_is_none(iam.get_role_policy, RoleName=name, PolicyName=POLICY) if role else None
    if policy is None or policy["PolicyDocument"] != document:
        call = partial(
            iam.put_role_policy, RoleName=name, PolicyName=POLICY, PolicyDocument=json.dumps(document)
        )
        yield Step(f"set what role {name} may do", call)


def _create_role(cloud: Cloud, arguments: dict[str, Any]) -> None:
    """Make a role, and wait until IAM, which is in many places, knows it in this one."""
    cloud.iam.create_role(AssumeRolePolicyDocument=json.dumps(TRUST), **arguments)
    cloud.iam.get_waiter("role_exists").wait(RoleName=arguments["RoleName"])


def _create_profile(cloud: Cloud, arguments: dict[str, Any]) -> None:
    cloud.iam.create_instance_profile(**arguments)
    name = arguments["InstanceProfileName"]
    cloud.iam.get_waiter("instance_profile_exists").wait(InstanceProfileName=name)


def _strangers(cloud: Cloud, name: str) -> Iterator[Step]:
    """Take from a role what this project has not given it."""
    iam = cloud.iam
    for policy in iam.list_role_policies(RoleName=name)["PolicyNames"]:
        if policy != POLICY:
            call = partial(iam.delete_role_policy, RoleName=name, PolicyName=policy)
            yield Step(f"take policy {policy}, which is not ours, from role {name}", call)
    for attached in iam.list_attached_role_policies(RoleName=name)["AttachedPolicies"]:
        call = partial(iam.detach_role_policy, RoleName=name, PolicyArn=attached["PolicyArn"])
        yield Step(f"take policy {attached['PolicyName']}, which is not ours, from role {name}", call)


def _profile(cloud: Cloud, name: str, tags: dict[str, str]) -> Iterator[Step]:
    iam = cloud.iam
    profile = absent_is_none(iam.get_instance_profile, InstanceProfileName=name)
    roles = [role["RoleName"] for role in profile["InstanceProfile"]["Roles"]] if profile else []
    if profile is None:
        arguments = {"InstanceProfileName": name, "Path": PATH, "Tags": tag_list(tags)}
        yield Step(f"create instance profile {name}", partial(_create_profile, cloud, arguments))
    for role in roles:
        if role != name:
            call = partial(iam.remove_role_from_instance_profile, InstanceProfileName=name, RoleName=role)
            yield Step(f"take role {role} from instance profile {name}", call)
    if name not in roles:
        call = partial(iam.add_role_to_instance_profile, InstanceProfileName=name, RoleName=name)
        yield Step(f"put role {name} in its instance profile", call)


def _spot(cloud: Cloud, stack: Stack) -> Iterator[Step]:
    """Make the account's role for spot machines, once: a head may not, and without it has no spot machine."""
    wanted = any(workers.market == "spot" for workers in stack.workers)
    if wanted and not cloud.iam.list_roles(PathPrefix=SPOT_ROLES)["Roles"]:
        call = partial(cloud.iam.create_service_linked_role, AWSServiceName="spot.amazonaws.com")
        yield Step("create the account's service-linked role for spot machines", call)


def _key(cloud: Cloud, file: Path, tags: dict[str, str]) -> Iterator[Step]:
    name = cloud.cluster
    registered, mine = _registered(cloud), _mine(file)
    if registered == [mine] or key_problems(cloud, file):
        return
    if not mine:
        yield Step(f"make the key {file}", partial(make_key, file, name))
    if registered:
        call = partial(cloud.ec2.delete_key_pair, KeyName=name)
        yield Step(f"delete key pair {name}, whose private half is not on this machine", call)
    yield Step(f"register key pair {name}", partial(_register, cloud, file, tags))


def key_problems(cloud: Cloud, file: Path) -> list[str]:
    """Say that only another machine has the key of a head that runs, if so: another key would not open it."""
    registered = _registered(cloud)
    if not registered or registered == [_mine(file)] or cloud.head() is None:
        return []
    return [
        f"the key of the running stack {cloud.name} is on another machine: copy {file.parent} from it, "
        "or end the stack with `down`"
    ]


def _registered(cloud: Cloud) -> list[list[str]]:
    return [_halves(key.get("PublicKey", "")) for key in cloud.key_pairs()]


def _mine(file: Path) -> list[str]:
    return _halves(public_key(file)) if file.exists() else []


def _register(cloud: Cloud, file: Path, tags: dict[str, str]) -> None:
    specification = {"ResourceType": "key-pair", "Tags": tag_list(tags)}
    cloud.ec2.import_key_pair(
        KeyName=cloud.cluster, PublicKeyMaterial=public_key(file).encode(), TagSpecifications=[specification]
    )


def _halves(public: str) -> list[str]:
    """Keep the type and the key itself of a public key; what follows is a comment."""
    return public.split()[:2]
