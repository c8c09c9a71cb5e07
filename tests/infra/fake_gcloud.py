"""A gcloud that keeps a project in a file: it has Google's words, and writes down what it is told.

It knows no flags: that they are right is for the real one to say, in `test_gcp.py`.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

TYPES = {"e2-standard-4": (4, []), "n1-standard-8": (8, []), "g2-standard-8": (8, [("nvidia-l4", 1)])}
EXHAUSTED = (
    "ERROR: (gcloud.compute.instances.create) Could not fetch resource:\n"
    " - code: ZONE_RESOURCE_POOL_EXHAUSTED\n"
    "   errorDetails: [{{'errorInfo': {{'metadatas': {{'zonesAvailable': '{available}'}}}}}}]\n"
    "   message: The zone '{zone}' does not have enough resources available to fulfill the request."
)


def main(words: list[str], state: dict[str, Any]) -> tuple[Any, str]:
    """Do a command on the state; returns what it prints, and what it complains of."""
    state["told"].append(words)
    flags = {}
    names = []
    for word in words:
        if word.startswith("--"):
            key, _, value = word[2:].partition("=")
            flags[key] = value
        else:
            names.append(word)
    for pattern, complaint in state["complaints"].items():
        if pattern in " ".join(words):
            return None, complaint
    verbs = [word for word in names if word in _VERBS]
    verb = verbs[0]
    at = names.index(verb)
    return _VERBS[verb](state, " ".join(names[:at]), names[at + 1 :], flags)


def _describe(state: dict[str, Any], kind: str, names: list[str], flags: dict[str, str]) -> tuple[Any, str]:
    if kind == "compute regions":
        return {"quotas": state["quotas"]}, ""
    if kind == "compute project-info":
        return {"quotas": state["project_quotas"]}, ""
    if kind == "compute images":
        return {"name": names[0]}, ""
    there = state["things"].get(f"{kind} {names[0]}")
    return (there, "") if there is not None else (None, f"ERROR: The resource '{names[0]}' was not found")


def _create(state: dict[str, Any], kind: str, names: list[str], flags: dict[str, str]) -> tuple[Any, str]:
    name = names[0]
    if kind == "compute instances":
        zone = flags["zone"]
        if zone in state["full"]:
            return None, EXHAUSTED.format(zone=zone, available=state["available"])
        labels = dict(pair.split("=", 1) for pair in flags["labels"].split(","))
        state["instances"].append(instance(name, zone, labels, flags["machine-type"]))
        return [state["instances"][-1]], ""
    if kind == "iam service-accounts":
        name = f"{name}@{flags['project']}.iam.gserviceaccount.com"
    if f"{kind} {name}" in state["things"]:
        return None, f"ERROR: The resource '{name}' already exists"
    made = {"name": name, "creationTimestamp": "2026-01-01T00:00:00.000-08:00"}
    if kind == "iam service-accounts":
        made |= {"email": name, "displayName": flags["display-name"]}
    if "region" in flags:
        made["region"] = (
            f"https://www.googleapis.com/compute/v1/projects/my-project/regions/{flags['region']}"
        )
    made |= {"network": flags["network"]} if "network" in flags else {}
    state["things"][f"{kind} {name}"] = made
    return [made], ""


def instance(
    name: str, zone: str, labels: dict[str, str], kind: str, status: str = "RUNNING"
) -> dict[str, Any]:
    """Describe a machine as Google does."""
    place = f"https://www.googleapis.com/compute/v1/projects/my-project/zones/{zone}"
    return {
        "name": name,
        "zone": place,
        "machineType": f"{place}/machineTypes/{kind}",
        "status": status,
        "labels": labels,
        "creationTimestamp": "2026-01-01T00:00:00.000-08:00",
    }


def _update(state: dict[str, Any], kind: str, names: list[str], flags: dict[str, str]) -> tuple[Any, str]:
    bucket = state["things"][f"{kind} {names[0]}"]
    bucket["versioning_enabled"] = "versioning" in flags
    bucket["lifecycle_config"] = json.loads(Path(flags["lifecycle-file"]).read_text())
    return None, ""


def _label(state: dict[str, Any], kind: str, names: list[str], flags: dict[str, str]) -> tuple[Any, str]:
    for each in state["instances"]:
        if each["name"] == names[0]:
            each["labels"] |= dict(pair.split("=", 1) for pair in flags["labels"].split(","))
    return None, ""


def _token(state: dict[str, Any], kind: str, names: list[str], flags: dict[str, str]) -> tuple[Any, str]:
    return {"token": "secret"}, ""


def _delete(state: dict[str, Any], kind: str, names: list[str], flags: dict[str, str]) -> tuple[Any, str]:
    if kind in ("compute instances", "compute disks"):
        of = kind.partition(" ")[2]
        state[of] = [each for each in state[of] if each["name"] not in names]
        return None, ""
    if f"{kind} {names[0]}" not in state["things"]:
        return None, f"ERROR: The resource '{names[0]}' was not found"
    if kind == "compute networks" and any(
        each.get("network") == names[0] for each in state["things"].values()
    ):
        return None, f"ERROR: The network resource '{names[0]}' is already being used by a subnet"
    del state["things"][f"{kind} {names[0]}"]
    return None, ""


def _rm(state: dict[str, Any], kind: str, names: list[str], flags: dict[str, str]) -> tuple[Any, str]:
    return _delete(state, "storage buckets", names, flags)


def _list(state: dict[str, Any], kind: str, names: list[str], flags: dict[str, str]) -> tuple[Any, str]:
    if kind == "compute machine-types":
        return [
            {
                "name": name,
                "zone": zone,
                "guestCpus": cpus,
                "accelerators": [
                    {"guestAcceleratorType": model, "guestAcceleratorCount": count} for model, count in gpus
                ],
            }
            for name, (cpus, gpus) in TYPES.items()
            for zone in state["zones"]
            if f"{name} " in flags["filter"].replace("(", " ").replace(")", " ")
        ], ""
    asked = flags.get("filter", "")
    if kind in ("compute instances", "compute disks"):
        key, _, value = asked.removeprefix("labels.").removesuffix(":*").partition("=")
        every = [each for each in state[kind.partition(" ")[2]] if not key or key in each["labels"]]
        return [each for each in every if value in ("", each["labels"][key])], ""
    of_kind = [key for key in state["things"] if key.rpartition(" ")[0] == kind]
    start = f"{kind} {asked.removeprefix('name~^')}"
    return [state["things"][key] for key in of_kind if key.startswith(start)], ""


def _policy(state: dict[str, Any], kind: str, names: list[str], flags: dict[str, str]) -> tuple[Any, str]:
    of = [binding for binding in state["bindings"] if binding[0] == f"{kind} {names[0]}"]
    return {"bindings": [{"role": role, "members": [member]} for _, member, role in of]}, ""


def _bind(state: dict[str, Any], kind: str, names: list[str], flags: dict[str, str]) -> tuple[Any, str]:
    state["bindings"].append([f"{kind} {names[0]}", flags["member"], flags["role"]])
    return None, ""


def _unbind(state: dict[str, Any], kind: str, names: list[str], flags: dict[str, str]) -> tuple[Any, str]:
    binding = [f"{kind} {names[0]}", flags["member"], flags["role"]]
    if binding not in state["bindings"]:
        return None, "ERROR: Policy binding with the specified principal, role, and condition not found!"
    state["bindings"].remove(binding)
    return None, ""


def _project(state: dict[str, Any], kind: str, names: list[str], flags: dict[str, str]) -> tuple[Any, str]:
    return state["project"], ""


def _copy(state: dict[str, Any], kind: str, names: list[str], flags: dict[str, str]) -> tuple[Any, str]:
    return None, ""


_VERBS = {
    "describe": _describe,
    "describe-from-family": _describe,
    "create": _create,
    "update": _update,
    "add-labels": _label,
    "print-access-token": _token,
    "get": _project,
    "delete": _delete,
    "rm": _rm,
    "list": _list,
    "get-iam-policy": _policy,
    "add-iam-policy-binding": _bind,
    "remove-iam-policy-binding": _unbind,
    "cp": _copy,
    "ssh": _copy,
}


if __name__ == "__main__":
    file = Path(os.environ["FAKE_GCLOUD"])
    project = json.loads(file.read_text())
    says, complains = main(sys.argv[1:], project)
    file.write_text(json.dumps(project))
    if complains:
        sys.exit(complains)
    print("" if says is None else json.dumps(says))
