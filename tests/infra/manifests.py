"""Manifests for Kubernetes, as tests read them: rendered, and asked for their pods and who reaches whom."""

import copy
from pathlib import Path
from typing import Any

import yaml

Document = dict[str, Any]


def render(folder: Path) -> list[Document]:
    """Render an overlay as kustomize does, as far as these overlays go."""
    overlay = yaml.safe_load((folder / "kustomization.yaml").read_text())
    documents: list[Document] = []
    for name in overlay["resources"]:
        path = folder / name
        documents += render(path) if path.is_dir() else list(yaml.safe_load_all(path.read_text()))
    for generator in overlay.get("configMapGenerator", []):
        data = dict(literal.split("=", 1) for literal in generator["literals"])
        if generator.get("behavior") == "merge":
            next(each for each in documents if each["kind"] == "ConfigMap")["data"] |= data
        else:
            metadata = {"name": generator["name"], "namespace": overlay["namespace"]}
            documents.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data})
    for document in documents:
        if document["kind"] != "Namespace":
            document["metadata"]["namespace"] = overlay["namespace"]
        for container in containers(document):
            tags = [
                each["newTag"] for each in overlay.get("images", []) if each["name"] == container["image"]
            ]
            container["image"] = ":".join([container["image"], *tags])
    for patch in overlay.get("patches", []):
        wanted = patch["target"].items()
        targets = [each for each in documents if wanted <= {"name": name_of(each), **each}.items()]
        assert targets, f"{folder}: a patch has no target"
        for target in targets:
            for change in yaml.safe_load((folder / patch["path"]).read_text()):
                apply(target, change)
    return documents


def apply(document: Document, change: Document) -> None:
    """Change a document by one operation of RFC 6902; fails where the place is not there."""
    *path, last = change["path"].strip("/").split("/")
    place: Any = document
    for part in path:
        place = place[int(part)] if isinstance(place, list) else place[part]
    value = copy.deepcopy(change["value"])
    if isinstance(place, list):
        assert (change["op"], last) == ("add", "-")
        place.append(value)
    else:
        assert change["op"] == "add" or last in place, f"{change['path']} replaces nothing"
        place[last] = value


def name_of(document: Document) -> str:
    return str(document["metadata"]["name"])


def pods(document: Document) -> list[Document]:
    """The pods that a document makes: each a template, with the labels that KubeRay adds."""
    spec = document.get("spec", {})
    ray_cluster = cluster_of(document)
    if ray_cluster:
        groups = [ray_cluster["headGroupSpec"], *ray_cluster["workerGroupSpecs"]]
        for group in groups:
            group["template"].setdefault("metadata", {})["labels"] = {"ray.io/is-ray-node": "yes"}
        return [group["template"] for group in groups]
    return [spec["template"]] if "template" in spec else []


def cluster_of(document: Document) -> Document:
    spec = document.get("spec", {})
    found: Document = spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or {}
    return found


def containers(document: Document) -> list[Document]:
    return [container for pod in pods(document) for container in pod["spec"]["containers"]]


def of_kind(documents: list[Document], *kinds: str) -> list[Document]:
    return [document for document in documents if document["kind"] in kinds]


def labels(pod: Document) -> dict[str, str]:
    found: dict[str, str] = pod.get("metadata", {}).get("labels", {})
    return found


def selects(match: dict[str, str], of: dict[str, str]) -> bool:
    return match.items() <= of.items()


def peer_is(peer: Document, pod: dict[str, str]) -> bool:
    """Whether one entry of a policy's `from` means a pod of these labels, in this namespace."""
    selector = peer["podSelector"]
    needed = [each["key"] for each in selector.get("matchExpressions", [])]
    return selects(selector.get("matchLabels", {}), pod) and all(key in pod for key in needed)


def may_reach(documents: list[Document], client: dict[str, str], server: dict[str, str], port: int) -> bool:
    """What Kubernetes's rules say: a pod that policies choose is reached by whom one of them lets in."""
    policies = [p["spec"] for p in of_kind(documents, "NetworkPolicy")]
    chosen = [p for p in policies if selects(p["podSelector"].get("matchLabels", {}), server)]
    rules = [rule for policy in chosen for rule in policy.get("ingress", [])]
    return not chosen or any(
        any(peer_is(peer, client) for peer in rule["from"])
        and (not rule.get("ports") or port in [each["port"] for each in rule["ports"]])
        for rule in rules
    )
