"""The manifests for Kubernetes: read by KubeRay's own schemas, Kubernetes's, Ray's and the jobs they start.

No cluster runs them here: checked is what can be wrong in the files, and that each such fault is found.
"""

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import click
import jsonschema  # type: ignore[import-untyped]
import kubernetes_validate  # type: ignore[import-untyped]
import mlflow.environment_variables
import pytest
import ray
import ray.scripts.scripts
import yaml
from mlflow.cli import cli as mlflow_cli
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
from ray.serve._private.build_app import build_app
from ray.serve._private.utils import import_attr  # type: ignore[attr-defined]
from ray.serve.schema import DeploymentSchema, ServeApplicationSchema, ServeDeploySchema

from infra import docker
from jobs import cluster, options
from tests.infra.manifests import (
    Document,
    cluster_of,
    containers,
    labels,
    may_reach,
    name_of,
    of_kind,
    pods,
    render,
    selects,
)

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "infra" / "k8s"
OVERLAYS = ("cpu/platform", "cpu/training", "gpu/platform", "gpu/training")
_PLACES = [folder / "shared" / "data" / "kuberay-1.7.0" for folder in ROOT.parents]
SCHEMAS = next((place for place in _PLACES if place.is_dir()), None)

Rule = Callable[[list[Document]], Iterator[str]]


@cache
def schema(kind: str) -> Any:
    assert SCHEMAS is not None
    read = json.loads((SCHEMAS / f"{kind}.schema.json").read_text())
    return jsonschema.validators.validator_for(read)(read)


def kuberay_takes_it(documents: list[Document]) -> Iterator[str]:
    """By the schemas of KubeRay's resources, which allow nothing that they do not know."""
    for document in of_kind(documents, "RayJob", "RayService"):
        if document["apiVersion"] != "ray.io/v1":
            yield f"{document['kind']} of {document['apiVersion']}"
        if SCHEMAS is not None:
            yield from (error.message for error in schema(document["kind"]).iter_errors(document))


def kubernetes_takes_it(documents: list[Document]) -> Iterator[str]:
    """By Kubernetes's schemas: the plain kinds, and the pods of the others."""
    plain = [each for each in documents if not each["apiVersion"].startswith("ray.io/")]
    for document in of_kind(documents, "RayJob", "RayService"):
        metadata = {"name": name_of(document)}
        template = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": metadata}
        plain += [{**template, "template": pod} for pod in pods(document)]
    for document in plain:
        try:
            kubernetes_validate.validate(document, "1.37", strict=True)
        except kubernetes_validate.ValidationError as error:
            yield f"{document['kind']} {document['metadata']['name']}: {error.message}"


def ray_starts(documents: list[Document]) -> Iterator[str]:
    """By the command that KubeRay makes of `rayStartParams`, and by what follows from the version of Ray."""
    for document in documents:
        spec = cluster_of(document)
        if not spec:
            continue
        if spec["rayVersion"] != ray.__version__:
            yield f"rayVersion {spec['rayVersion']}, and {ray.__version__} is tested"
        if spec.get("authOptions") != {"mode": "token"}:
            yield "Ray asks for no token"
        for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
            words = [f"--{name}={value}" for name, value in group["rayStartParams"].items()]
            try:
                ray.scripts.scripts.start.make_context("start", words)
            except click.ClickException as error:
                yield error.format_message()


def node_types(document: Document) -> dict[str, Any]:
    """What Ray's autoscaler reads of a cluster."""
    resource = {"metadata": document["metadata"], "spec": cluster_of(document)}
    types: dict[str, Any] = _derive_autoscaling_config_from_ray_cr(resource)["available_node_types"]
    return types


def the_job_fits(documents: list[Document]) -> Iterator[str]:
    """By the command line of jobs.train, and by what Ray's autoscaler reads of the cluster."""
    for document in of_kind(documents, "RayJob"):
        words = shlex.split(document["spec"]["entrypoint"])
        if words[:3] != ["python", "-m", "jobs.train"]:
            yield f"{words[:3]} is no job"
            continue
        try:
            asked = options.parse(words[3:])
            options._check_workers(asked)
            options._plan(asked)
            least_s = asked.timeout_s or 0
        except (options.UsageError, SystemExit) as error:
            yield f"{document['spec']['entrypoint']}: {error}"
            continue
        types = node_types(document)
        head = types.pop("headgroup")
        nodes = [each["resources"] for each in types.values() for _ in range(each["max_workers"])]
        most = asked.workers_range[1]
        if cluster.places(asked.resources, nodes) < most:
            yield f"{most} workers with {asked.resources} do not fit on {nodes}"
        if head["resources"]["CPU"]:
            yield "workers may be placed on the head"
        if not asked.name or not asked.storage.startswith("s3://"):
            yield "a job that is started again cannot go on"
        if least_s > document["spec"]["preRunningDeadlineSeconds"]:
            yield "the cluster is given up before the job gives up waiting"


def serve_takes_it(documents: list[Document]) -> Iterator[str]:
    """By Serve's schema, which lets unknown names pass, and by building what the file names."""
    for document in of_kind(documents, "RayService"):
        config = yaml.safe_load(document["spec"]["serveConfigV2"])
        deployments = [each for given in config["applications"] for each in given.get("deployments", [])]
        schemas: list[tuple[Any, list[Document]]] = [
            (ServeDeploySchema, [config]),
            (ServeApplicationSchema, config["applications"]),
            (DeploymentSchema, deployments),
        ]
        for model, parts in schemas:
            for name in {name for part in parts for name in part} - set(model.model_fields):
                yield f"Serve knows no {name}"
        try:
            ServeDeploySchema.model_validate(config)
            for application in config["applications"]:
                target = import_attr(application["import_path"])
                built = call_user_app_builder_with_args_if_necessary(target, application["args"])
                build_app(built, name=application["name"])
        except Exception as error:
            yield f"serveConfigV2: {error}"
            continue
        url = config["applications"][0]["args"]["url"]
        if url != f"http://{document['metadata']['name']}-serve-svc:{config['http_options']['port']}":
            yield f"the registry does not reach {url}"
        gpus = config["applications"][0]["args"].get("gpus", 0)
        most = int(config["applications"][0]["args"]["replicas"].split(":")[-1])
        there = sum(t["resources"].get("GPU", 0) * t["max_workers"] for t in node_types(document).values())
        if gpus * most > there:
            yield f"{most} replicas with {gpus} GPUs do not fit on {there}"


def names_lead_somewhere(documents: list[Document]) -> Iterator[str]:
    """Services find pods, mounts find volumes, and secrets and settings are those that there are."""
    accounts = {name_of(each) for each in of_kind(documents, "ServiceAccount")}
    for document in documents:
        claims = document.get("spec", {}).get("volumeClaimTemplates", [])
        for pod in pods(document):
            name = name_of(document)
            volumes = {*map(name_of, claims), *(volume["name"] for volume in pod["spec"].get("volumes", []))}
            account = pod["spec"].get("serviceAccountName")
            if account and accounts and account not in accounts:
                yield f"{name}: there is no account {account}"
            for container in pod["spec"]["containers"]:
                for mount in container.get("volumeMounts", []):
                    if mount["name"] not in volumes:
                        yield f"{name}: there is no volume {mount['name']}"
                for source in container.get("envFrom", []):
                    if source != {"configMapRef": {"name": "gdl-ray"}}:
                        yield f"{name}: there is no {source}"
    for service in of_kind(documents, "Service"):
        chosen = [p for d in documents for p in pods(d) if selects(service["spec"]["selector"], labels(p))]
        ports = [port for pod in chosen for each in pod["spec"]["containers"] for port in each["ports"]]
        open_ports = {port["containerPort"] for port in ports}
        for port in service["spec"]["ports"]:
            if port["port"] not in open_ports:
                yield f"service {service['metadata']['name']} finds nobody who listens on {port['port']}"


def secrets_are_elsewhere(documents: list[Document]) -> Iterator[str]:
    """Whatever is secret comes from the Secret that the documented command makes."""
    if of_kind(documents, "Secret"):
        yield "a Secret is among the manifests"
    for document in documents:
        sources = [entry for container in containers(document) for entry in container.get("env", [])]
        password = cluster_of(document).get("gcsFaultToleranceOptions", {}).get("redisPassword")
        sources += [{"name": "REDIS_PASSWORD", **password}] if password else []
        for source in sources:
            reference = source.get("valueFrom", {}).get("secretKeyRef")
            if reference and (reference["name"] != "gdl-ray" or reference["key"] not in docker.SECRETS):
                yield f"`python -m infra.docker init` makes no {reference}"
            if not reference and re.search("PASSWORD|SECRET|TOKEN|ACCESS_KEY", source["name"]):
                yield f"{document['metadata']['name']}: {source['name']} is written down"


RAY = {"ray.io/is-ray-node": "yes"}
MLFLOW = {"app.kubernetes.io/name": "mlflow"}
CLIENT = {"gdl-ray/client": "true"}
OPERATOR = {"app.kubernetes.io/name": "kuberay-operator"}
SUBMITTER = {"batch.kubernetes.io/job-name": "train"}


def only_who_must_reaches_it(documents: list[Document]) -> Iterator[str]:
    """Everything is closed but for the ways that the platform takes."""
    if not of_kind(documents, "NetworkPolicy"):
        return
    postgres, redis, store = ({"app.kubernetes.io/name": n} for n in ("postgres", "redis", "object-store"))
    ways = [(MLFLOW, postgres, 5432), (RAY, MLFLOW, 5000), (CLIENT, MLFLOW, 5000), (RAY, redis, 6379)]
    ways += [(RAY, RAY, 6379), (RAY, RAY, 34567), (MLFLOW, RAY, 8000), (CLIENT, RAY, 8000)]
    ways += [(OPERATOR, RAY, 8265), (OPERATOR, RAY, 8000), (SUBMITTER, RAY, 8265), (SUBMITTER, redis, 6379)]
    if any(name_of(each) == "object-store" for each in documents):
        ways += [(RAY, store, 8333), (MLFLOW, store, 8333)]
    for client, server, port in ways:
        if not may_reach(documents, client, server, port):
            yield f"{client} cannot reach {server} at {port}"
    peers = [RAY, MLFLOW, CLIENT, OPERATOR, SUBMITTER, {"app": "stranger"}]
    servers = [(RAY, p) for p in (6379, 8000, 8265, 10001, 8080)] + [(MLFLOW, 5000), (postgres, 5432)]
    for server, port in [*servers, (redis, 6379), (store, 8333), ({"app": "later"}, 80)]:
        for client in peers:
            means = client == SUBMITTER and (server, port) == (RAY, 8000)  # one rule for it and the operator
            wanted = (client, server, port) in ways or client == server == RAY or means
            if not wanted and may_reach(documents, client, server, port):
                yield f"{client} reaches {server} at {port}"
    for service in of_kind(documents, "Service"):
        if service["spec"].get("type", "ClusterIP") != "ClusterIP":
            yield f"service {service['metadata']['name']} is open to the world"
    for document in of_kind(documents, "RayService", "RayJob"):
        if cluster_of(document)["headGroupSpec"].get("serviceType") != "ClusterIP":
            yield f"the head of {document['metadata']['name']} is open to the world"


def mlflow_is_right(documents: list[Document]) -> Iterator[str]:
    """By the command of MLflow, and by the names under which it is asked."""
    for document in documents:
        for container in containers(document):
            if container["name"] != "mlflow":
                continue
            words = [word.replace("$(BUCKET)", "s3://gdl-ray") for word in container["args"]]
            try:
                mlflow_cli.commands["server"].make_context("server", words[2:])
            except click.ClickException as error:
                yield error.format_message()
            allowed = next((word for word in words if word.startswith("--allowed-hosts=")), "=")
            settings = of_kind(documents, "ConfigMap")[0]["data"]
            host = settings["MLFLOW_TRACKING_URI"].removeprefix("http://").partition(":")[0]
            if f"{host}:*" not in allowed.partition("=")[2].split(","):
                yield f"MLflow refuses {host}"
            if host not in {name_of(each) for each in of_kind(documents, "Service")}:
                yield f"there is no service {host}"


def variables_are_known(documents: list[Document]) -> Iterator[str]:
    source = Path(mlflow.environment_variables.__file__).read_text()
    for document in documents:
        given = [entry["name"] for container in containers(document) for entry in container.get("env", [])]
        given += list(document.get("data", {}))
        for name in given:
            if name.startswith("MLFLOW_") and f'"{name}"' not in source:
                yield f"MLflow does not read {name}"


def pods_are_modest(documents: list[Document]) -> Iterator[str]:
    """Nobody is root, nobody can become it, each says what it needs; Ray has shared memory."""
    for document in documents:
        for pod in pods(document):
            name = name_of(document)
            security = pod["spec"].get("securityContext", {})
            if not security.get("runAsNonRoot") or not security.get("runAsUser"):
                yield f"{name} may run as root"
            if pod["spec"].get("automountServiceAccountToken") is not False:
                yield f"{name} holds a key to the API of Kubernetes"
            for container in pod["spec"]["containers"]:
                of_container = container.get("securityContext", {})
                if of_container.get("allowPrivilegeEscalation") is not False:
                    yield f"{name} may become root"
                if not {"requests", "limits"} <= container["resources"].keys():
                    yield f"{name} does not say what it needs"
                memory = [m for m in container.get("volumeMounts", []) if m["mountPath"] == "/dev/shm"]
                if container["name"].startswith("ray-") and not memory:
                    yield f"{name} has 64 MB of shared memory"
                gpus = container["resources"]["limits"].get("nvidia.com/gpu")
                tolerated = [each["key"] for each in pod["spec"].get("tolerations", [])]
                if gpus and "nvidia.com/gpu" not in tolerated:
                    yield f"{name} is not let onto nodes with GPUs"


def images_are_taken_from_the_node(documents: list[Document]) -> Iterator[str]:
    """Unless told otherwise, Kubernetes pulls images of no tag, or of `latest`, even where they are there."""
    for document in documents:
        for container in containers(document):
            tag = container["image"].rpartition("/")[2].partition(":")[2] or "latest"
            usual = "Always" if tag == "latest" else "IfNotPresent"
            if container.get("imagePullPolicy", usual) == "Always":
                yield f"{name_of(document)}: {container['image']} is always pulled"


RULES: tuple[Rule, ...] = (
    images_are_taken_from_the_node,
    kuberay_takes_it,
    kubernetes_takes_it,
    ray_starts,
    the_job_fits,
    serve_takes_it,
    names_lead_somewhere,
    secrets_are_elsewhere,
    only_who_must_reaches_it,
    mlflow_is_right,
    variables_are_known,
    pods_are_modest,
)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_is_right(overlay: str) -> None:
    documents = render(FOLDER / "overlays" / overlay)
    problems = [f"{rule.__name__}: {problem}" for rule in RULES for problem in rule(documents)]
    assert problems == []


@cache
def rendered(overlay: str) -> list[Document]:
    return render(FOLDER / "overlays" / overlay)


PLATFORM, SAMPLING, JOB = "base/platform", "base/platform/sampling.yaml", "base/training/job.yaml"
FAULTS: list[tuple[str, str, str, Rule]] = [
    (JOB, "maxReplicas: 2", "maxReplica: 2", kuberay_takes_it),
    (JOB, "mode: token", "mode: tokens", kuberay_takes_it),
    (JOB, "ttlSecondsAfterFinished: 600", 'ttlSecondsAfterFinished: "600"', kuberay_takes_it),
    (JOB, "ray.io/v1", "ray.io/v1alpha1", kuberay_takes_it),
    (SAMPLING, "upgradeStrategy:", "upgradeStrat:", kuberay_takes_it),
    (SAMPLING, "redisAddress", "redisAdress", kuberay_takes_it),
    (SAMPLING, "mountPath", "mountpath", kubernetes_takes_it),
    (SAMPLING, "configMapRef", "configMapref", kubernetes_takes_it),
    (f"{PLATFORM}/mlflow.yaml", "readinessProbe", "readynessProbe", kubernetes_takes_it),
    (f"{PLATFORM}/mlflow.yaml", "replicas: 1", "replicas: one", kubernetes_takes_it),
    (f"{PLATFORM}/network.yaml", "policyTypes: [Ingress]", "policyType: [Ingress]", kubernetes_takes_it),
    (JOB, "object-store-memory:", "object-store-memry:", ray_starts),
    (JOB, 'num-cpus: "0"', 'num-cpus: "none"', ray_starts),
    (JOB, 'rayVersion: "2.60.0"', 'rayVersion: "2.59.0"', ray_starts),
    (SAMPLING, "mode: token", "mode: disabled", ray_starts),
    (JOB, "--workers 1:2", "--worker 1:2", the_job_fits),
    (JOB, "--workers 1:2", "--workers 1:5", the_job_fits),
    (JOB, "--workers 1:2", "--workers 2 --cpus 3", the_job_fits),
    (JOB, "train vae", "train vea", the_job_fits),
    (JOB, "--storage s3://gdl-ray/runs", "", the_job_fits),
    (JOB, "30min", "30m", the_job_fits),
    (JOB, 'num-cpus: "0"', 'num-cpus: "1"', the_job_fits),
    (SAMPLING, "serve.declared:application", "serve.declare:application", serve_takes_it),
    (SAMPLING, 'replicas: "2:4"', "replica: 2", serve_takes_it),
    (SAMPLING, "proxy_location: EveryNode", "proxy_locations: EveryNode", serve_takes_it),
    (SAMPLING, "route_prefix: /", "route_prefx: /", serve_takes_it),
    (SAMPLING, "sampling-serve-svc:8000", "sampling:8000", serve_takes_it),
    (SAMPLING, "args:", "deployments: [{name: Replica, max_concurent: 3}]\n        args:", serve_takes_it),
    (f"{PLATFORM}/mlflow.yaml", "app.kubernetes.io/name: mlflow", "app: mlflow", names_lead_somewhere),
    (f"{PLATFORM}/postgres.yaml", "port: 5432", "port: 5423", names_lead_somewhere),
    (f"{PLATFORM}/postgres.yaml", "- name: shm\n              mount", "- name: shn\n              mount",
     names_lead_somewhere),
    (SAMPLING, "serviceAccountName: gdl-ray", "serviceAccountName: gdlray", names_lead_somewhere),
    (SAMPLING, "- configMapRef:\n", "- configMapRef: {name: gdl}\n              #", names_lead_somewhere),
    (SAMPLING, "key: redis-password", "key: redis-pasword", secrets_are_elsewhere),
    (f"{PLATFORM}/redis.yaml", "valueFrom:\n                secretKeyRef:\n                  name: gdl-ray\n"
     "                  key: redis-password", "value: hunter2", secrets_are_elsewhere),
    (f"{PLATFORM}/network.yaml", "podSelector: {}", "podSelector: {matchLabels: {a: b}}",
     only_who_must_reaches_it),
    (f"{PLATFORM}/network.yaml", "port: 5432", "port: 5433", only_who_must_reaches_it),
    (f"{PLATFORM}/network.yaml", "  gdl-ray/client:", "  gdl-ray/clients:", only_who_must_reaches_it),
    (f"{PLATFORM}/mlflow.yaml", "selector:\n    app", "type: LoadBalancer\n  selector:\n    app",
     only_who_must_reaches_it),
    (SAMPLING, "serviceType: ClusterIP", "serviceType: NodePort", only_who_must_reaches_it),
    (f"{PLATFORM}/mlflow.yaml", "--allowed-hosts=mlflow:*,", "--allowed-hosts=", mlflow_is_right),
    (f"{PLATFORM}/mlflow.yaml", "--backend-store-uri", "--backend-store", mlflow_is_right),
    (f"{PLATFORM}/mlflow.yaml", "MLFLOW_FLASK_SERVER", "MLFLOW_SERVER", variables_are_known),
    (f"{PLATFORM}/kustomization.yaml", "MLFLOW_TRACKING_USERNAME", "MLFLOW_USERNAME", variables_are_known),
    (JOB, "mountPath: /dev/shm", "mountPath: /shm", pods_are_modest),
    (JOB, "runAsNonRoot: true", "runAsNonRoot: false", pods_are_modest),
    (f"{PLATFORM}/redis.yaml", "allowPrivilegeEscalation: false", "privileged: true", pods_are_modest),
    ("overlays/cpu/platform/kustomization.yaml", "newTag: 0.1.0", "newTag: latest",
     images_are_taken_from_the_node),
]  # fmt: skip


@pytest.mark.parametrize(("file", "right", "wrong", "rule"), FAULTS)
def test_each_planted_fault_is_found(file: str, right: str, wrong: str, rule: Rule, tmp_path: Path) -> None:
    if rule is kuberay_takes_it and SCHEMAS is None and "v1alpha1" not in wrong:
        pytest.skip("KubeRay's schemas are not on this machine")
    folder = shutil.copytree(FOLDER, tmp_path / "k8s")
    text = (folder / file).read_text()
    assert right in text
    (folder / file).write_text(text.replace(right, wrong, 1))
    overlay = "cpu/training" if file == JOB else "cpu/platform"
    documents = render(folder / "overlays" / overlay)
    if rule is kubernetes_takes_it:  # slowly
        documents = [each for each in documents if each not in rendered(overlay)]
    assert list(rule(documents))


def test_faults_of_the_overlay_for_gpus_are_found(tmp_path: Path) -> None:
    documents = render(FOLDER / "overlays" / "gpu" / "platform")
    pod = of_kind(documents, "RayService")[0]["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["template"]
    assert pod["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    del pod["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
    assert any("do not fit" in problem for problem in serve_takes_it(documents))
    documents = render(FOLDER / "overlays" / "gpu" / "training")
    pod = of_kind(documents, "RayJob")[0]["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]
    del pod["spec"]["tolerations"]
    assert list(pods_are_modest(documents))


def test_a_patch_that_changes_nothing_fails(tmp_path: Path) -> None:
    folder = shutil.copytree(FOLDER, tmp_path / "k8s")
    patch = folder / "overlays" / "gpu" / "training" / "job.yaml"
    patch.write_text(patch.read_text().replace("/spec/entrypoint", "/spec/entrypoints"))
    with pytest.raises(AssertionError, match="replaces nothing"):
        render(folder / "overlays" / "gpu" / "training")


def test_readers_load_the_images_that_pods_ask_for() -> None:
    documents = [each for overlay in OVERLAYS[:2] for each in rendered(overlay)]
    asked = {container["image"] for document in documents for container in containers(document)}
    readme = (FOLDER / "README.md").read_text()
    (loaded,) = re.findall(r"kind load docker-image ([^`]*)`", readme)
    assert set(loaded.split()) == {each for each in asked if each.startswith("gdl_ray")}
    assert set(re.findall(r"docker build \S+ \S+ -t (\S+)", readme)) == set(loaded.split())


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not on this machine")
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kubectl_renders_the_same(overlay: str) -> None:
    command = ["kubectl", "kustomize", str(FOLDER / "overlays" / overlay)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert by_name(list(yaml.safe_load_all(done.stdout))) == by_name(render(FOLDER / "overlays" / overlay))


def by_name(documents: list[Document]) -> dict[tuple[str, str], Document]:
    for document in documents:
        pods(document)  # adds the same labels to both
    return {(each["kind"], name_of(each)): each for each in documents}
