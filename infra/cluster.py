"""Ray's cluster file: render it from a stack, check it, and ask Ray's own scheduler what would fit on it.

It is an ordinary file, for `ray up`, `ray down` and `ray exec` by hand too. What Ray would fill in by itself,
and wrongly, is written out. All that reaches into Ray's private modules is in this file.
"""

import copy
import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from infra.local import PROJECT
from infra.node import CONFIG, DASHBOARD_PORT, GCS_PORT, HERE, HOME, MLFLOW_PORT, SERVE_PORT, USER
from infra.nodes import HEAD, Facts, describe, resources
from infra.stack import Stack, Workers

IDLE_MINUTES = 10

Cluster = dict[str, Any]


def render(stack: Stack, facts: Facts) -> Cluster:
    """Render the cluster file of a stack; the same from the same."""
    types = {HEAD: _head_type(stack, facts)}
    types |= {each.name: _worker_type(stack, facts, each) for each in stack.workers}
    return {
        "cluster_name": f"gdl-ray-{stack.stack}",  # an account may have other clusters of that name
        "max_workers": sum(each.max for each in stack.workers),
        "idle_timeout_minutes": IDLE_MINUTES,
        "provider": _provider(stack, facts),
        "auth": _auth(stack, facts),
        "head_node_type": HEAD,
        "available_node_types": types,
        "file_mounts": _file_mounts(facts),
        # Written out, all of them: where one is missing, Ray's defaults install a development version of Ray.
        "initialization_commands": [],
        "setup_commands": ["chmod -R go-rwx ~/gdl_ray ~/.ray"],
        "head_setup_commands": [_install(stack, facts, "head")],
        "worker_setup_commands": [_install(stack, facts, "worker")],
        "head_start_ray_commands": _head_services(stack, facts),
        "worker_start_ray_commands": _worker_services(stack, facts),
        "metadata": {
            "gdl_ray": {
                "stack": stack.stack,
                "owner": stack.owner,
                "bucket": facts.bucket,
                "expires_at": facts.expires_at,
            }
        },
    }


def _provider(stack: Stack, facts: Facts) -> Cluster:
    if stack.cloud == "gcp":
        zone = facts.zones[HEAD][0]
        return {"type": "gcp", "region": stack.region, "availability_zone": zone, "project_id": stack.project}
    return {
        "type": "aws",
        "region": stack.region,
        # Ray would stop nodes instead of ending them, and their disks would go on costing money.
        "cache_stopped_nodes": False,
        "use_internal_ips": stack.access.mode == "ssm",
    }


def _auth(stack: Stack, facts: Facts) -> Cluster:
    """Say how to log in: with the stack's key; through the cloud's own proxy where no port is open."""
    auth: Cluster = {"ssh_user": USER, "ssh_private_key": str(facts.folder.key)}
    if stack.cloud == "gcp":
        place = f"--zone={facts.zones[HEAD][0]} --project={stack.project}"
        proxy = f"gcloud compute start-iap-tunnel %h %p --listen-on-stdin --verbosity=warning {place}"
    elif stack.access.mode == "ssm":
        document = "--document-name AWS-StartSSHSession --parameters portNumber=%p"
        proxy = f"aws ssm start-session --target %h {document} --region {stack.region}"
    else:
        return auth
    return auth | {"ssh_proxy_command": proxy, "ssh_proxy_use_node_id": True}


def _head_type(stack: Stack, facts: Facts) -> Cluster:
    """Describe the head: no worker of a job runs there; what drives jobs and endpoints asks for no CPU."""
    config = describe(stack, facts, HEAD, stack.head.type, spot=False)
    return {"node_config": config, "resources": {"CPU": 0, "GPU": 0}, "max_workers": 0}


def _worker_type(stack: Stack, facts: Facts, workers: Workers) -> Cluster:
    machine = facts.machines[workers.type]
    spot = workers.market == "spot"
    return {
        "node_config": describe(stack, facts, workers.name, workers.type, spot),
        "resources": dict(workers.resources or resources(machine)),
        "labels": {"ray.io/accelerator-type": machine.accelerator} if machine.accelerator else {},
        "min_workers": workers.min,
        "max_workers": workers.max,
        "priority": workers.priority,
    }


def _file_mounts(facts: Facts) -> dict[str, str]:
    """Say what nodes are sent: the code as it is on this machine, no key of any cloud."""
    return {
        f"{HOME}/.ray": str(facts.folder.token.parent),
        f"{HERE}/private": str(facts.folder.secrets.parent),
        f"{HERE}/code": str(facts.folder.code),
        f"{HERE}/scripts": str(PROJECT / "infra" / "scripts"),
    }


def _install(stack: Stack, facts: Facts, role: str) -> str:
    extras = "platform,gcp" if stack.cloud == "gcp" else "platform"
    return f"{_image(stack)}bash ~/gdl_ray/scripts/install.sh {role} {extras} {facts.code}"


def _image(stack: Stack) -> str:
    return f"GDL_RAY_IMAGE={stack.image} " if stack.image else ""


def _service(stack: Stack, facts: Facts, name: str, command: Sequence[str]) -> str:
    """Make a service of a command; Ray's token is asked of everyone who talks to it."""
    settings = f"RAY_AUTH_MODE=token GDL_RAY_BUCKET={facts.bucket} "
    return f"{settings}{_image(stack)}bash ~/gdl_ray/scripts/service.sh {name} {' '.join(command)}"


def _head_services(stack: Stack, facts: Facts) -> list[str]:
    ray = ["ray", "start", "--head", "--block", f"--port={GCS_PORT}", "--dashboard-host=127.0.0.1"]
    ray += [f"--dashboard-port={DASHBOARD_PORT}", f"--autoscaling-config={CONFIG}"]
    # Workers load models from MLflow, so that it listens for them too. It asks for a password, and the
    # firewall lets nobody in but nodes of the stack.
    mlflow = [
        "mlflow",
        "server",
        "--app-name=basic-auth",
        "--host=0.0.0.0",
        f"--port={MLFLOW_PORT}",
        "--workers=1",
    ]
    mlflow += [f"--backend-store-uri=sqlite:///{HOME}/.gdl_ray/mlflow.db"]
    mlflow += [f"--artifacts-destination={facts.bucket}/mlflow"]
    serve = ["python", "-m", "serve", "--host=127.0.0.1", f"--http-port={SERVE_PORT}"]
    services = {"head": ray, "mlflow": mlflow, "serve": serve}
    return [_service(stack, facts, name, command) for name, command in services.items()]


def _worker_services(stack: Stack, facts: Facts) -> list[str]:
    ray = ["ray", "start", "--block", f"--address=$RAY_HEAD_IP:{GCS_PORT}"]
    return [_service(stack, facts, "worker", ray)]


# Keys of `provider` that mean something. Ray takes any, so that a typo would go unnoticed.
PROVIDER_KEYS = {
    "aws": {
        "type",
        "region",
        "availability_zone",
        "cache_stopped_nodes",
        "use_internal_ips",
        "security_group",
        "key_pair",
        "aws_credentials",
        "cloudwatch",
        "disable_launch_config_check",
        "disable_node_updaters",
    },
    "gcp": {
        "type",
        "region",
        "availability_zone",
        "project_id",
        "cache_stopped_nodes",
        "use_internal_ips",
        "gcp_credentials",
        "disable_launch_config_check",
        "disable_node_updaters",
    },
}
# Lists of commands that Ray would fill in, and how wrong.
COMMANDS = (
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
)


def validate(cluster: Cluster) -> list[str]:
    """Check a cluster file, by Ray's schema and the cloud's own, and for what neither would notice.

    Returns:
        What is wrong, a line for each.
    """
    if misshapen := [*_misshapen(cluster)]:
        return misshapen
    provider = cluster.get("provider") or {}
    kind = provider.get("type")
    if kind not in ("aws", "gcp"):
        return [f"provider.type: {kind!r} must be aws or gcp"]
    problems = [
        _unknown(key, f"provider.{key}", PROVIDER_KEYS[kind])
        for key in provider
        if key not in PROVIDER_KEYS[kind]
    ]
    problems += [
        f"{name} is missing: Ray would install another Ray" for name in COMMANDS if name not in cluster
    ]
    problems += _ray_says(cluster)
    if kind == "aws":
        for name, each in (cluster.get("available_node_types") or {}).items():
            problems += [f"available_node_types.{name}.node_config: {line}" for line in _ec2_says(each)]
    return problems


def _misshapen(cluster: Cluster) -> Iterator[str]:
    """Say what is no mapping and should be one; Ray and EC2's model read on as if it were."""
    for name in ("provider", "available_node_types"):
        if not isinstance(cluster.get(name) or {}, dict):
            yield f"{name}: {cluster[name]!r} must be a mapping"
            return
    for name, kind in (cluster.get("available_node_types") or {}).items():
        config = kind.get("node_config") if isinstance(kind, dict) else None
        if not isinstance(config, dict):
            yield f"available_node_types.{name}.node_config: {config!r} must be a mapping"


def _unknown(key: str, at: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1)
    cure = f"did you mean {near[0]}?" if near else f"choose from {', '.join(sorted(known))}"
    return f"{at}: unknown key; {cure}"


def _ray_says(cluster: Cluster) -> list[str]:
    from jsonschema import ValidationError  # type: ignore[import-untyped]
    from ray.autoscaler._private.util import prepare_config, validate_config

    try:
        validate_config(prepare_config(copy.deepcopy(cluster)))
    except ValidationError as error:
        place = ".".join(str(step) for step in error.absolute_path)
        return [f"{place or 'file'}: {error.message}"]
    except (ValueError, AssertionError, KeyError) as error:
        return [str(error)]
    except (AttributeError, TypeError) as error:  # it reads what has another shape than it thinks
        return [f"file: Ray cannot read it ({error})"]
    return []


def _ec2_says(kind: Cluster) -> list[str]:
    """Check a node's description by the model of RunInstances; Ray chooses one of several subnets."""
    from botocore.validate import ParamValidator  # type: ignore[import-untyped]

    asked = {key: value for key, value in kind["node_config"].items() if key != "SubnetIds"}
    asked |= {"SubnetId": "subnet-0", "MinCount": 1, "MaxCount": 1}
    report = ParamValidator().validate(asked, _run_instances())
    return str(report.generate_report()).splitlines()


@cache
def _run_instances() -> Any:
    """Read what RunInstances takes, from 700 kB of JSON that come with botocore."""
    import botocore.session  # type: ignore[import-untyped]

    return botocore.session.Session().get_service_model("ec2").operation_model("RunInstances").input_shape


@dataclass(frozen=True)
class Fit:
    """Which nodes a job would get on an empty cluster."""

    launches: Mapping[str, int]
    """How many of each kind of workers would be launched; empty where it never fits."""
    reason: str = ""
    """Why it never fits; empty where it does."""

    def __str__(self) -> str:
        if self.reason:
            return f"NEVER FITS: {self.reason}"
        nodes = ", ".join(f"{count} x {name}" for name, count in self.launches.items())
        return f"fits: launches {nodes or 'nothing'}"


def fit(cluster: Cluster, bundles: Sequence[Mapping[str, float]]) -> Fit:
    """Ask Ray's scheduler which nodes it would launch for bundles that are all needed at once.

    Where this version of Ray has another scheduler, count how many find room on each kind of nodes.
    """
    try:
        launches = _schedule(cluster, bundles)
    except (ImportError, AttributeError, TypeError):
        launches = _count(cluster, bundles)
    return Fit({}, _reason(cluster, bundles)) if launches is None else Fit(launches)


def _schedule(cluster: Cluster, bundles: Sequence[Mapping[str, float]]) -> dict[str, int] | None:
    """Tell what Ray's autoscaler would launch; None where it never would."""
    from ray.autoscaler.v2.instance_manager.config import NodeTypeConfig
    from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
    from ray.autoscaler.v2.utils import ResourceRequestUtil
    from ray.core.generated.autoscaler_pb2 import GangResourceRequest  # type: ignore[attr-defined]  # generated

    types = {
        name: NodeTypeConfig(
            name=name,
            min_worker_nodes=0,
            max_worker_nodes=kind.get("max_workers", 0),
            priority=kind.get("priority", 0),
            resources=kind["resources"],
            labels=kind.get("labels", {}),
        )
        for name, kind in _workers(cluster).items()
    }
    gang = GangResourceRequest(requests=[ResourceRequestUtil.make(dict(each)) for each in bundles])
    scheduler: Any = ResourceDemandScheduler(None)  # None: nothing to log events to
    reply = scheduler.schedule(
        SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs=types,
            max_num_nodes=cluster["max_workers"],
            gang_resource_requests=[gang],
        )
    )
    if reply.infeasible_gang_resource_requests:
        return None
    return {each.instance_type: each.count for each in reply.to_launch}


def _workers(cluster: Cluster) -> dict[str, Cluster]:
    return {
        name: kind
        for name, kind in cluster["available_node_types"].items()
        if name != cluster["head_node_type"]
    }


def _count(cluster: Cluster, bundles: Sequence[Mapping[str, float]]) -> dict[str, int] | None:
    """Fill kinds of nodes, the highest priority first, with bundles that are all alike."""
    launches, left, room = {}, len(bundles), cluster["max_workers"]
    kinds = sorted(_workers(cluster).items(), key=lambda item: -item[1].get("priority", 0))
    for name, kind in kinds:
        each = _places(bundles[0], kind["resources"])
        nodes = min(-(-left // each), kind.get("max_workers", 0), room) if each else 0
        if nodes > 0:
            launches[name] = nodes
            left, room = left - nodes * each, room - nodes
    return None if left > 0 else launches


def _places(bundle: Mapping[str, float], has: Mapping[str, float]) -> int:
    """Count how many of a bundle find room on one node."""
    return min((int(has.get(name, 0) // amount) for name, amount in bundle.items() if amount), default=0)


def _reason(cluster: Cluster, bundles: Sequence[Mapping[str, float]]) -> str:
    """Say why bundles never fit: no node holds one, or all nodes together hold too few."""
    bundle = bundles[0]
    asked = " and ".join(f"{amount:g} {name}" for name, amount in bundle.items())
    held = {name: _places(bundle, kind["resources"]) for name, kind in _workers(cluster).items()}
    if not any(held.values()):
        kinds = "; ".join(
            f"{name} has {_words(kind['resources'])}" for name, kind in _workers(cluster).items()
        )
        return f"no node has {asked} for a worker ({kinds}): ask for less, or choose a larger machine type"
    most = sum(kind["max_workers"] * held[name] for name, kind in _workers(cluster).items())
    return (
        f"all nodes together hold {most} of {len(bundles)} workers with {asked}: raise max, or ask for fewer"
    )


def _words(has: Mapping[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in has.items() if ":" not in name)
