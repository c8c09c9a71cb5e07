"""Machines of a cluster, as the clouds describe them: what each may do, how it is found, when it ends."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from infra.folder import Folder
from infra.local import PROJECT
from infra.node import USER
from infra.stack import Stack

HEAD = "head"
DISK_GB = 150
TAG = "gdl-ray"
"""Begins the names and tags of all that is made."""

Description = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a machine type has, as Ray counts it."""

    cpus: int
    gpus: int = 0
    accelerator: str = ""
    """Kind of its GPUs as Ray names it, such as L4."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a cluster file needs that no stack file says: what the cloud has, and what was made in it."""

    folder: Folder
    """Where key, token, passwords and code are on this machine."""
    code: str
    """What `Folder.pack` says of the code."""
    image_id: str
    """The machine image, named so that it stays the same."""
    machines: Mapping[str, Machine]
    """By machine type, that of the head too."""
    bucket: str
    """Address of the bucket, such as s3://name."""
    expires_at: str
    """When all nodes end themselves, as 2026-01-31T12:00:00Z; the same as long as the head lives."""
    zones: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """By the name of the workers, and `head`: zones in the order to try; on Google Cloud, one for all."""
    key_name: str = ""
    """AWS: of the key pair; session manager needs one too, which lets nobody in without its permission."""
    subnet_ids: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """AWS: by the name of the workers, and `head`: subnets in zones that have the machine type."""
    security_group_id: str = ""
    head_profile_arn: str = ""
    worker_profile_arn: str = ""
    root_device: str = "/dev/sda1"
    """AWS: how the image names its root disk."""
    head_account: str = ""
    """Google Cloud: e-mail of the head's service account."""
    worker_account: str = ""
    public_key: str = ""
    """Google Cloud: the public half of the key, in a line."""


def resources(machine: Machine) -> dict[str, float]:
    """Tell what Ray counts on a machine."""
    found: dict[str, float] = {"CPU": machine.cpus, "GPU": machine.gpus}
    return found | ({f"accelerator_type:{machine.accelerator}": 1} if machine.accelerator else {})


def describe(stack: Stack, facts: Facts, name: str, kind: str, spot: bool) -> Description:
    """Describe a node for Ray's provider: its name among the kinds of nodes, its machine type, its market."""
    make = _gcp_node if stack.cloud == "gcp" else _aws_node
    return make(stack, facts, name, kind, spot)


def _aws_node(stack: Stack, facts: Facts, name: str, kind: str, spot: bool) -> Description:
    """Describe an instance as EC2's RunInstances has it."""
    tags = {"stack": stack.stack, "owner": stack.owner, "expires-at": facts.expires_at}
    named = [{"Key": f"{TAG}:{key}", "Value": value} for key, value in tags.items()]
    disk = {"VolumeSize": DISK_GB, "VolumeType": "gp3", "Encrypted": True, "DeleteOnTermination": True}
    config: Description = {
        "InstanceType": kind,
        "ImageId": facts.image_id,
        "KeyName": facts.key_name,
        "SubnetIds": list(facts.subnet_ids[name]),
        "SecurityGroupIds": [facts.security_group_id],
        "IamInstanceProfile": {"Arn": facts.head_profile_arn if name == HEAD else facts.worker_profile_arn},
        "MetadataOptions": {
            "HttpTokens": "required",
            "HttpEndpoint": "enabled",
            "HttpPutResponseHopLimit": 2,
        },
        "InstanceInitiatedShutdownBehavior": "terminate",
        "BlockDeviceMappings": [{"DeviceName": facts.root_device, "Ebs": disk}],
        "TagSpecifications": [{"ResourceType": what, "Tags": named} for what in ("instance", "volume")],
        "UserData": guard(facts.expires_at, name),
    }
    if spot:
        options = {"SpotInstanceType": "one-time", "InstanceInterruptionBehavior": "terminate"}
        config["InstanceMarketOptions"] = {"MarketType": "spot", "SpotOptions": options}
    return config


def _gcp_node(stack: Stack, facts: Facts, name: str, kind: str, spot: bool) -> Description:
    """Describe an instance as Compute Engine's instances.insert has it."""
    zone = facts.zones[HEAD][0]
    scheduling: Description = {
        "terminationTime": facts.expires_at,  # maxRunDuration would count from each node's own launch
        "instanceTerminationAction": "DELETE",
        "onHostMaintenance": "TERMINATE",
        "automaticRestart": False,
        "provisioningModel": "SPOT" if spot else "STANDARD",
    }
    account = facts.head_account if name == HEAD else facts.worker_account
    metadata = {
        "ssh-keys": f"{USER}:{facts.public_key}",
        "block-project-ssh-keys": "true",
        "startup-script": guard("", name),
    }
    # The address is for the way out; the firewall lets in what comes through Google's proxy.
    way_out = {"name": "External NAT", "type": "ONE_TO_ONE_NAT"}
    subnet = f"projects/{stack.project}/regions/{stack.region}/subnetworks/{TAG}-{stack.stack}"
    config: Description = {
        "machineType": kind,
        "networkInterfaces": [{"subnetwork": subnet, "accessConfigs": [way_out]}],
        "labels": gcp_labels(stack, facts.expires_at, facts.image_id),
        "tags": {"items": [f"{TAG}-{stack.stack}"]},
        "disks": [
            {
                "boot": True,
                "autoDelete": True,
                "type": "PERSISTENT",
                "initializeParams": {
                    "labels": gcp_labels(stack, facts.expires_at, facts.image_id),
                    "diskSizeGb": str(DISK_GB),
                    "sourceImage": facts.image_id,
                    "diskType": f"zones/{zone}/diskTypes/pd-balanced",
                },
            }
        ],
        "serviceAccounts": [{"email": account, "scopes": ["https://www.googleapis.com/auth/cloud-platform"]}],
        "scheduling": scheduling,
        "metadata": {"items": [{"key": key, "value": value} for key, value in metadata.items()]},
        "shieldedInstanceConfig": {"enableVtpm": True, "enableIntegrityMonitoring": True},
    }
    machine = facts.machines[kind]
    if machine.gpus and needs_accelerator(kind):
        model = f"nvidia-tesla-{machine.accelerator.lower()}"
        config["guestAccelerators"] = [{"acceleratorType": model, "acceleratorCount": machine.gpus}]
    return config


def needs_accelerator(kind: str) -> bool:
    """Tell whether a machine type of Google Cloud has no GPU until one is attached."""
    return kind.startswith("n1-")


def gcp_labels(stack: Stack, expires_at: str, image_id: str) -> dict[str, str]:
    """Label what belongs to a stack, in the lowercase letters, digits, `-` and `_` that Google Cloud has."""
    image = image_id.rpartition("/")[2]
    values = {"stack": stack.stack, "owner": stack.owner, "expires-at": expires_at, "image": image}
    return {
        f"{TAG}-{key}": "".join(char if char.isalnum() or char == "-" else "_" for char in value.lower())
        for key, value in values.items()
    }


def guard(expires_at: str, name: str) -> str:
    """Make the script by which a node ends itself when time is over; no time where the cloud does it."""
    script = (PROJECT / "infra" / "scripts" / "guard.sh").read_text()
    return script.replace("@EXPIRES_AT@", expires_at).replace("@ROLE@", "head" if name == HEAD else "worker")
