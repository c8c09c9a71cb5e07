"""What nodes on Google Cloud need: a network, accounts, a bucket; how each is seen, made and deleted."""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra.gcloud import found, gone, made
from infra.nodes import TAG
from infra.stack import Stack

Argv = tuple[str, ...]

PROXY = "35.235.240.0/20"
"""Where Google's Identity-Aware Proxy comes from, which asks who somebody is before it lets him in."""
INSIDE = "10.128.0.0/20"
HEAD_ROLE = "roles/compute.instanceAdmin.v1"
BUCKET_ROLE = "roles/storage.objectAdmin"
LIFECYCLE = Path(__file__).with_name("gcp_lifecycle.json")
"""What becomes of replaced versions and abandoned uploads in the bucket, as Cloud Storage has it."""


@dataclass(frozen=True)
class Thing:
    """Something that a stack needs: what, and the commands that show, make and delete it."""

    what: str
    look: Argv
    make: Argv
    end: Argv = ()
    """Empty where it goes with something else."""
    is_data: bool = False
    """Whether `down` leaves it unless it is told to delete data."""
    holds: Callable[[Any], bool] = bool
    """Whether what `look` shows is as it should be."""

    def is_there(self) -> bool:
        """Look whether it is as it should be."""
        return self.holds(found(*self.look))

    def create(self) -> None:
        """Make it."""
        made(*self.make)

    def delete(self) -> None:
        """Delete it."""
        if self.end:
            gone(*self.end)


def name_of(stack: Stack) -> str:
    """Name the network of a stack, its tag, and its machine if it has but one."""
    return f"{TAG}-{stack.stack}"


def bucket_of(stack: Stack) -> str:
    """Give the address of a stack's bucket."""
    own = f"{TAG}-{stack.project}-{stack.stack}"
    return f"gs://{own if stack.storage.bucket == 'auto' else stack.storage.bucket}"


def account_of(stack: Stack, role: str) -> str:
    """Give the e-mail of a service account: that of the `head`, or of a `worker`."""
    return f"gdl-{stack.stack}-{role}@{stack.project}.iam.gserviceaccount.com"


def things(stack: Stack) -> list[Thing]:
    """List all that the nodes of a stack need, each after what it needs itself."""
    return [*_network(stack), *_accounts(stack), *_bucket(stack), *_rights(stack)]


def missing(stack: Stack) -> list[Thing]:
    """Look which of them are not there, several at a time: gcloud takes its seconds for each."""
    needed = things(stack)
    with ThreadPoolExecutor(6) as pool:
        return [
            thing for thing, there in zip(needed, pool.map(Thing.is_there, needed), strict=True) if not there
        ]


def bucket_problems(stack: Stack) -> list[str]:
    """Say what is wrong with a bucket that is the user's own, which is used as it is."""
    bucket = bucket_of(stack)
    if stack.storage.bucket == "auto" or found("storage", "buckets", "describe", bucket):
        return []
    return [f"storage.bucket: {bucket} does not exist; make it, or write auto"]


def _network(stack: Stack) -> Iterator[Thing]:
    """A network of the stack's own: the default one of a project lets the whole world try to log in."""
    name, project = name_of(stack), f"--project={stack.project}"
    networks = ("compute", "networks")
    yield Thing(
        f"network {name}",
        (*networks, "describe", name, project),
        (*networks, "create", name, project, "--subnet-mode=custom"),
        (*networks, "delete", name, project),
    )
    subnets, region = ("compute", "networks", "subnets"), f"--region={stack.region}"
    reach_buckets = "--enable-private-ip-google-access"
    yield Thing(
        f"subnet {name} in {stack.region}",
        (*subnets, "describe", name, project, region),
        (*subnets, "create", name, project, region, f"--network={name}", f"--range={INSIDE}", reach_buckets),
        (*subnets, "delete", name, project, region),
    )
    rules = {"inside": ("--allow=all", INSIDE), "proxy": ("--allow=tcp:22", PROXY)}
    firewall = ("compute", "firewall-rules")
    for rule, (allow, source) in rules.items():
        from_where = (f"--source-ranges={source}", f"--target-tags={name}")
        yield Thing(
            f"firewall rule {name}-{rule}: {allow.removeprefix('--allow=')} from {source}",
            (*firewall, "describe", f"{name}-{rule}", project),
            (*firewall, "create", f"{name}-{rule}", project, f"--network={name}", allow, *from_where),
            (*firewall, "delete", f"{name}-{rule}", project),
        )


def _accounts(stack: Stack) -> Iterator[Thing]:
    accounts, project = ("iam", "service-accounts"), f"--project={stack.project}"
    for role in ("head", "worker"):
        email = account_of(stack, role)
        yield Thing(
            f"account {email}",
            (*accounts, "describe", email, project),
            (
                *accounts,
                "create",
                email.partition("@")[0],
                project,
                f"--display-name=gdl_ray {stack.stack} {role}",
            ),
            (*accounts, "delete", email, project),
        )


def _bucket(stack: Stack) -> Iterator[Thing]:
    if stack.storage.bucket != "auto":
        return  # the user's own: neither made, nor changed, nor deleted
    bucket = bucket_of(stack)
    closed = ("--uniform-bucket-level-access", "--public-access-prevention")
    place = (f"--project={stack.project}", f"--location={stack.region}")
    yield Thing(
        f"bucket {bucket}, closed to the public",
        ("storage", "buckets", "describe", bucket),
        ("storage", "buckets", "create", bucket, *place, *closed),
        ("storage", "rm", "--recursive", bucket),
        is_data=True,
    )
    yield Thing(
        f"versioning of {bucket}, replaced versions for 30 days and abandoned uploads for 3",
        ("storage", "buckets", "describe", bucket),
        ("storage", "buckets", "update", bucket, "--versioning", f"--lifecycle-file={LIFECYCLE}"),
        holds=_is_versioned,
    )


def _is_versioned(bucket: Any) -> bool:
    """Tell whether a bucket keeps replaced versions, and not for ever."""
    rules = ((bucket or {}).get("lifecycle_config") or {}).get("rule", [])
    wanted = json.loads(LIFECYCLE.read_text())["rule"]
    return bool(bucket and bucket.get("versioning_enabled") and all(rule in rules for rule in wanted))


def _rights(stack: Stack) -> Iterator[Thing]:
    """Let the head launch workers under their account and no other, and both use the bucket and no other."""
    head, worker = (f"serviceAccount:{account_of(stack, role)}" for role in ("head", "worker"))
    bucket, project = bucket_of(stack), stack.project
    yield _right(f"launch nodes in {project}", ("projects",), (project,), head, HEAD_ROLE)
    accounts = ("iam", "service-accounts")
    on_worker = (account_of(stack, "worker"), f"--project={project}")
    user = "roles/iam.serviceAccountUser"
    yield _right("launch them as workers", accounts, on_worker, head, user, goes_with_it=True)
    for member in (head, worker):
        yield _right(f"read and write {bucket}", ("storage", "buckets"), (bucket,), member, BUCKET_ROLE)


def _right(what: str, kind: Argv, of: Argv, member: str, role: str, goes_with_it: bool = False) -> Thing:
    """Describe a right of an account; one on what stays when the stack ends is to be taken back."""
    who = (f"--member={member}", f"--role={role}", "--condition=None")

    def holds(policy: Any) -> bool:
        bindings = (policy or {}).get("bindings", [])
        return any(each["role"] == role and member in each.get("members", []) for each in bindings)

    return Thing(
        f"right of {member.partition(':')[2].partition('@')[0]} to {what}",
        (*kind, "get-iam-policy", *of),
        (*kind, "add-iam-policy-binding", *of, *who),
        () if goes_with_it else (*kind, "remove-iam-policy-binding", *of, *who),
        holds=holds,
    )
