"""Registered models and their versions in MLflow: `{dataset}-{family}`.

A version holds the files of a checkpoint that serving needs, beside the code that reads them: safetensors,
JSON, no pickle. The alias `champion` names the version that is served.
"""

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
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


def registered(run_id: str, name: str) -> tuple[Version, dict[str, float]] | None:
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


def champions() -> dict[str, int]:
    """List the registered models that have a champion, with its version.

    Raises:
        RegistryUnavailable: if the server does not answer.
    """
    client = MlflowClient(tracking_uri())
    found: dict[str, int] = {}
    page: str | None = ""
    while page is not None:
        models = ask(client.search_registered_models, page_token=page or None)
        found |= {model.name: int(model.aliases[CHAMPION]) for model in models if CHAMPION in model.aliases}
        page = models.token or None
    return found


def describe(name: str, version: int) -> dict[str, Any]:
    """Look up what the registry knows of a version: its run, when it was made, and its scores.

    Raises:
        RegistryUnavailable: if the server does not answer.
    """
    found = ask(MlflowClient(tracking_uri()).get_model_version, name, str(version))
    scores = {key: float(value) for key, value in found.tags.items() if key.startswith(SCORES)}
    return {"run_id": found.run_id, "created_ms": found.creation_timestamp, "metrics": scores}


def fetch(name: str, version: int) -> Path:
    """Download a version's checkpoint, once; returns its folder.

    Raises:
        RegistryUnavailable: if the server does not answer.
    """
    client = MlflowClient(tracking_uri())
    found = ask(client.get_model_version, name, str(version))
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
