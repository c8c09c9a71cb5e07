"""Versions of registered models in MLflow: what there is, what is known of it, and its files here."""

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from gdl_ray.home import home, made_whole
from gdl_ray.tracking import ask, tracking_uri
from gdl_ray.train import checkpoint

CHAMPION = "champion"
"""Alias of the version that is served."""

SCORES = ("validation/", "test/", "samples/", "latent/", "efficiency/")
"""Beginnings of the names of the scores that are written on a version."""

KIND = "gdl_ray.kind"
"""Tag of a registered model that is no generative model; says what it is. It is not offered for sampling."""

OWN = "gdl_ray."
"""Beginning of the names of tags that are notes of this package to itself."""


class VersionNotFound(Exception):  # noqa: N818  (a state of the world, as RegistryUnavailable)
    """The registry has no such version."""


def model_name(dataset: str, family: str) -> str:
    """Name the registered model of a family on a dataset."""
    return f"{dataset}-{family}"


@dataclass(frozen=True, slots=True)
class Registered:
    """A registered model."""

    aliases: Mapping[str, int] = field(default_factory=dict)
    """Versions by alias."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Of the model itself, such as `serve.replicas`."""
    latest: int = 0
    """Its newest version; 0 if it has none."""


def page(name: str, version: int) -> str:
    """Tell the address of a version's page in MLflow."""
    return f"{tracking_uri()}/#/models/{name}/versions/{version}"


def registered() -> dict[str, Registered]:
    """List the registered generative models by name.

    Raises:
        RegistryUnavailable: if the server does not answer.
    """
    client = MlflowClient(tracking_uri())
    found: dict[str, Registered] = {}
    page: str | None = ""
    while page is not None:
        models = ask(client.search_registered_models, page_token=page or None)
        found |= {model.name: _registered(model) for model in models if KIND not in model.tags}
        page = models.token or None
    return found


def _registered(model: Any) -> Registered:
    aliases = {alias: int(version) for alias, version in model.aliases.items()}
    latest = max((int(newest.version) for newest in model.latest_versions or ()), default=0)
    return Registered(aliases, _without_notes(model.tags), latest)


def _without_notes(tags: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in tags.items() if not key.startswith(OWN)}


def exists(name: str, version: int) -> bool:
    """Tell whether a registered model has a version of that number.

    Raises:
        RegistryUnavailable: if the server does not answer.
    """
    try:
        look_up(name, version)
    except VersionNotFound:
        return False
    return True


def describe(name: str, version: int) -> dict[str, Any]:
    """Look up what the registry knows of a version: its run, when it was made, its scores and its other tags.

    Raises:
        VersionNotFound: if there is none.
        RegistryUnavailable: if the server does not answer.
    """
    found = look_up(name, version)
    scores = {key: float(value) for key, value in found.tags.items() if key.startswith(SCORES)}
    tags = {key: value for key, value in _without_notes(found.tags).items() if key not in scores}
    return {"run_id": found.run_id, "created_ms": found.creation_timestamp, "metrics": scores, "tags": tags}


def look_up(name: str, version: int) -> Any:
    """Ask for a version, as MLflow describes it.

    Raises:
        VersionNotFound: if there is none.
        RegistryUnavailable: if the server does not answer.
    """
    try:
        return ask(MlflowClient(tracking_uri()).get_model_version, name, str(version))
    except MlflowException as error:
        # A number that cannot be a version's, 0 for one, is called invalid.
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise VersionNotFound(f"{name} has no version {version}") from error
        raise


def fetch(name: str, version: int) -> Path:
    """Download a version's checkpoint, once; returns its folder.

    Raises:
        VersionNotFound: if there is none.
        RegistryUnavailable: if the server does not answer.
    """
    return fetch_files(name, version, "/artifacts/checkpoint", checkpoint.MODEL_FILES)


def fetch_files(name: str, version: int, path: str, files: tuple[str, ...]) -> Path:
    """Download a folder of a version that has a manifest of sha256 sums, once; returns where it is.

    Args:
        name: of the registered model.
        version: its number.
        path: of the folder within the version; empty for all of it.
        files: what must be there and match the manifest; if not, the folder is downloaded again.

    Raises:
        VersionNotFound: if there is none.
        RegistryUnavailable: if the server does not answer.
    """
    found = look_up(name, version)
    # The run tells versions of the same number apart after a registry was made anew.
    folder = home() / "models" / name / f"{version}-{found.run_id}"
    if not _is_intact(folder, files):
        uri = f"models:/{name}/{version}{path}"
        with made_whole(folder) as new, tempfile.TemporaryDirectory() as scratch:
            there = ask(
                mlflow.artifacts.download_artifacts, uri, dst_path=scratch, tracking_uri=tracking_uri()
            )
            shutil.copytree(there, new, dirs_exist_ok=True)
    return folder


def _is_intact(folder: Path, files: tuple[str, ...]) -> bool:
    try:
        checkpoint.verify(folder, files)
    except checkpoint.DamagedCheckpointError:
        return False
    return True
