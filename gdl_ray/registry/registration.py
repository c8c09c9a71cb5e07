"""Registering what a training run has made."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import mlflow
from mlflow import MlflowClient

from gdl_ray.families import key_of
from gdl_ray.family import Family
from gdl_ray.registry import card
from gdl_ray.registry.model import log_version
from gdl_ray.registry.promotion import move
from gdl_ray.registry.versions import CHAMPION, describe, model_name, page
from gdl_ray.tracking import PATIENCE_S, check, log_files, persist, run_facts, tracking_uri
from gdl_ray.train import checkpoint


@dataclass(frozen=True, slots=True)
class Version:
    """A version of a registered model."""

    name: str
    version: int
    champion: int
    """The version that is champion now; 0 if none is."""
    page: str
    """Address of its page."""


def register(run_id: str, directory: Path, promote: bool, scores: Mapping[str, float]) -> Version:
    """Register the model of a checkpoint as a new version; a run has one, however often it is asked for.

    Args:
        run_id: the run that trained it.
        directory: the checkpoint.
        promote: make it the champion, even if there is one.
        scores: what the model was measured to be; written on the version.
    """
    persist(check, PATIENCE_S)
    family = checkpoint.load_family(directory)
    name = model_name(family.spec.name, key_of(family))
    version = _version_of(run_id, name)
    if version is None:
        mlflow.set_tracking_uri(tracking_uri())
        with mlflow.start_run(run_id=run_id):
            version = log_version(name, family, directory)
    client = MlflowClient(tracking_uri())
    for key, value in scores.items():
        client.set_model_version_tag(name, str(version), key, repr(value))
    _describe(name, version, family, run_id, scores, directory)
    champion = client.get_registered_model(name).aliases.get(CHAMPION)
    if promote or champion is None:
        move(name, CHAMPION, version, "as its training was asked to" if promote else "the first version")
        champion = version
    return _described(name, version, champion)


def _describe(
    name: str, version: int, family: Family, run_id: str, scores: Mapping[str, float], directory: Path
) -> None:
    """Write what people read on the pages of a version and its model, where nobody has written yet."""
    client = MlflowClient(tracking_uri())
    if not client.get_model_version(name, str(version)).description:
        picture = (directory / checkpoint.SAMPLES_FILE).read_bytes()
        log_files(run_id, *card.pictures(version, picture))
        text = card.written(name, version, family, run_facts(run_id), scores)
        client.update_model_version(name, str(version), text)
    if not client.get_registered_model(name).description:
        client.update_registered_model(name, card.of_model(name, family))


def registered_by(run_id: str, name: str) -> tuple[Version, dict[str, float]] | None:
    """Look up the version that a run has registered, and its scores; None if it has not."""
    version = _version_of(run_id, name)
    if version is None:
        return None
    champion = MlflowClient(tracking_uri()).get_registered_model(name).aliases.get(CHAMPION, 0)
    return _described(name, version, champion), describe(name, version)["metrics"]


def _version_of(run_id: str, name: str) -> int | None:
    found = MlflowClient(tracking_uri()).search_model_versions(f"name='{name}' and run_id='{run_id}'")
    return max((int(each.version) for each in found), default=None)


def _described(name: str, version: int, champion: int | str) -> Version:
    return Version(name, version, int(champion), page(name, version))
