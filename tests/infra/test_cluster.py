"""The cluster file: a test for each trap of Ray's defaults, Ray's and EC2's own word on it, and what fits."""

import copy
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import googleapiclient  # type: ignore[import-untyped]
import pytest
import yaml

from infra import cluster as clusters
from infra.cluster import fit, render, validate
from infra.folder import Folder, dump
from infra.local import PROJECT
from infra.placeholders import facts
from infra.plan import Job
from infra.stack import Stack, load
from jobs.cluster import node_types

FOLDER = Folder(Path("/home/you/.gdl_ray/stacks/demo"))
STACKS = {"aws": "infra/stack.example.yaml", "gcp": "infra/examples/gcp.stack.yaml"}


def stack_of(cloud: str) -> Stack:
    return load(PROJECT / STACKS[cloud])


@pytest.fixture(params=STACKS)
def cluster(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The example stack of a cloud, rendered."""
    stack = stack_of(request.param)
    return render(stack, facts(stack, FOLDER))


@pytest.fixture
def aws() -> dict[str, Any]:
    stack = stack_of("aws")
    return render(stack, facts(stack, FOLDER))


@pytest.fixture
def gcp() -> dict[str, Any]:
    stack = stack_of("gcp")
    return render(stack, facts(stack, FOLDER))


def configs(cluster: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: kind["node_config"] for name, kind in cluster["available_node_types"].items()}


@pytest.mark.parametrize("cloud", STACKS)
def test_the_examples_are_what_is_rendered(cloud: str) -> None:
    stack = stack_of(cloud)
    text = dump(render(stack, facts(stack, FOLDER))).replace(str(PROJECT), "/home/you/gdl_ray")
    example = PROJECT / "infra" / "examples" / f"{cloud}.yaml"
    assert text == example.read_text(), f"write to {example} what is rendered now, and read what has changed"


def test_it_is_an_ordinary_file(cluster: dict[str, Any]) -> None:
    assert yaml.safe_load(dump(cluster)) == cluster
    assert not re.search(r"[&*]id\d", dump(cluster))
    assert validate(cluster) == []


# The traps, by the name of what goes wrong with Ray's defaults.


def test_workers_without_a_profile_could_not_write_checkpoints(
    aws: dict[str, Any], gcp: dict[str, Any]
) -> None:
    arns = {name: config["IamInstanceProfile"]["Arn"] for name, config in configs(aws).items()}
    assert len(arns) == 3
    assert arns["l4"] == arns["l4-spot"] != arns["head"]
    accounts = {name: config["serviceAccounts"][0]["email"] for name, config in configs(gcp).items()}
    assert accounts["l4"] == accounts["l4-spot"] != accounts["head"]


def test_an_image_of_2018_is_not_taken(aws: dict[str, Any]) -> None:
    from ray.autoscaler._private.aws.config import DEFAULT_AMI

    images = {config["ImageId"] for config in configs(aws).values()}
    assert len(images) == 1
    assert not images & set(DEFAULT_AMI.values())


def test_port_22_is_not_opened_to_the_world(aws: dict[str, Any], gcp: dict[str, Any]) -> None:
    """Ray makes a group of its own for nodes that name none, and uses the default network of Google Cloud."""
    assert all(config["SecurityGroupIds"] == ["sg-GROUP"] for config in configs(aws).values())
    subnets = {config["networkInterfaces"][0]["subnetwork"] for config in configs(gcp).values()}
    assert subnets == {"projects/my-project/regions/us-central1/subnetworks/gdl-ray-demo"}


def test_nodes_are_ended_not_stopped(aws: dict[str, Any]) -> None:
    assert aws["provider"]["cache_stopped_nodes"] is False
    for config in configs(aws).values():
        assert config["InstanceInitiatedShutdownBehavior"] == "terminate"
        disks = [mapping["Ebs"] for mapping in config["BlockDeviceMappings"]]
        assert all(disk["DeleteOnTermination"] and disk["Encrypted"] for disk in disks)
        assert [disk["VolumeType"] for disk in disks] == ["gp3"]


def test_no_other_ray_is_installed(cluster: dict[str, Any]) -> None:
    """A list that is left out is filled with one that installs a nightly wheel of Ray for another Python."""
    from ray.autoscaler._private.util import prepare_config

    filled = prepare_config(copy.deepcopy(cluster))
    lists = ("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands")
    commands = [line for name in lists for line in filled[name]]
    assert not [line for line in commands if "ray-wheels" in line or "anaconda" in line]
    assert "install.sh head" in cluster["head_setup_commands"][0]
    assert "install.sh worker" in cluster["worker_setup_commands"][0]


def test_each_service_asks_for_the_token(cluster: dict[str, Any]) -> None:
    starts = [*cluster["head_start_ray_commands"], *cluster["worker_start_ray_commands"]]
    assert len(starts) == 4
    assert all(line.startswith("RAY_AUTH_MODE=token ") for line in starts)
    assert cluster["file_mounts"]["/home/ubuntu/.ray"] == str(FOLDER.token.parent)
    assert FOLDER.token.name == "auth_token"
    assert "chmod -R go-rwx" in cluster["setup_commands"][0]


def test_the_dashboard_and_the_endpoints_stay_on_loopback(cluster: dict[str, Any]) -> None:
    ray, mlflow, serve = cluster["head_start_ray_commands"]
    assert "--dashboard-host=127.0.0.1" in ray
    assert "--host=127.0.0.1" in serve
    assert "--app-name=basic-auth" in mlflow  # workers load models from it: it asks for a password


def test_workers_of_jobs_stay_off_the_head(cluster: dict[str, Any]) -> None:
    head = cluster["available_node_types"][cluster["head_node_type"]]
    assert head["resources"] == {"CPU": 0, "GPU": 0}
    assert head["max_workers"] == 0


def test_resources_are_written_out(cluster: dict[str, Any]) -> None:
    kinds = cluster["available_node_types"]
    assert kinds["l4"]["resources"] == {"CPU": 8, "GPU": 1, "accelerator_type:L4": 1}
    assert kinds["l4"]["labels"] == {"ray.io/accelerator-type": "L4"}


def test_spot_comes_first_and_on_demand_stands_in(cluster: dict[str, Any]) -> None:
    kinds = cluster["available_node_types"]
    assert kinds["l4-spot"]["priority"] > kinds["l4"]["priority"]
    assert kinds["l4-spot"]["resources"] == kinds["l4"]["resources"]
    assert [kinds[name]["max_workers"] for name in ("l4-spot", "l4")] == [4, 2]
    assert cluster["max_workers"] == 6


def test_spot_is_asked_for_spot_workers_alone(aws: dict[str, Any], gcp: dict[str, Any]) -> None:
    assert [name for name, config in configs(aws).items() if "InstanceMarketOptions" in config] == ["l4-spot"]
    models = {name: config["scheduling"]["provisioningModel"] for name, config in configs(gcp).items()}
    assert models == {"head": "STANDARD", "l4-spot": "SPOT", "l4": "STANDARD"}


def test_disks_are_tagged_like_their_machines(aws: dict[str, Any]) -> None:
    for config in configs(aws).values():
        tags = {each["ResourceType"]: each["Tags"] for each in config["TagSpecifications"]}
        assert tags["instance"] == tags["volume"]
        named = {tag["Key"]: tag["Value"] for tag in tags["volume"]}
        assert named == {
            "gdl-ray:stack": "demo",
            "gdl-ray:owner": "you@example.com",
            "gdl-ray:expires-at": "2030-01-01T00:00:00Z",
        }


def test_credentials_of_a_node_are_not_given_to_whoever_asks(aws: dict[str, Any]) -> None:
    for config in configs(aws).values():
        assert config["MetadataOptions"]["HttpTokens"] == "required"
        assert config["MetadataOptions"]["HttpPutResponseHopLimit"] == 2  # containers that have a bridge


def test_every_node_ends_itself(aws: dict[str, Any], gcp: dict[str, Any]) -> None:
    for name, config in configs(aws).items():
        assert "EXPIRES_AT='2030-01-01T00:00:00Z'" in config["UserData"]
        assert f"ROLE='{'head' if name == 'head' else 'worker'}'" in config["UserData"]
        assert len(config["UserData"]) < 16_000  # what EC2 takes
    for config in configs(gcp).values():
        assert config["scheduling"]["terminationTime"] == "2030-01-01T00:00:00Z"
        assert "maxRunDuration" not in config["scheduling"]  # Google takes one of the two
        assert config["scheduling"]["instanceTerminationAction"] == "DELETE"


def test_a_second_ray_up_finds_the_head_as_it_was() -> None:
    """Ray replaces a head whose description has changed: it must not depend on time or chance."""
    stack = stack_of("aws")
    first, again = (json.dumps(render(stack, facts(stack, FOLDER))) for _ in range(2))
    assert first == again


def test_session_manager_opens_no_port() -> None:
    stack = stack_of("aws")
    stack = replace(stack, access=replace(stack.access, mode="ssm"))
    cluster = render(stack, facts(stack, FOLDER))
    assert cluster["auth"]["ssh_proxy_use_node_id"] is True
    assert "aws ssm start-session --target %h" in cluster["auth"]["ssh_proxy_command"]
    assert cluster["provider"]["use_internal_ips"] is True
    assert validate(cluster) == []


def test_google_is_reached_through_its_proxy(gcp: dict[str, Any]) -> None:
    assert gcp["auth"]["ssh_proxy_use_node_id"] is True
    assert "start-iap-tunnel %h" in gcp["auth"]["ssh_proxy_command"]
    keys = {item["key"]: item["value"] for item in configs(gcp)["head"]["metadata"]["items"]}
    assert keys["ssh-keys"] == "ubuntu:ssh-ed25519 KEY"


def test_scheduling_of_google_is_an_object(gcp: dict[str, Any]) -> None:
    """Ray's own example has a list, which Google's schema refuses."""
    assert all(isinstance(config["scheduling"], dict) for config in configs(gcp).values())


def strange(value: Any, schema: dict[str, Any], schemas: dict[str, Any], at: str = "") -> list[str]:
    """List what a value has that Google's description of its interface does not."""
    schema = schemas[schema["$ref"]] if "$ref" in schema else schema
    if "properties" in schema and isinstance(value, dict):
        known = schema["properties"]
        wrong = [f"{at}.{key}" for key in value if key not in known]
        pairs = [(known[key], each, f"{at}.{key}") for key, each in value.items() if key in known]
    elif schema.get("type") == "array" and isinstance(value, list):
        wrong, pairs = [], [(schema["items"], each, f"{at}[{i}]") for i, each in enumerate(value)]
    elif "additionalProperties" in schema and isinstance(value, dict):
        wrong, pairs = (
            [],
            [(schema["additionalProperties"], each, f"{at}.{key}") for key, each in value.items()],
        )
    else:
        kinds: dict[str, Any] = {"string": str, "integer": int, "boolean": bool, "number": (int, float)}
        fits = isinstance(value, kinds.get(schema.get("type", ""), ())) and value in schema.get(
            "enum", [value]
        )
        return [] if fits else [f"{at} = {value!r}"]
    return wrong + [line for sub, each, name in pairs for line in strange(each, sub, schemas, name)]


def test_google_knows_each_field(gcp: dict[str, Any]) -> None:
    document = Path(googleapiclient.__file__).parent / "discovery_cache" / "documents" / "compute.v1.json"
    schemas = json.loads(document.read_text())["schemas"]
    for config in configs(gcp).values():
        assert strange(config, schemas["Instance"], schemas) == []
    wrong = configs(gcp)["l4"] | {"machinType": "x"}
    wrong["scheduling"] = [{"preemptible": True}]
    wrong["disks"] = [{"boot": "yes", "initializeParams": {"diskSizeGb": 150}}]
    assert strange(wrong, schemas["Instance"], schemas) == [
        ".machinType",
        ".disks[0].boot = 'yes'",
        ".disks[0].initializeParams.diskSizeGb = 150",
        ".scheduling = [{'preemptible': True}]",
    ]


def test_a_gpu_is_attached_where_the_machine_brings_none(gcp: dict[str, Any]) -> None:
    assert not [config for config in configs(gcp).values() if "guestAccelerators" in config]
    stack = stack_of("gcp")
    old = replace(stack.workers[0], type="n1-standard-8", resources={"CPU": 8, "GPU": 1})
    stack = replace(stack, workers=(old,))
    config = configs(render(stack, facts(stack, FOLDER)))["l4-spot"]
    assert config["guestAccelerators"] == [{"acceleratorType": "nvidia-tesla-t4", "acceleratorCount": 1}]


def test_nothing_secret_is_in_the_file(cluster: dict[str, Any], tmp_path: Path) -> None:
    folder = Folder(tmp_path / "demo")
    folder.make()
    values = [line.partition("=")[2] for line in folder.secrets.read_text().splitlines()]
    stack = stack_of(cluster["provider"]["type"])
    text = dump(render(stack, facts(stack, folder)))
    assert not [value for value in [*values, folder.token.read_text()] if len(value) > 8 and value in text]


def test_an_image_is_what_all_services_run_in() -> None:
    stack = replace(stack_of("aws"), image="ghcr.io/you/gdl_ray:1")
    cluster = render(stack, facts(stack, FOLDER))
    names = ("head_setup_commands", "head_start_ray_commands", "worker_start_ray_commands")
    assert all("GDL_RAY_IMAGE=ghcr.io/you/gdl_ray:1 " in line for name in names for line in cluster[name])


WRONG: list[tuple[str, Any, str]] = [
    (
        "provider.cache_stoped_nodes",
        True,
        "provider.cache_stoped_nodes: unknown key; did you mean cache_stopped",
    ),
    ("max_worker", 3, "'max_worker' was unexpected"),
    ("provider", "aws", "provider: 'aws' must be a mapping"),
    ("available_node_types", [{"l4": {}}], "available_node_types: [{'l4': {}}] must be a mapping"),
    ("available_node_types.l4", {"max_workers": 1}, "available_node_types.l4.node_config: None must be"),
    ("available_node_types.l4", 1, "available_node_types.l4.node_config: None must be a mapping"),
    ("auth", ["ubuntu"], "auth: "),
    ("head_node_type", "none", "must be one of `available_node_types`"),
    ("available_node_types.l4.priorty", 3, "'priorty' was unexpected"),
    ("available_node_types.l4.min_workers", 99, "smaller than the sum of `min_workers`"),
    (
        "available_node_types.l4.node_config.InstanceTyp",
        "g6",
        'l4.node_config: Unknown parameter in input: "Ins',
    ),
    (
        "available_node_types.l4.node_config.MetadataOptions.HttpToken",
        "required",
        'MetadataOptions: "HttpToken"',
    ),
    ("available_node_types.l4.node_config.BlockDeviceMappings.0.Ebs.VolumeSize", "150", "Invalid type for"),
    ("setup_commands", None, "setup_commands is missing: Ray would install another Ray"),
    ("provider.type", "amazon", "provider.type: 'amazon' must be aws or gcp"),
]


@pytest.mark.parametrize(("path", "value", "message"), WRONG)
def test_a_typo_is_found(path: str, value: Any, message: str, aws: dict[str, Any]) -> None:
    *parents, last = path.split(".")
    place: Any = aws
    for step in parents:
        place = place[int(step) if step.isdigit() else step]
    if value is None:
        del place[last]
    else:
        place[last] = value
    problems = [line.replace("is smaller than the sum", "smaller than the sum") for line in validate(aws)]
    assert any(message in line for line in problems), problems


# What fits, worked out by hand: four spot nodes and two others, each with 8 CPUs and a GPU.
FITS: list[tuple[str, dict[str, int] | None]] = [
    ("workers=1", {"l4-spot": 1}),
    ("workers=4,gpu=1,cpu=3", {"l4-spot": 4}),
    ("workers=8,cpu=4", {"l4-spot": 4}),
    ("workers=6,gpu=1,cpu=8", {"l4-spot": 4, "l4": 2}),
    ("workers=5,cpu=5", {"l4-spot": 4, "l4": 1}),
    ("workers=7,gpu=1", None),
    ("workers=1,cpu=9", None),
    ("workers=1,gpu=2", None),
    ("workers=48", {"l4-spot": 4, "l4": 2}),
    ("workers=49", None),
]


@pytest.mark.parametrize(("job", "launches"), FITS)
@pytest.mark.parametrize("scheduler", ["of Ray", "of old"])
def test_what_fits_is_launched_and_nothing_else(
    job: str,
    launches: dict[str, int] | None,
    scheduler: str,
    cluster: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if scheduler == "of old":
        monkeypatch.setattr(clusters, "_schedule", _no_such_ray)
    answer = fit(cluster, Job.parse(job).bundles)
    assert answer.launches == (launches or {})
    assert bool(answer.reason) == (launches is None)


def _no_such_ray(*_: object) -> None:
    raise ImportError("ray.autoscaler.v2.scheduler")


def test_what_never_fits_says_why_and_what_to_do(aws: dict[str, Any]) -> None:
    assert str(fit(aws, Job.parse("workers=2,cpu=9").bundles)) == (
        "NEVER FITS: no node has 9 CPU for a worker (l4-spot has 8 CPU, 1 GPU; l4 has 8 CPU, 1 GPU): "
        "ask for less, or choose a larger machine type"
    )
    assert str(fit(aws, Job.parse("workers=7,gpu=1").bundles)) == (
        "NEVER FITS: all nodes together hold 6 of 7 workers with 1 CPU and 1 GPU: raise max, or ask for fewer"
    )
    assert str(fit(aws, Job.parse("workers=5,gpu=1").bundles)) == "fits: launches 4 x l4-spot, 1 x l4"


def test_jobs_are_told_of_the_nodes_that_may_come(
    cluster: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "cluster"
    file.write_text(json.dumps(cluster))
    monkeypatch.setenv("GDL_RAY_CLUSTER_FILE", str(file))
    has = {"CPU": 8, "GPU": 1, "accelerator_type:L4": 1}
    assert node_types() == {
        "l4-spot": {"resources": has, "max": 4},
        "l4": {"resources": has, "max": 2},
    }
