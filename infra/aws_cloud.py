"""AWS as a stack sees it: clients, the names and tags by which its things are known, and what of it exists.

There is no state file. What belongs to a stack carries its tags or its name, from the call that made it on;
so what was interrupted, on whatever machine, is found again.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import Any

import boto3  # type: ignore[import-untyped]
from botocore.config import Config  # type: ignore[import-untyped]
from botocore.exceptions import ClientError  # type: ignore[import-untyped]

from infra.aws_errors import code_of

TAG = "gdl-ray:stack"
OWNER, EXPIRES, IMAGE, ZONES, CONFIG = (
    f"gdl-ray:{name}" for name in ("owner", "expires-at", "image", "zones", "config")
)
PATH = "/gdl-ray/"
"""Where in IAM roles and instance profiles of all stacks are kept."""
KINDS = ("head", "worker")
LIVE = ("pending", "running", "stopping", "stopped", "shutting-down")
PAID = ("creating", "available", "in-use", "error")
PRICES_REGION = "us-east-1"
"""One of the few regions that tell prices, those of the others too."""
RETRIES = Config(retries={"mode": "standard", "total_max_attempts": 8}, connect_timeout=10)

Tags = Mapping[str, str]


@dataclass(frozen=True)
class Machine:
    """An instance that is not terminated."""

    id: str
    type: str
    zone: str
    state: str
    launched: datetime
    image: str
    address: str
    """Public address; empty where it has none."""
    spot: bool
    tags: Tags

    @property
    def is_head(self) -> bool:
        """Tell whether Ray's head runs, or ran, on it."""
        return self.tags.get("ray-node-type") == "head"

    @property
    def kind(self) -> str:
        """`head`, or the name of the workers."""
        return "head" if self.is_head else self.tags.get("ray-user-node-type", "worker")

    @property
    def runs(self) -> bool:
        """Tell whether it works, or is about to."""
        return self.state in ("pending", "running")


class Cloud:
    """AWS, in the region and under the name of one stack."""

    def __init__(self, name: str, region: str) -> None:
        self.name = name
        self.region = region
        self.ec2 = self.client("ec2")

    def client(self, service: str, region: str | None = None) -> Any:
        """Make a client that retries what is worth a retry."""
        return boto3.client(service, region_name=region or self.region, config=RETRIES)

    @cached_property
    def s3(self) -> Any:
        """The client of S3."""
        return self.client("s3")

    @cached_property
    def iam(self) -> Any:
        """The client of IAM."""
        return self.client("iam")

    @cached_property
    def account(self) -> str:
        """Number of the account that the credentials belong to."""
        return str(self.client("sts").get_caller_identity()["Account"])

    @property
    def cluster(self) -> str:
        """Name of the key, the security group and the Ray cluster."""
        return f"gdl-ray-{self.name}"

    def role(self, kind: str) -> str:
        """Name of the role and instance profile of nodes of a kind, with the region, for IAM knows none."""
        return f"gdl-ray-{self.name}-{self.region}-{kind}"

    @property
    def bucket(self) -> str:
        """Name of the bucket that is made for the stack: at most 63 characters, and no other account's."""
        return f"gdl-{self.name}-{self.account}-{self.region}"

    def machines(self, states: Sequence[str] = LIVE) -> list[Machine]:
        """List the stack's instances in some states, the head first."""
        filters = [tag_filter(self.name), {"Name": "instance-state-name", "Values": list(states)}]
        pages = self.ec2.get_paginator("describe_instances").paginate(Filters=filters)
        found = [
            _machine(instance)
            for page in pages
            for reservation in page["Reservations"]
            for instance in reservation["Instances"]
        ]
        return sorted(found, key=lambda machine: (not machine.is_head, machine.kind, machine.launched))

    def head(self) -> Machine | None:
        """Find the head that runs."""
        return next((machine for machine in self.machines(("pending", "running")) if machine.is_head), None)

    def volumes(self, states: Sequence[str] = PAID) -> list[str]:
        """List the ids of the stack's disks in some states; those that are being deleted are not paid for."""
        filters = [tag_filter(self.name), {"Name": "status", "Values": list(states)}]
        pages = self.ec2.get_paginator("describe_volumes").paginate(Filters=filters)
        return [volume["VolumeId"] for page in pages for volume in page["Volumes"]]

    def group(self) -> dict[str, Any] | None:
        """Find the security group that nodes of the stack are in."""
        return next((group for group in self.groups() if group["GroupName"] == self.cluster), None)

    def groups(self) -> list[dict[str, Any]]:
        """List the security groups with the stack's tag, as EC2 describes them."""
        answer = self.ec2.describe_security_groups(Filters=[tag_filter(self.name)])
        found: list[dict[str, Any]] = answer["SecurityGroups"]
        return found

    def key_pairs(self) -> list[dict[str, Any]]:
        """List the key pairs with the stack's tag, and their public halves."""
        filters = [tag_filter(self.name)]
        answer = self.ec2.describe_key_pairs(Filters=filters, IncludePublicKey=True)
        found: list[dict[str, Any]] = answer["KeyPairs"]
        return found

    def bucket_exists(self, name: str) -> bool:
        """Tell whether there is a bucket of that name, and it is this account's."""
        return absent_is_none(self.s3.head_bucket, Bucket=name, ExpectedBucketOwner=self.account) is not None


def expiry(ttl_hours: float) -> str:
    """Tell when what is made now expires, as the tags have it."""
    return (datetime.now(UTC) + timedelta(hours=ttl_hours)).strftime("%Y-%m-%dT%H:%M:%SZ")


def tag_filter(name: str) -> dict[str, Any]:
    """Select by EC2's filter what belongs to a stack."""
    return {"Name": f"tag:{TAG}", "Values": [name]}


def tag_list(tags: Tags) -> list[dict[str, str]]:
    """Write tags as AWS takes them."""
    return [{"Key": key, "Value": value} for key, value in sorted(tags.items())]


def tags_of(described: Mapping[str, Any]) -> dict[str, str]:
    """Read the tags of something that AWS describes."""
    return {tag["Key"]: tag["Value"] for tag in described.get("Tags") or described.get("TagSet") or ()}


def absent_is_none(call: Callable[..., dict[str, Any]], **arguments: object) -> dict[str, Any] | None:
    """Ask AWS for something; None where there is no such thing."""
    try:
        return call(**arguments)
    except ClientError as error:
        code = code_of(error)
        if code in ("404", "NoSuchEntity") or code.startswith("NoSuch") or code.endswith("NotFoundError"):
            return None
        raise


def _machine(instance: Mapping[str, Any]) -> Machine:
    return Machine(
        id=instance["InstanceId"],
        type=instance["InstanceType"],
        zone=instance["Placement"]["AvailabilityZone"],
        state=instance["State"]["Name"],
        launched=instance["LaunchTime"],
        image=instance["ImageId"],
        address=instance.get("PublicIpAddress", ""),
        spot=instance.get("InstanceLifecycle") == "spot",
        tags=tags_of(instance),
    )
