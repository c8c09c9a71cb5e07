"""A cluster file without a cloud: what only a cloud could say is a word that nobody takes for an answer."""

from collections.abc import Iterable, Mapping

from infra.folder import Folder
from infra.nodes import HEAD, Facts, Machine
from infra.stack import Stack, StackError

# What machine types have; a stack with others gives their `resources`.
MACHINES = {
    "m7i.large": Machine(cpus=2),
    "m7i.xlarge": Machine(cpus=4),
    "m7i.2xlarge": Machine(cpus=8),
    "m7i.4xlarge": Machine(cpus=16),
    "c7i.2xlarge": Machine(cpus=8),
    "c7i.4xlarge": Machine(cpus=16),
    "g4dn.xlarge": Machine(cpus=4, gpus=1, accelerator="T4"),
    "g5.xlarge": Machine(cpus=4, gpus=1, accelerator="A10G"),
    "g5.2xlarge": Machine(cpus=8, gpus=1, accelerator="A10G"),
    "g6.xlarge": Machine(cpus=4, gpus=1, accelerator="L4"),
    "g6.2xlarge": Machine(cpus=8, gpus=1, accelerator="L4"),
    "g6.4xlarge": Machine(cpus=16, gpus=1, accelerator="L4"),
    "g6.12xlarge": Machine(cpus=48, gpus=4, accelerator="L4"),
    "g6e.xlarge": Machine(cpus=4, gpus=1, accelerator="L40S"),
    "g6e.2xlarge": Machine(cpus=8, gpus=1, accelerator="L40S"),
    "g6e.12xlarge": Machine(cpus=48, gpus=4, accelerator="L40S"),
    "p4d.24xlarge": Machine(cpus=96, gpus=8, accelerator="A100"),
    "p5.4xlarge": Machine(cpus=16, gpus=1, accelerator="H100"),
    "p5.48xlarge": Machine(cpus=192, gpus=8, accelerator="H100"),
    "e2-standard-2": Machine(cpus=2),
    "e2-standard-4": Machine(cpus=4),
    "e2-standard-8": Machine(cpus=8),
    "n2-standard-8": Machine(cpus=8),
    "n2-standard-16": Machine(cpus=16),
    "n1-standard-4": Machine(cpus=4),
    "n1-standard-8": Machine(cpus=8),
    "g2-standard-4": Machine(cpus=4, gpus=1, accelerator="L4"),
    "g2-standard-8": Machine(cpus=8, gpus=1, accelerator="L4"),
    "g2-standard-12": Machine(cpus=12, gpus=1, accelerator="L4"),
    "g2-standard-24": Machine(cpus=24, gpus=2, accelerator="L4"),
    "g2-standard-48": Machine(cpus=48, gpus=4, accelerator="L4"),
    "a2-highgpu-1g": Machine(cpus=12, gpus=1, accelerator="A100"),
    "a3-highgpu-1g": Machine(cpus=26, gpus=1, accelerator="H100"),
    "a3-highgpu-8g": Machine(cpus=208, gpus=8, accelerator="H100"),
}


def machines(stack: Stack) -> dict[str, Machine]:
    """Look up what the machine types of a stack have.

    Raises:
        StackError: One is not in the table, and the stack does not say what it has.
    """
    found = {stack.head.type: MACHINES.get(stack.head.type, Machine(cpus=1))}
    for each in stack.workers:
        given = each.resources or {}
        known = MACHINES.get(each.type)
        if known is None and not given:
            raise StackError(
                f"workers.{each.name}: {each.type!r} is not among the machine types that are known here; "
                "say what a node has, such as resources: {CPU: 8, GPU: 1}"
            )
        known = known or Machine(cpus=int(given.get("CPU", 1)), gpus=int(given.get("GPU", 0)))
        found[each.type] = attached(known, given)
    return found


def attached(has: Machine, given: Mapping[str, float]) -> Machine:
    """Add the GPUs that a stack gives to machines that bring none."""
    if has.gpus or not given.get("GPU"):
        return has
    return Machine(cpus=has.cpus, gpus=int(given["GPU"]), accelerator=_accelerator(given))


def _accelerator(given: Iterable[str]) -> str:
    """Read the GPU from resources such as {GPU: 1, accelerator_type:V100: 1}; T4 if none is named."""
    names = [name.partition(":")[2] for name in given if ":" in name]
    return names[0] if names else "T4"


def facts(stack: Stack, folder: Folder) -> Facts:
    """Make up what a cloud would say.

    Raises:
        StackError: A machine type is not known here, and the stack does not say what it has.
    """
    names = [HEAD, *(each.name for each in stack.workers)]
    zone = stack.zones[0] if stack.zones != "auto" else f"{stack.region}-ZONE"
    google = stack.cloud == "gcp"
    return Facts(
        folder=folder,
        code="CODE",
        image_id="projects/PROJECT/global/images/IMAGE" if google else "ami-IMAGE",
        machines=machines(stack),
        bucket=f"{'gs' if google else 's3'}://BUCKET",
        expires_at="2030-01-01T00:00:00Z",
        zones=dict.fromkeys(names, (zone,)),
        key_name="KEY",
        subnet_ids=dict.fromkeys(names, ("subnet-SUBNET",)),
        security_group_id="sg-GROUP",
        head_profile_arn="arn:aws:iam::ACCOUNT:instance-profile/HEAD",
        worker_profile_arn="arn:aws:iam::ACCOUNT:instance-profile/WORKER",
        head_account="HEAD@PROJECT.iam.gserviceaccount.com",
        worker_account="WORKER@PROJECT.iam.gserviceaccount.com",
        public_key="ssh-ed25519 KEY",
    )
