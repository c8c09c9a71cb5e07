"""The stack file: the only file that a user writes about a cluster in a cloud.

It is read strictly. A key that means nothing, a value of the wrong type or out of its range is an error which
names the key, the value and the cure, and all errors of a file are told at once.
"""

import difflib
import ipaddress
import re
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml

MARKETS = ("spot", "on-demand")
CLOUDS = ("local", "aws", "gcp")
MAX_TTL_HOURS = 720
MAX_NODES = 1000

Check = Callable[[Any], Any]
"""Returns the value as the stack holds it; raises ValueError with what is wrong and what would be right."""


class StackError(Exception):
    """The stack file cannot be used; each line of the message names file, key, value and cure."""


@dataclass(frozen=True, kw_only=True)
class Access:
    """How the user reaches the head."""

    mode: Literal["ssh", "ssm"] = "ssh"
    """`ssh` by a key of the stack's own (on Google Cloud inside its Identity-Aware Proxy); `ssm` by AWS
    Systems Manager, with no open port at all."""
    cidr: str = "auto"
    """Addresses that may connect by ssh, such as 203.0.113.7/32; `auto` for the one that the user has now."""


@dataclass(frozen=True, kw_only=True)
class Head:
    """The node that runs Ray's control, MLflow and the ingress, and no work."""

    type: str
    """Machine type, as the cloud names it."""


@dataclass(frozen=True, kw_only=True)
class Workers:
    """A kind of nodes that are launched when work waits for them."""

    name: str
    type: str
    """Machine type, as the cloud names it."""
    market: Literal["spot", "on-demand"] = "on-demand"
    min: int = 0
    """Nodes that stay when nothing waits."""
    max: int
    priority: int = 0
    """Of the kinds that would do, the one with the highest is launched first."""
    resources: Mapping[str, float] | None = None
    """What Ray counts on a node, such as {CPU: 8, GPU: 1}; None for what the machine type has."""


@dataclass(frozen=True, kw_only=True)
class Storage:
    """Where checkpoints and MLflow's artifacts go."""

    bucket: str = "auto"
    """Name of the bucket; `auto` for one that is made for the stack."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What may be spent."""

    max_hourly_usd: float
    """`up` refuses a stack that costs more in an hour when all of its nodes run."""


@dataclass(frozen=True, kw_only=True)
class Stack:
    """A cluster as the user wants it."""

    stack: str
    """Its name, which also names and tags all that is made for it."""
    cloud: Literal["local", "aws", "gcp"]
    project: str = ""
    """On Google Cloud, the id of the project."""
    region: str = ""
    zones: Literal["auto"] | tuple[str, ...] = "auto"
    """Zones that nodes may be in; `auto` for those that have the machine types."""
    owner: str = ""
    """Who to ask about it; a tag on all that costs money."""
    ttl_hours: float = 12
    """All nodes end themselves so long after the head is launched, whatever else happens."""
    access: Access = Access()
    image: str = ""
    """Container image for all nodes; empty to install this version of the project on the cloud's image."""
    head: Head = Head(type="")
    workers: tuple[Workers, ...] = ()
    storage: Storage = Storage()
    budget: Budget = field(default_factory=lambda: Budget(max_hourly_usd=10))


def load(path: Path) -> Stack:
    """Read a stack file.

    Raises:
        StackError: It is not there, is no YAML, or says what cannot be; a line for each thing to mend.
    """
    try:
        content = yaml.load(path.read_text(), _UniqueKeys)  # noqa: S506  (it extends the safe loader)
    except OSError as error:
        raise StackError(
            f"{path}: {error.strerror}; infra/stack.example.yaml is one to start from"
        ) from error
    except yaml.YAMLError as error:
        raise StackError(f"{path}: {' '.join(str(error).split())}") from error
    problems: list[str] = []
    stack = _record(Stack, _STACK, content, "", problems)
    problems += _contradictions(stack) if isinstance(stack, Stack) else []
    if problems or not isinstance(stack, Stack):
        raise StackError("\n".join(f"{path}: {problem}" for problem in problems))
    return stack


class _UniqueKeys(yaml.SafeLoader):
    """YAML's safe loader, which also refuses a key that is given twice instead of taking the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} twice", node.start_mark)
        content: dict[Hashable, Any] = super().construct_mapping(node, deep)
        return content


def _record(kind: Any, checks: Mapping[str, Any], content: object, at: str, problems: list[str]) -> object:
    """Read a mapping as a dataclass; None, and what is wrong in `problems`, where it is not one."""
    before = len(problems)
    if not isinstance(content, dict):
        problems.append(f"{at or 'file'}: {content!r} must be a mapping with {', '.join(checks)}")
        return None
    problems += [_unknown(key, at, checks) for key in content if key not in checks]
    for each in fields(kind):
        required = each.default is MISSING and each.default_factory is MISSING
        if required and each.name not in content:
            problems.append(f"{_join(at, each.name)} is missing")
    given = {
        key: _value(checks[key], value, _join(at, key), problems)
        for key, value in content.items()
        if key in checks
    }
    return kind(**given) if len(problems) == before else None


def _value(check: Any, value: object, at: str, problems: list[str]) -> object:
    """Read what a key has: a record, a list of records, or what its check lets through."""
    if isinstance(check, tuple):
        kind, checks = check
        return _record(kind, checks, value, at, problems)
    if isinstance(check, list):
        if not isinstance(value, list):
            problems.append(f"{at}: {value!r} must be a list")
            return None
        return tuple(_value(check[0], each, f"{at}[{i}]", problems) for i, each in enumerate(value))
    try:
        return check(value)
    except ValueError as error:
        problems.append(f"{at}: {value!r} {error}")
        return None


def _join(at: str, key: object) -> str:
    return f"{at}.{key}" if at else f"{key}"


def _unknown(key: object, at: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(key), known, n=1)
    cure = f"did you mean {near[0]}?" if near else f"choose from {', '.join(known)}"
    return f"{_join(at, key)}: unknown key; {cure}"


def _matching(pattern: str, what: str) -> Check:
    def check(value: object) -> str:
        if not isinstance(value, str) or not re.fullmatch(pattern, value):
            raise ValueError(f"must be {what}")
        return value

    return check


def _one_of(*choices: str) -> Check:
    def check(value: object) -> str:
        if value not in choices:
            near = difflib.get_close_matches(str(value), choices, n=1)
            raise ValueError(f"must be {' or '.join(choices)}{f'; did you mean {near[0]}?' if near else ''}")
        return str(value)

    return check


def _number(least: float, most: float, unit: str, kind: type[int] | type[float] = float) -> Check:
    def check(value: Any) -> float:
        of_kind = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
        if not of_kind or not least <= value <= most:
            raise ValueError(
                f"must be a{' whole' if kind is int else ''} number of {unit} from {least} to {most}"
            )
        return kind(value)

    return check


def _cidr(value: Any) -> str:
    if value == "auto":
        return "auto"
    try:
        network = ipaddress.IPv4Network(value if isinstance(value, str) else "")
    except ValueError:
        raise ValueError("must be auto, or addresses such as 203.0.113.7/32") from None
    if network.prefixlen < 8:
        raise ValueError("lets (nearly) everyone in; name your own address, such as 203.0.113.7/32")
    return str(network)


def _zones(value: object) -> Literal["auto"] | tuple[str, ...]:
    if value == "auto":
        return "auto"
    if not isinstance(value, list) or not value or not all(isinstance(zone, str) for zone in value):
        raise ValueError("must be auto, or a list of zones such as [us-west-2a, us-west-2b]")
    return tuple(value)


def _resources(value: object) -> dict[str, float] | None:
    if value is None:
        return None
    if not isinstance(value, dict) or not value:
        raise ValueError("must be a mapping such as {CPU: 8, GPU: 1}")
    amount = _number(0, 10**15, "units", int)  # as Ray's schema has it
    for name, each in value.items():
        try:
            amount(each)
        except ValueError as error:
            raise ValueError(f"has {name} = {each!r}, which {error}") from None
        if not isinstance(name, str):
            raise ValueError(f"has the name {name!r}, which must be a word such as CPU")
    return dict(value)


def _image(value: object) -> str:
    return "" if value is None else str(_matching(r"[\w.:/@-]+", "null, or the name of an image")(value))


_NAME = _matching(
    r"[a-z]([a-z0-9-]{0,28}[a-z0-9])?", "1 to 30 lowercase letters, digits and dashes, a letter first"
)
_TYPE = _matching(r"[a-z0-9]+([.-][a-z0-9-]+)+", "a machine type, such as g6.2xlarge or g2-standard-8")
_COUNT = _number(0, MAX_NODES, "nodes", int)
_WORKERS: dict[str, Any] = {
    "name": _NAME,
    "type": _TYPE,
    "market": _one_of(*MARKETS),
    "min": _COUNT,
    "max": _number(1, MAX_NODES, "nodes", int),
    "priority": _number(-1000, 1000, "points", int),
    "resources": _resources,
}
_BUCKET = _matching(r"auto|[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", "auto, or the name of a bucket")
_STACK: dict[str, Any] = {
    "stack": _NAME,
    "cloud": _one_of(*CLOUDS),
    "project": _matching(r"[a-z][a-z0-9-]{4,28}[a-z0-9]", "the id of a Google Cloud project"),
    "region": _matching(r"[a-z]+(-[a-z]+)+-?\d+", "a region, such as us-west-2 or us-central1"),
    "zones": _zones,
    "owner": _matching(r"[\w.@+-]{1,63}", "a name or address without spaces, at most 63 characters"),
    "ttl_hours": _number(0.5, MAX_TTL_HOURS, "hours"),
    "access": (Access, {"mode": _one_of("ssh", "ssm"), "cidr": _cidr}),
    "image": _image,
    "head": (Head, {"type": _TYPE}),
    "workers": [(Workers, _WORKERS)],
    "storage": (Storage, {"bucket": _BUCKET}),
    "budget": (Budget, {"max_hourly_usd": _number(0.01, 1e6, "dollars")}),
}
_NEEDED = ("region", "owner", "head", "workers")


def _contradictions(stack: Stack) -> list[str]:
    """Say what of a stack does not go together, though each value by itself would."""
    if stack.cloud == "local":
        return []
    # On Google Cloud, a head without workers is all there is: one machine.
    needed = [*_NEEDED[:-1], "project"] if stack.cloud == "gcp" else list(_NEEDED)
    nothing = ("", (), Head(type=""))
    problems = [
        f"{key} is missing, which cloud: {stack.cloud} needs"
        for key in needed
        if getattr(stack, key) in nothing
    ]
    problems += [*_workers_contradict(stack.workers)]
    if stack.cloud == "gcp" and len(stack.stack) > 19:
        problems.append(
            f"stack: {stack.stack!r} must have 19 characters at most, for accounts are named after it"
        )
    if stack.cloud == "gcp" and stack.access.mode == "ssm":
        problems.append(
            "access.mode: 'ssm' is AWS's; on Google Cloud write ssh, which goes through its proxy"
        )
    if stack.cloud == "aws" and stack.project:
        problems.append(f"project: {stack.project!r} means nothing on AWS; leave it out")
    sign = "." if stack.cloud == "aws" else "-"
    for at, kind in [
        ("head", stack.head.type),
        *((f"workers.{each.name}", each.type) for each in stack.workers),
    ]:
        if kind and sign not in kind:
            problems.append(f"{at}.type: {kind!r} is no machine type of cloud: {stack.cloud}")
    for zone in () if stack.zones == "auto" else stack.zones:
        if not zone.startswith(stack.region):
            problems.append(f"zones: {zone!r} is not in region {stack.region}")
    return problems


def _workers_contradict(workers: tuple[Workers, ...]) -> Iterable[str]:
    names = [each.name for each in workers]
    for name in sorted(set(names)):
        if names.count(name) > 1:
            yield f"workers: {name!r} is the name of {names.count(name)} kinds; give each its own"
    for each in workers:
        if each.min > each.max:
            yield f"workers.{each.name}.min: {each.min} is more than its max of {each.max}"
        if each.name == "head":
            yield "workers: 'head' is the name of the head; choose another"
