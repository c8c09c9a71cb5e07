"""Machines on Google Cloud: types, images, quotas, and the one machine of a stack without workers."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from infra.folder import Folder
from infra.gcloud import GcloudError, gcloud
from infra.gcp_foundation import account_of, bucket_of, name_of
from infra.gcp_nodes import instances, is_off, is_spot, last
from infra.local import PROJECT
from infra.nodes import DISK_GB, Machine, gcp_labels, needs_accelerator
from infra.placeholders import attached
from infra.plan import Refused
from infra.stack import Stack

IMAGE_PROJECT = "ubuntu-os-accelerator-images"
IMAGE_FAMILY = "ubuntu-accelerator-2404-amd64-with-nvidia-580"
"""Ubuntu with Nvidia's driver; Python 3.12."""


def image(name: str = "") -> str:
    """Give the address of the image: of this name if there is one, else the newest of its family."""
    where = f"--project={IMAGE_PROJECT}"
    if not name:
        name = gcloud("compute", "images", "describe-from-family", IMAGE_FAMILY, where)["name"]
    return f"projects/{IMAGE_PROJECT}/global/images/{name}"


def machine(row: Mapping[str, Any], stack: Stack) -> Machine:
    """Read what a machine type has, with what a stack attaches to it."""
    gpus = row.get("accelerators") or []
    model = gpus[0]["guestAcceleratorType"] if gpus else ""
    count = sum(int(each["guestAcceleratorCount"]) for each in gpus)
    name = model.removeprefix("nvidia-").removeprefix("tesla-").partition("-")[0].upper()
    has = Machine(cpus=int(row["guestCpus"]), gpus=count, accelerator=name)
    given = [each.resources for each in stack.workers if each.type == row["name"] and each.resources]
    if not stack.workers and needs_accelerator(row["name"]):
        given = [{"GPU": 1}]  # which `create` attaches
    return attached(has, given[0]) if given else has


def quota_problems(stack: Stack, machines: Mapping[str, Machine]) -> list[str]:
    """Compare the GPUs that a stack may launch with what region and project allow beyond those in use."""
    region = gcloud("compute", "regions", "describe", stack.region, f"--project={stack.project}")
    project = gcloud("compute", "project-info", "describe", f"--project={stack.project}")
    left = {each["metric"]: each["limit"] - each["usage"] for each in region["quotas"] + project["quotas"]}
    for metric, count in _in_use(stack, machines).items():
        if metric in left:
            left[metric] += count
    need: dict[str, int] = {}
    kinds = [
        (stack.head.type, "on-demand", 1),
        *((each.type, each.market, each.max) for each in stack.workers),
    ]
    for kind, market, most in kinds:
        has = machines.get(kind)
        if has and has.gpus:
            for each in _metrics(has, market == "spot"):
                need[each] = need.get(each, 0) + most * has.gpus
    return [
        f"quota {metric} leaves {left[metric]:g} of the {count} that the stack may use in {stack.region}: "
        "ask for more (console, IAM & Admin, Quotas), or lower max"
        for metric, count in need.items()
        if metric in left and left[metric] < count
    ]


def _metrics(machine: Machine, is_spot: bool) -> tuple[str, str]:
    """Name the quotas that the GPUs of a machine count in."""
    return f"{'PREEMPTIBLE_' if is_spot else ''}NVIDIA_{machine.accelerator}_GPUS", "GPUS_ALL_REGIONS"


def _in_use(stack: Stack, machines: Mapping[str, Machine]) -> dict[str, int]:
    """Count the GPUs that the stack's own nodes have now: they are in use, and meant for it."""
    used: dict[str, int] = {}
    for each in instances(stack.project, stack.stack):
        has = machines.get(last(each["machineType"]))
        if has and has.gpus and not is_off(each):
            for metric in _metrics(has, is_spot(each)):
                used[metric] = used.get(metric, 0) + has.gpus
    return used


def create(stack: Stack, zones: Sequence[str], image_id: str, expires_at: str, folder: Folder) -> str:
    """Make the one machine of a stack, in the first zone that has room; it runs the local platform.

    Returns:
        The zone.

    Raises:
        Refused: No zone has room.
    """
    folder.make()
    digest = folder.pack()
    gcloud("storage", "cp", "--recursive", str(folder.code), f"{bucket_of(stack)}/")
    waiting, full = list(zones), []
    with tempfile.NamedTemporaryFile("w", suffix=".sh") as script:
        script.write(startup(stack, digest))
        script.flush()
        while waiting:
            zone = waiting.pop(0)
            try:
                gcloud(*create_command(stack, zone, image_id, expires_at, Path(script.name)))
            except GcloudError as error:
                if not error.has_no_room:
                    raise
                print(f"    {zone} has no {stack.head.type} now", flush=True)
                full.append(zone)
                # Those that Google says have room come first.
                waiting.sort(key=lambda each, said=error.zones_available: each not in said)  # type: ignore[misc]
            else:
                print(f"    in {zone}", flush=True)
                return zone
    raise Refused(
        f"no zone has a {stack.head.type} now ({', '.join(full)}): try later, another type or region"
    )


def create_command(stack: Stack, zone: str, image_id: str, expires_at: str, script: Path) -> list[str]:
    """Give the command that makes the machine, with a GPU attached where its type brings none."""
    labels = ",".join(f"{key}={value}" for key, value in gcp_labels(stack, expires_at, image_id).items())
    kind = stack.head.type
    return [
        "compute",
        "instances",
        "create",
        name_of(stack),
        f"--project={stack.project}",
        f"--zone={zone}",
        f"--machine-type={kind}",
        *(["--accelerator=type=nvidia-tesla-t4,count=1"] if needs_accelerator(kind) else []),
        f"--image={image_id}",
        f"--boot-disk-size={DISK_GB}GB",
        "--boot-disk-type=pd-balanced",
        f"--subnet={name_of(stack)}",
        f"--tags={name_of(stack)}",
        f"--labels={labels}",
        f"--service-account={account_of(stack, 'worker')}",
        "--scopes=cloud-platform",
        f"--termination-time={expires_at}",
        "--instance-termination-action=DELETE",
        "--provisioning-model=STANDARD",
        "--maintenance-policy=TERMINATE",
        "--no-restart-on-failure",
        f"--metadata-from-file=startup-script={script}",
    ]


def startup(stack: Stack, digest: str) -> str:
    """Make the script that installs the code and starts the local platform, at each boot."""
    script = (PROJECT / "infra" / "scripts" / "machine.sh").read_text()
    return script.replace("@BUCKET@", bucket_of(stack)).replace("@DIGEST@", digest)
