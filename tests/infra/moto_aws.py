"""An AWS of the test's own, moto's and what moto lacks: every call is seen, and may be the last.

Nothing here reaches the internet or reads the user's credentials. What AWS holds is told by `inventory`,
which asks by itself and not through the code under test.
"""

import copy
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import boto3  # type: ignore[import-untyped]
import pytest
import yaml
from moto import mock_aws
from moto.backends import get_backend
from moto.core import responses
from moto.core.utils import method_names_from_class
from moto.kms import models as kms_models
from moto.kms.utils import generate_private_key
from moto.s3.models import s3_backends

from infra import aws, aws_launch, aws_teardown, cluster
from infra.aws_cloud import RETRIES, Cloud
from infra.folder import Folder
from infra.local import home_dir
from infra.stack import Access, Budget, Head, Stack, Workers

REGION = "us-west-2"
ADDRESS = "203.0.113.7/32"
IMAGE = "ami-0123456789abcdef0"
PRICES = {"m7i.large": 0.1, "g6.xlarge": 0.8}
STACK = Stack(
    stack="demo",
    cloud="aws",
    region=REGION,
    owner="ada@example.com",
    ttl_hours=12,
    access=Access(mode="ssh", cidr="auto"),
    head=Head(type="m7i.large"),
    workers=(
        Workers(name="l4-spot", type="g6.xlarge", market="spot", max=4, priority=10),
        Workers(name="l4", type="g6.xlarge", market="on-demand", max=2),
    ),
    budget=Budget(max_hourly_usd=10),
)
SERVICES: tuple[Any, ...] = ("ec2", "iam", "s3", "kms")
"""Those that hold something of a stack."""
READS = re.compile(r"(Describe|Get|List|Head)[A-Z]\w*")


class Interrupted(BaseException):
    """The process was ended at this moment; no code catches it."""


@dataclass(frozen=True)
class Call:
    """A request that went to AWS."""

    operation: str
    body: Any

    @property
    def changes_nothing(self) -> bool:
        """Tell whether it is a question, or a rehearsal."""
        rehearsal = isinstance(self.body, Mapping) and str(self.body.get("DryRun")).lower() == "true"
        return rehearsal or READS.fullmatch(self.operation) is not None


@dataclass
class FakeAws:
    """What went to AWS, what it answers beyond moto, and when the process is to be ended."""

    calls: list[Call] = field(default_factory=list)
    ray: list[tuple[str, ...]] = field(default_factory=list)
    """Command lines of Ray's launcher."""
    answers: dict[str, Callable[[Call], dict[str, Any] | None]] = field(default_factory=dict)
    """By operation: the answer, in place of moto's; None leaves it to moto."""
    moments: list["Moment"] | None = None
    """What there was before each change; None where nobody asks."""
    end_after_change: bool = False
    """End the process when a change is done, and it does not know so yet."""

    def before(self, model: Any, params: dict[str, Any], **_: object) -> tuple[Any, dict[str, Any]] | None:
        """Record a call, and answer."""
        call = Call(model.name, params.get("body"))
        if self.moments is not None and not call.changes_nothing:
            self.moments.append(Moment(call.operation))
        self.calls.append(call)
        answer = self.answers[model.name](call) if model.name in self.answers else None
        if answer is None:
            return None
        status = 400 if "Error" in answer else 200
        return SimpleNamespace(status_code=status), answer | {"ResponseMetadata": {"HTTPStatusCode": status}}

    def after(self, **_: object) -> None:
        """End the process before it learns what the call has done."""
        if self.end_after_change and not self.calls[-1].changes_nothing:
            raise Interrupted

    @property
    def changes(self) -> list[str]:
        """The operations that changed something, in order."""
        return [call.operation for call in self.calls if not call.changes_nothing]


class Moment:
    """What there is just before a change: all that AWS holds, and the files of the stack on this machine."""

    def __init__(self, change: str) -> None:
        self.change = change
        self._aws = copy.deepcopy(_held())
        self._buckets = dict(s3_backends.bucket_accounts)  # whose each is
        self._files = _files()

    def come_back(self) -> None:
        """Make all as it was then: as if the machine had lost its power at this moment, and was on again."""
        for (service, account), regions in copy.deepcopy(self._aws).items():
            place = get_backend(service)[account]
            place.clear()
            place.update(regions)
        s3_backends.bucket_accounts.clear()
        s3_backends.bucket_accounts.update(self._buckets)
        for file in _files():
            file.unlink()
        for file, (content, mode) in self._files.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
            file.chmod(mode)


def _held() -> dict[tuple[Any, str], dict[str, Any]]:
    """All that moto holds for a stack, by service and account; a copy of it has all that belongs together."""
    return {
        (service, account): dict(regions)
        for service in SERVICES
        for account, regions in get_backend(service).items()
    }


def _files() -> dict[Path, tuple[bytes, int]]:
    files = [file for file in home_dir().rglob("*") if file.is_file()]
    return {file: (file.read_bytes(), file.stat().st_mode) for file in files}


def error(code: str, message: str = "") -> Callable[[Call], dict[str, Any]]:
    """Make an answer of AWS that refuses."""
    return lambda _: {"Error": {"Code": code, "Message": message}}


def price_of(call: Call) -> dict[str, Any]:
    """Answer as the price list does, which moto has not."""
    filters = json.loads(call.body)["Filters"]
    usd = PRICES.get(next(each["Value"] for each in filters if each["Field"] == "instanceType"))
    dimension = {"unit": "Hrs", "pricePerUnit": {"USD": str(usd)}}
    product = {"terms": {"OnDemand": {"a": {"priceDimensions": {"b": dimension}}}}}
    return {"PriceList": [json.dumps(product)] if usd else []}


@contextmanager
def fake_aws(home: Path) -> Iterator[FakeAws]:
    """Run with an empty AWS of moto's, in an environment that knows no other.

    Ray's launcher, the wheel and the check of the cluster file, which take seconds, have tests of their own.
    """
    fake = FakeAws()
    fake.answers = {
        "GetProducts": price_of,
        "GetServiceQuota": lambda _: {"Quota": {"Value": 64.0}},
        "GetParameter": lambda _: {"Parameter": {"Value": IMAGE}},
    }
    with pytest.MonkeyPatch.context() as patch:
        set_environment(patch, home)
        patch.setattr(boto3, "DEFAULT_SESSION", _session())
        patch.setattr(_Hooks, "fake", fake)
        patch.setattr(Cloud, "client", lambda cloud, name, region=None: _client(name, region or cloud.region))
        patch.setattr(kms_models, "generate_private_key", _private_key)
        patch.setattr(responses, "method_names_from_class", _method_names)
        patch.setattr(aws, "caller_cidr", lambda: ADDRESS)
        patch.setattr(aws_teardown, "PAUSE_S", 0)
        patch.setattr(aws_launch, "ray", lambda *arguments: launcher(fake, *arguments))
        patch.setattr(aws_launch, "tools_missing", lambda stack: [])
        patch.setattr(Folder, "pack", lambda folder: "0123456789ab")
        patch.setattr(cluster, "validate", lambda rendered: [])
        with mock_aws():
            yield fake


# What takes longer than a call to moto is made once: session, clients, the key for disks, names of calls.
class _Hooks:
    """Hands what happens in the one session to the AWS of the test that runs."""

    fake: ClassVar[FakeAws] = FakeAws()

    @classmethod
    def before(cls, **event: Any) -> tuple[Any, dict[str, Any]] | None:
        return cls.fake.before(**event)

    @classmethod
    def after(cls, **event: Any) -> None:
        cls.fake.after(**event)


@cache
def _session() -> Any:
    session = boto3.Session(region_name=REGION)
    session.events.register("before-call", _Hooks.before)
    session.events.register("after-call", _Hooks.after)
    return session


def _client(service: str, region: str) -> Any:
    return _client_of(service, region, os.environ.get("AWS_ENDPOINT_URL"))


@cache
def _client_of(service: str, region: str, endpoint: str | None) -> Any:
    return _session().client(service, region_name=region, endpoint_url=endpoint, config=RETRIES)


_private_key = cache(generate_private_key)
_method_names = cache(method_names_from_class)  # which moto looks up anew at each call


def set_environment(patch: pytest.MonkeyPatch, home: Path) -> None:
    """Make the environment one in which no real AWS is known."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_REGION"):
        patch.delenv(name, raising=False)
    values = {
        "HOME": str(home),
        "GDL_RAY_HOME": str(home / "gdl"),
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_CONFIG_FILE": str(home / "no-config"),
        "AWS_SHARED_CREDENTIALS_FILE": str(home / "no-credentials"),
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_DEFAULT_REGION": REGION,
        "MOTO_EC2_LOAD_DEFAULT_AMIS": "false",  # thousands, made anew each time
    }
    for name, value in values.items():
        patch.setenv(name, value)


def launcher(fake: FakeAws, *arguments: str) -> tuple[int, str]:
    """Do what `ray up` and `ray down` do to a head, without a node; test_aws_launch.py runs the real ones."""
    fake.ray.append(arguments)
    rendered = yaml.load(Path(arguments[-1]).read_text(), yaml.CSafeLoader)
    name = rendered["cluster_name"]
    ec2 = _client("ec2", REGION)
    ours = [
        {"Name": "tag:ray-cluster-name", "Values": [name]},
        {"Name": "tag:ray-node-type", "Values": ["head"]},
    ]
    live = {"Name": "instance-state-name", "Values": ["pending", "running"]}
    found = [
        each
        for group in ec2.describe_instances(Filters=[*ours, live])["Reservations"]
        for each in group["Instances"]
    ]
    heads = [each["InstanceId"] for each in found]
    if arguments[0] == "down":
        ec2.terminate_instances(InstanceIds=heads)
        return 0, ""
    tags = {"ray-cluster-name": name, "ray-node-type": "head", "ray-user-node-type": "head"}
    if not heads:
        heads = [launch(ec2, rendered["available_node_types"]["head"]["node_config"], tags)]
    done = {"Key": "ray-node-status", "Value": "up-to-date"}
    if not any(done in each["Tags"] for each in found):
        ec2.create_tags(Resources=heads, Tags=[done])
    return 0, ""


def launch(ec2: Any, node_config: Mapping[str, Any], tags: Mapping[str, str]) -> str:
    """Launch a node as Ray does, with tags in addition; its id."""
    config = {key: value for key, value in node_config.items() if key != "SubnetIds"}
    more = [{"Key": key, "Value": value} for key, value in tags.items()]
    config["TagSpecifications"] = [
        {**each, "Tags": each["Tags"] + (more if each["ResourceType"] == "instance" else [])}
        for each in config["TagSpecifications"]
    ]
    answer = ec2.run_instances(SubnetId=node_config["SubnetIds"][0], MinCount=1, MaxCount=1, **config)
    return str(answer["Instances"][0]["InstanceId"])


def inventory(region: str = REGION) -> Counter[str]:
    """Count what AWS holds that no empty account holds, by kind and name."""
    ec2, iam, s3 = (_client(name, region) for name in ("ec2", "iam", "s3"))
    reservations = ec2.describe_instances()["Reservations"]
    found = [
        f"instance {_stack(each)}"
        for group in reservations
        for each in group["Instances"]
        if each["State"]["Name"] != "terminated"
    ]
    found += [f"volume {_stack(each)}" for each in ec2.describe_volumes()["Volumes"]]
    groups = ec2.describe_security_groups()["SecurityGroups"]
    found += [f"group {each['GroupName']}" for each in groups if each["GroupName"] != "default"]
    found += [f"key {each['KeyName']}" for each in ec2.describe_key_pairs()["KeyPairs"]]
    found += [f"role {each['RoleName']}" for each in iam.list_roles()["Roles"]]
    profiles = iam.list_instance_profiles()["InstanceProfiles"]
    found += [f"profile {each['InstanceProfileName']}" for each in profiles]
    found += [f"bucket {each['Name']}" for each in s3.list_buckets()["Buckets"]]
    return Counter(found)


def _stack(described: Mapping[str, Any]) -> str:
    tags = {tag["Key"]: tag["Value"] for tag in described.get("Tags", [])}
    return str(tags.get("gdl-ray:stack", "?"))


def run_into_the_end(fake: FakeAws, verb: Callable[[], object]) -> int:
    """Run a verb until it comes through; each run is ended when its first change is done. How many were."""
    fake.end_after_change = True
    for runs in range(100):
        try:
            verb()
        except Interrupted:
            continue
        fake.end_after_change = False
        return runs
    raise AssertionError("it never comes through")
