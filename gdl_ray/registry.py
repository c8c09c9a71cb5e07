"""Runs, registered models and their versions in MLflow: the only file that imports it.

One experiment per dataset, a run per training job, a registered model `{dataset}-{family}`. A version holds
the files of a checkpoint that serving needs, beside the code that reads them: safetensors, JSON, no pickle.
The alias `champion` names the version that is served.
"""

import io
import json
import logging
import os
import shutil
import tempfile
import time
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

# MLflow's own retries last minutes; who calls here knows better how long to wait.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
# The job says itself, in a line, where the run and the model are.
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")

import mlflow
import mlflow.pyfunc
import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from mlflow import MlflowClient
from mlflow.entities import Dataset as LoggedDataset
from mlflow.entities import DatasetInput, InputTag, Metric, Param
from mlflow.exceptions import MlflowException, RestException
from mlflow.models import ModelSignature
from mlflow.models import set_model as set_model  # for pyfunc.py
from mlflow.pyfunc.model import PythonModel
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema, TensorSpec
from PIL import Image
from requests import RequestException

from gdl_ray.data import Dataset
from gdl_ray.engine import request_keys
from gdl_ray.families import key_of
from gdl_ray.family import UNLABELLED, Family
from gdl_ray.home import home, made_whole
from gdl_ray.train import checkpoint

logging.getLogger("mlflow").setLevel(logging.WARNING)

CHAMPION = "champion"
"""Alias of the version that is served."""

SCORES = ("validation/", "test/")
"""Beginnings of the names of the scores that are written on a version."""

SAMPLES = "samples"
"""Key under which every run logs its sample grids."""

# MLflow 3 shows runs and their curves first, rather than traces of language models.
_TRAINING_PAGE = {"mlflow.experimentKind": "custom_model_development"}
_PATIENCE_S = 600.0  # how long metrics wait for a server that does not answer


class RegistryUnavailable(Exception):  # noqa: N818  (a state of the world, as QueueFull)
    """The MLflow server does not answer."""


def tracking_uri() -> str:
    """Read where MLflow is from MLFLOW_TRACKING_URI.

    Raises:
        RegistryUnavailable: if it is not set.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if not uri:
        raise RegistryUnavailable(
            "MLFLOW_TRACKING_URI is not set; `python -m infra up` starts a server and sets it for jobs"
        )
    return uri


def check() -> None:
    """Ask whether the MLflow server answers.

    Raises:
        RegistryUnavailable: if not within five seconds.
    """
    uri = tracking_uri()
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=5):  # noqa: S310  (the user's own address)
            pass
    except (OSError, ValueError) as error:
        raise RegistryUnavailable(
            f"no MLflow server answers at MLFLOW_TRACKING_URI={uri} ({error}); "
            f"start it, or correct the address"
        ) from error


def model_name(dataset: str, family: str) -> str:
    """Name the registered model of a family on a dataset."""
    return f"{dataset}-{family}"


def start_run(
    name: str, dataset: Dataset, params: Mapping[str, str], tags: Mapping[str, str]
) -> tuple[str, str]:
    """Start a run in the experiment of its dataset; returns its id, and the address of its page."""
    client = MlflowClient(tracking_uri())
    experiment = _experiment(client, dataset.spec.name)
    run_id: str = client.create_run(experiment, run_name=name, tags=dict(tags)).info.run_id
    client.log_batch(run_id, params=[Param(key, value) for key, value in params.items()])
    client.log_inputs(run_id, [_describe_data(dataset)])
    return run_id, f"{tracking_uri()}/#/experiments/{experiment}/runs/{run_id}"


def _experiment(client: MlflowClient, name: str) -> str:
    """Find or make an experiment; returns its id."""
    if found := client.get_experiment_by_name(name):
        return str(found.experiment_id)
    try:
        return str(client.create_experiment(name, tags=_TRAINING_PAGE))
    except RestException:  # another job was faster
        found = client.get_experiment_by_name(name)
        if found is None:
            raise
        return str(found.experiment_id)


def _describe_data(dataset: Dataset) -> DatasetInput:
    logged = LoggedDataset(
        name=dataset.spec.name,
        digest=dataset.digest[:16],
        source_type="gdl_ray",
        source=json.dumps({"name": dataset.spec.name, "sha256": dataset.digest}),
        profile=json.dumps({name: len(split) for name, split in dataset.splits.items()}),
    )
    return DatasetInput(logged, [InputTag(key="mlflow.data.context", value="training")])


class Run:
    """The log of a run.

    Every report has its step, and a step that was logged is not logged again: what a restarted worker repeats
    is dropped. While the server is away, reports wait.

    Args:
        run_id: of a run that was started.
        uri: address of the MLflow server.
    """

    def __init__(self, run_id: str, uri: str) -> None:
        self._client = MlflowClient(uri)
        self._id = run_id
        self._last_step = -1
        self._lost = 0

    def log(self, step: int, metrics: Mapping[str, float], samples_png: bytes | None = None) -> None:
        """Log the metrics, and perhaps a sample grid, of one step."""
        if step <= self._last_step:
            return
        self._last_step = step
        try:
            self._log_metrics(step, metrics)
            if samples_png:
                picture = Image.open(io.BytesIO(samples_png))
                log = partial(self._client.log_image, self._id, picture, key=SAMPLES, step=step)
                _persist(partial(log, synchronous=True))
        except (MlflowException, RequestException):
            logging.getLogger(__name__).exception("the report of step %d could not be logged", step)
            self._lost += 1

    def log_final(self, metrics: Mapping[str, float]) -> None:
        """Log metrics of the finished model, at the last step."""
        self._log_metrics(max(self._last_step, 0), metrics)

    def finish(self, status: str = "FINISHED") -> int:
        """End the run; returns how many reports could not be logged.

        Args:
            status: FINISHED, FAILED or KILLED.
        """
        _persist(partial(self._client.set_terminated, self._id, status))
        return self._lost

    def _log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        now_ms = int(time.time() * 1000)
        batch = [Metric(key, value, now_ms, step) for key, value in metrics.items()]
        _persist(partial(self._client.log_batch, self._id, metrics=batch))


def _persist(call: Callable[[], Any]) -> None:
    """Repeat a call until the server answers, for ten minutes; a refusal is raised at once."""
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            call()
        except (MlflowException, RequestException, RegistryUnavailable) as error:
            if _is_refusal(error) or time.monotonic() > deadline:
                raise
            time.sleep(2)
        else:
            return


def _is_refusal(error: Exception) -> bool:
    """Whether the server answered that it will not do it, rather than that it cannot now."""
    if not isinstance(error, RestException):
        return False
    status: int = error.get_http_status_code()  # type: ignore[no-untyped-call]
    return 400 <= status < 500 and status != 429


@dataclass(frozen=True, slots=True)
class Version:
    """A version of a registered model."""

    name: str
    version: int
    champion: int
    """The version that is champion now."""
    page: str
    """Address of its page."""


def register(run_id: str, directory: Path, promote: bool, scores: Mapping[str, float]) -> Version:
    """Register the model of a checkpoint as a new version.

    Args:
        run_id: the run that trained it.
        directory: the checkpoint.
        promote: make it the champion, even if there is one.
        scores: what the model was measured to be; written on the version.
    """
    _persist(check)
    family = checkpoint.load_family(directory)
    name = model_name(family.spec.name, key_of(family))
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
        models = _ask(client.search_registered_models, page_token=page or None)
        found |= {model.name: int(model.aliases[CHAMPION]) for model in models if CHAMPION in model.aliases}
        page = models.token or None
    return found


def describe(name: str, version: int) -> dict[str, Any]:
    """Look up what the registry knows of a version: its run, when it was made, and its scores.

    Raises:
        RegistryUnavailable: if the server does not answer.
    """
    found = _ask(MlflowClient(tracking_uri()).get_model_version, name, str(version))
    scores = {key: float(value) for key, value in found.tags.items() if key.startswith(SCORES)}
    return {"run_id": found.run_id, "created_ms": found.creation_timestamp, "metrics": scores}


def fetch(name: str, version: int) -> Path:
    """Download a version's checkpoint, once; returns its folder.

    Raises:
        RegistryUnavailable: if the server does not answer.
    """
    client = MlflowClient(tracking_uri())
    found = _ask(client.get_model_version, name, str(version))
    # The run tells versions of the same number apart after a registry was made anew.
    folder = home() / "models" / name / f"{version}-{found.run_id}"
    if not _is_intact(folder):
        uri = f"models:/{name}/{version}/artifacts/checkpoint"
        with made_whole(folder) as new, tempfile.TemporaryDirectory() as scratch:
            there = _ask(
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


def _ask(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    try:
        return call(*args, **kwargs)
    except MlflowException as error:
        if _is_refusal(error):
            raise
        raise RegistryUnavailable(f"no MLflow server answers at {tracking_uri()}: {error}") from error
