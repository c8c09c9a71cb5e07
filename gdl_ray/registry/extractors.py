"""Classifiers whose features compare samples with data: registered as `{dataset}-classifier`, never sampled.

A version holds safetensors, JSON and a manifest of sha256 sums. The alias `champion` names the one that
evaluations of a dataset read with; figures made with different ones do not compare.
"""

import json
from collections.abc import Mapping

import torch
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from safetensors.torch import load_file, save

from gdl_ray.data import Dataset
from gdl_ray.evaluate.classifier import Classifier
from gdl_ray.family import DataSpec
from gdl_ray.home import bytes_sha256
from gdl_ray.registry.versions import (
    CHAMPION,
    KIND,
    OWN,
    VersionNotFound,
    fetch_files,
    look_up,
    model_name,
)
from gdl_ray.tracking import ask, log_files, tracking_uri
from gdl_ray.train.checkpoint import MANIFEST, git_commit

CLASSIFIER = "classifier"
"""Last part of a classifier's name, and its kind."""

_WEIGHTS, _CONFIG = "classifier.safetensors", "config.json"
_DATA, _SEED = f"{OWN}dataset_digest", f"{OWN}seed"
_ABOUT = (
    "A classifier fitted to the training split. Evaluations compare samples with data in its features: the "
    "alias `champion` names the version that they read with. It draws no samples; the service leaves it out."
)


def extractor(dataset: Dataset) -> tuple[Classifier, str] | None:
    """Find the registered classifier of a dataset; None if none was fitted to these very data.

    Returns:
        The classifier in evaluation mode, on the CPU, and what names it in a protocol: name, version and
        fingerprint of its weights, as `digits-classifier@1 3fa81c02`.

    Raises:
        RegistryUnavailable: if the server does not answer.
    """
    name = model_name(dataset.spec.name, CLASSIFIER)
    version = _champion(name, dataset.digest)
    if version is None:
        return None
    classifier = _load(name, version, dataset.spec)
    return classifier, f"{name}@{version} {classifier.fingerprint()}"


def fitted_with(dataset: Dataset, seed: int) -> int | None:
    """Find the first version that was fitted to these very data with this seed; None if there is none.

    Raises:
        RegistryUnavailable: if the server does not answer.
    """
    versions = _versions(model_name(dataset.spec.name, CLASSIFIER), dataset.digest)
    return min((version for version, of in versions.items() if of == str(seed)), default=None)


def register_classifier(
    run_id: str, dataset: Dataset, classifier: Classifier, seed: int, scores: Mapping[str, float]
) -> tuple[int, int]:
    """Register a classifier; who registers at the same time agrees on the first as champion.

    Args:
        run_id: the run that fitted it.
        dataset: what it was fitted to.
        classifier: to register.
        seed: that it was fitted with.
        scores: what it was measured to be; written on the version.

    Returns:
        Its version, and the one that is champion.

    Raises:
        RegistryUnavailable: if the server does not answer.
    """
    name = model_name(dataset.spec.name, CLASSIFIER)
    client = MlflowClient(tracking_uri())
    log_files(run_id, CLASSIFIER, _files(classifier, dataset.spec))
    try:
        ask(client.create_registered_model, name, tags={KIND: CLASSIFIER}, description=_ABOUT)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    source = f"{ask(client.get_run, run_id).info.artifact_uri}/{CLASSIFIER}"
    tags = {_DATA: dataset.digest, _SEED: str(seed)} | {key: repr(value) for key, value in scores.items()}
    version = ask(client.create_model_version, name, source, run_id, tags=tags).version
    champion = _champion(name, dataset.digest)
    if champion is None:
        champion = min(_versions(name, dataset.digest))
        ask(client.set_registered_model_alias, name, CHAMPION, str(champion))
    return int(version), champion


def _champion(name: str, digest: str) -> int | None:
    """Find the champion, if it was fitted to these data."""
    try:
        aliases = ask(MlflowClient(tracking_uri()).get_registered_model, name).aliases
        champion = int(aliases.get(CHAMPION, 0))
        return champion if look_up(name, champion).tags.get(_DATA) == digest else None
    except VersionNotFound:
        return None
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


def _versions(name: str, digest: str) -> dict[int, str]:
    """List the versions that were fitted to these data, and their seeds."""
    found = ask(MlflowClient(tracking_uri()).search_model_versions, f"name='{name}'")
    return {int(each.version): each.tags.get(_SEED, "") for each in found if each.tags.get(_DATA) == digest}


def _files(classifier: Classifier, spec: DataSpec) -> dict[str, bytes]:
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in classifier.state_dict().items()}
    config = {"kind": CLASSIFIER, "spec": spec.to_json(), "git_commit": git_commit()}
    files = {_WEIGHTS: save(weights), _CONFIG: f"{json.dumps(config, indent=2)}\n".encode()}
    manifest = {name: bytes_sha256(content) for name, content in files.items()}
    return {**files, MANIFEST: f"{json.dumps(manifest, indent=2)}\n".encode()}


def _load(name: str, version: int, spec: DataSpec) -> Classifier:
    folder = fetch_files(name, version, "", (_WEIGHTS, _CONFIG))
    with torch.random.fork_rng(devices=[]):  # the first weights, which are replaced, disturb nobody
        classifier = Classifier(spec)
    classifier.load_state_dict(load_file(folder / _WEIGHTS))
    return classifier.eval().requires_grad_(False)
