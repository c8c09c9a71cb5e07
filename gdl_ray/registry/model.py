"""A registered model as MLflow itself loads it: code, safetensors and JSON, no pickle."""

import shutil
import tempfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from mlflow.models import ModelSignature
from mlflow.models import set_model as set_model  # for pyfunc.py
from mlflow.pyfunc.model import PythonModel
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema, TensorSpec

from gdl_ray.engine import request_keys
from gdl_ray.family import UNLABELLED, Family
from gdl_ray.train import checkpoint

_PACKAGE = Path(__file__).parents[1]


def log_version(name: str, family: Family, directory: Path) -> int:
    """Log the files that serving needs, and the code that reads them, as a version; returns its number."""
    with tempfile.TemporaryDirectory() as scratch:
        served = Path(scratch) / "checkpoint"
        served.mkdir()
        for file in (*checkpoint.MODEL_FILES, "manifest.json"):
            shutil.copy(directory / file, served)
        info = mlflow.pyfunc.log_model(
            name=name,
            python_model=str(_PACKAGE / "pyfunc.py"),
            artifacts={"checkpoint": str(served)},
            code_paths=[str(_PACKAGE)],
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
