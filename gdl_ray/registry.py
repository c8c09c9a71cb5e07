"""Registered models and their versions in MLflow: `{dataset}-{family}`.

A version holds the files of a checkpoint that serving needs, beside the code that reads them: safetensors,
JSON, no pickle. The alias `champion` names the version that is served.

References:
    Standard Webhooks, 2023, whose signatures MLflow's events carry. https://www.standardwebhooks.com
"""

import base64
import hashlib
import hmac
import logging
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import mlflow
import mlflow.pyfunc
import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from mlflow import MlflowClient
from mlflow.entities.webhook import Webhook, WebhookEventStr
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.models import set_model as set_model  # for pyfunc.py
from mlflow.pyfunc.model import PythonModel
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema, TensorSpec

from gdl_ray.engine import request_keys
from gdl_ray.families import key_of
from gdl_ray.family import UNLABELLED, Family
from gdl_ray.home import home, made_whole
from gdl_ray.tracking import PATIENCE_S, ask, check, persist, tracking_uri
from gdl_ray.tracking import RegistryUnavailable as RegistryUnavailable
from gdl_ray.train import checkpoint

CHAMPION = "champion"
"""Alias of the version that is served."""

SCORES = ("validation/", "test/")
"""Beginnings of the names of the scores that are written on a version."""

EVENTS: tuple[WebhookEventStr, ...] = (
    "registered_model.created",
    "model_version.created",
    "model_version_alias.created",
    "model_version_alias.deleted",
    "model_version_tag.set",
    "model_version_tag.deleted",
)
"""What `hook` has the registry tell of. It tells of nothing else yet: not of a model's own tags, nor of what
is deleted, so that whoever listens must look from time to time as well."""

MAX_AGE_S = 300.0
"""Age at which an event is too old to be believed, as Standard Webhooks advise; MLflow tries for less."""

log = logging.getLogger(__name__)


class VersionNotFound(Exception):  # noqa: N818  (a state of the world, as RegistryUnavailable)
    """The registry has no such version."""


def model_name(dataset: str, family: str) -> str:
    """Name the registered model of a family on a dataset."""
    return f"{dataset}-{family}"


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
            version = _log_version(name, family, directory)
    client = MlflowClient(tracking_uri())
    for key, value in scores.items():
        client.set_model_version_tag(name, str(version), key, repr(value))
    champion = client.get_registered_model(name).aliases.get(CHAMPION)
    if promote or champion is None:
        client.set_registered_model_alias(name, CHAMPION, str(version))
        champion = version
    return _described(name, version, champion)


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
    return Version(name, version, int(champion), f"{tracking_uri()}/#/models/{name}/versions/{version}")


def _log_version(name: str, family: Family, directory: Path) -> int:
    """Log the files that serving needs, and the code that reads them, as a version; returns its number."""
    with tempfile.TemporaryDirectory() as scratch:
        served = Path(scratch) / "checkpoint"
        served.mkdir()
        for file in (*checkpoint.MODEL_FILES, "manifest.json"):
            shutil.copy(directory / file, served)
        info = mlflow.pyfunc.log_model(
            name=name,
            python_model=str(Path(__file__).with_name("pyfunc.py")),
            artifacts={"checkpoint": str(served)},
            code_paths=[str(Path(__file__).parent)],
            pip_requirements=_requirements(),
            signature=signature(family),
            input_example=(pd.DataFrame({"label": [UNLABELLED] * 4}), {"seed": 7}),
            registered_model_name=name,
        )
    return int(info.registered_model_version)


def signature(family: Family) -> ModelSignature:
    """Describe `GenerativeModel.predict`: a row per sample, with its label; parameters for the rest."""
    spec = family.spec
    dtype = np.dtype(np.uint8 if spec.kind == "image" else np.int64)
    return ModelSignature(
        inputs=Schema([ColSpec("long", "label")]),
        outputs=Schema([TensorSpec(dtype, (-1, *spec.shape))]),
        params=ParamSchema(
            [
                ParamSpec("seed", "long", 0),
                *(
                    ParamSpec(name, "double", option.default)
                    for name, option in family.sampler().options.items()
                ),
            ]
        ),
    )


def _requirements() -> list[str]:
    """Pin what the code of a version needs: the core's dependencies, and what this file imports."""
    packages = ("torch", "numpy", "safetensors", "scikit-learn", "pillow", "pandas", "mlflow")
    return [f"{package}=={metadata.version(package).partition('+')[0]}" for package in packages]


class GenerativeModel(PythonModel):
    """A registered model as an MLflow pyfunc: `predict` draws a sample for each row of labels."""

    def load_context(self, context: Any) -> None:
        """Load the checkpoint among the version's artifacts."""
        self._family = checkpoint.load_family(Path(context.artifacts["checkpoint"]))

    def predict(
        self, context: Any, model_input: pd.DataFrame, params: Mapping[str, Any] | None = None
    ) -> npt.NDArray[Any]:
        """Sample.

        Args:
            context: not used.
            model_input: column `label`, a row per sample; -1 asks for any class.
            params: `seed`, an int; 0 if left out; and options of the sampler. The samples are those of the
                HTTP service for the same.

        Returns:
            uint8 (B, C, H, W) or int64 (B, T).
        """
        labels = torch.tensor(model_input["label"].to_numpy(np.int64))
        if not ((labels >= UNLABELLED) & (labels < self._family.spec.classes)).all():
            raise ValueError(f"label must lie in [0, {self._family.spec.classes - 1}], or be -1 for any")
        options = dict(params or {})
        keys = request_keys(int(options.pop("seed", 0)), len(labels))
        samples: npt.NDArray[Any] = self._family.sample(keys, labels, **options).numpy()
        return samples


@dataclass(frozen=True, slots=True)
class Registered:
    """A registered model."""

    aliases: Mapping[str, int] = field(default_factory=dict)
    """Versions by alias."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Of the model itself, such as `serve.replicas`."""
    latest: int = 0
    """Its newest version; 0 if it has none."""


def registered() -> dict[str, Registered]:
    """List the registered models by name.

    Raises:
        RegistryUnavailable: if the server does not answer.
    """
    client = MlflowClient(tracking_uri())
    found: dict[str, Registered] = {}
    page: str | None = ""
    while page is not None:
        models = ask(client.search_registered_models, page_token=page or None)
        found |= {model.name: _registered(model) for model in models}
        page = models.token or None
    return found


def _registered(model: Any) -> Registered:
    aliases = {alias: int(version) for alias, version in model.aliases.items()}
    latest = max((int(newest.version) for newest in model.latest_versions or ()), default=0)
    return Registered(aliases, dict(model.tags), latest)


def exists(name: str, version: int) -> bool:
    """Tell whether a registered model has a version of that number.

    Raises:
        RegistryUnavailable: if the server does not answer.
    """
    try:
        _look_up(name, version)
    except VersionNotFound:
        return False
    return True


def describe(name: str, version: int) -> dict[str, Any]:
    """Look up what the registry knows of a version: its run, when it was made, its scores and its other tags.

    Raises:
        VersionNotFound: if there is none.
        RegistryUnavailable: if the server does not answer.
    """
    found = _look_up(name, version)
    scores = {key: float(value) for key, value in found.tags.items() if key.startswith(SCORES)}
    tags = {key: value for key, value in found.tags.items() if key not in scores}
    return {"run_id": found.run_id, "created_ms": found.creation_timestamp, "metrics": scores, "tags": tags}


def _look_up(name: str, version: int) -> Any:
    """Ask for a version, as MLflow describes it."""
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
    found = _look_up(name, version)
    # The run tells versions of the same number apart after a registry was made anew.
    folder = home() / "models" / name / f"{version}-{found.run_id}"
    if not _is_intact(folder):
        uri = f"models:/{name}/{version}/artifacts/checkpoint"
        with made_whole(folder) as new, tempfile.TemporaryDirectory() as scratch:
            there = ask(
                mlflow.artifacts.download_artifacts, uri, dst_path=scratch, tracking_uri=tracking_uri()
            )
            shutil.copytree(there, new, dirs_exist_ok=True)
    return folder


def _is_intact(folder: Path) -> bool:
    try:
        checkpoint.verify(folder, checkpoint.MODEL_FILES)
    except checkpoint.DamagedCheckpointError:
        return False
    return True


def hook(url: str, secret: str) -> bool:
    """Have the registry POST its events to an address, signed; again with another secret replaces it.

    Args:
        url: of whoever listens; each has one hook.
        secret: signs the events, as `signed` checks. A new one reaches the server's processes within their
            MLFLOW_WEBHOOK_CACHE_TTL.

    Returns:
        Whether it will; the log says why not, for many servers refuse hooks, or those to private addresses.
    """
    try:
        client = MlflowClient(tracking_uri())
        ours = [hook.webhook_id for hook in _hooks(client) if hook.url == url]
        settings: dict[str, Any] = {"events": list(EVENTS), "secret": secret}
        if ours:
            ask(client.update_webhook, ours[0], status="ACTIVE", **settings)
        else:
            ask(client.create_webhook, "gdl_ray", url, **settings)
        for double in ours[1:]:  # two have asked at the same moment
            ask(client.delete_webhook, double)
    except (MlflowException, RegistryUnavailable) as error:
        log.warning("the registry will not tell %s of its events: %s", url, error)
        return False
    return True


def _hooks(client: MlflowClient) -> list[Webhook]:
    """List all hooks that the server has."""
    found: list[Webhook] = []
    page: str | None = ""
    while page is not None:
        hooks = ask(client.list_webhooks, page_token=page or None)
        found += hooks
        page = hooks.token or None
    return found


def signed(headers: Mapping[str, str], body: bytes, secret: str) -> bool:
    """Tell whether an event comes from a registry that knows the secret, and is not an old one sent again.

    Args:
        headers: of the request, in lower case or of a mapping to which case is nothing.
        body: as received, byte for byte.
        secret: that of `hook`.
    """
    identity, sent_s, signatures = (
        headers.get(f"x-mlflow-{name}", "") for name in ("delivery-id", "timestamp", "signature")
    )
    is_time = sent_s.isascii() and sent_s.isdigit() and len(sent_s) <= 12
    if not (is_time and abs(time.time() - int(sent_s)) <= MAX_AGE_S):
        return False
    content = f"{identity}.{sent_s}.".encode() + body
    digest = base64.b64encode(hmac.digest(secret.encode(), content, hashlib.sha256)).decode()
    expected = f"v1,{digest}".encode()
    # There may be several, while a secret is replaced by another.
    return any(hmac.compare_digest(expected, one.encode()) for one in signatures.split())
