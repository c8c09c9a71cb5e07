"""Checkpoints: a folder that can be served, resumed and trusted.

    model.safetensors       averaged weights: what is evaluated and served
    config.json             family, its Config, the DataSpec, versions
    samples.png             what the averaged weights sampled
    resume/                 raw weights, optimizers and counters: what training needs to go on
    manifest.json           sha256 of each file above, written last

Tensors are safetensors and the rest is JSON: nothing in a checkpoint is code.
"""

import json
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import asdict
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import gdl_ray
from gdl_ray.families import FAMILIES, build, key_of
from gdl_ray.family import DataSpec, Family
from gdl_ray.home import file_sha256

SAMPLES_FILE = "samples.png"
MODEL_FILES = ("model.safetensors", "config.json", SAMPLES_FILE)
"""The files that serving needs; the rest is for training."""


class DamagedCheckpointError(Exception):
    """A checkpoint is incomplete or does not match its manifest."""


def save(
    directory: Path,
    model: Family,
    samples_png: bytes,
    tensors: Mapping[str, Tensor],
    counters: Mapping[str, Any],
) -> None:
    """Write a checkpoint into an empty folder.

    Args:
        directory: where to; made if it is not there.
        model: the model with its averaged weights.
        samples_png: a picture of what it samples.
        tensors: what training resumes from, by name.
        counters: the rest of it, as JSON values.
    """
    resume = directory / "resume"
    resume.mkdir(parents=True)
    save_file(_contiguous(model.state_dict()), directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(_describe(model), indent=2) + "\n")
    (directory / SAMPLES_FILE).write_bytes(samples_png)
    save_file(_contiguous(tensors), resume / "tensors.safetensors")
    (resume / "counters.json").write_text(json.dumps(counters, indent=2) + "\n")
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    manifest = {path.relative_to(directory).as_posix(): file_sha256(path) for path in files}
    (directory / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")


def verify(directory: Path, files: tuple[str, ...] | None = None) -> None:
    """Check the files of a checkpoint, or some of them, against its manifest.

    Raises:
        DamagedCheckpointError: naming the first file that is missing or differs.
    """
    try:
        manifest = json.loads((directory / "manifest.json").read_text())
    except (OSError, ValueError) as error:
        raise DamagedCheckpointError(f"checkpoint {directory} has no readable manifest: {error}") from error
    for name in manifest if files is None else files:
        path = directory / name
        if not path.is_file():
            raise DamagedCheckpointError(f"checkpoint {directory} lacks {name}")
        if file_sha256(path) != manifest.get(name):
            raise DamagedCheckpointError(f"checkpoint {directory}: {name} does not match its sha256 sum")


def load_family(directory: Path) -> Family:
    """Load the model of a checkpoint for evaluation, on the CPU.

    Raises:
        DamagedCheckpointError: if a file that it needs is missing or altered.
    """
    verify(directory, MODEL_FILES)
    described = json.loads((directory / "config.json").read_text())
    config = _config(FAMILIES[described["family"]].Config, described["config"])
    family = build(described["family"], config, DataSpec.from_json(described["spec"]))
    family.load_state_dict(load_file(directory / "model.safetensors"))
    return family.eval().requires_grad_(False)


def load_resume(directory: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Load averaged weights, tensors and counters to resume training from, on the CPU.

    Raises:
        DamagedCheckpointError: if any file is missing or altered.
    """
    verify(directory)
    counters = json.loads((directory / "resume" / "counters.json").read_text())
    return (
        load_file(directory / "model.safetensors"),
        load_file(directory / "resume" / "tensors.safetensors"),
        counters,
    )


def _describe(model: Family) -> dict[str, Any]:
    return {
        "family": key_of(model),
        "config": asdict(model.config),
        "spec": model.spec.to_json(),
        "versions": {"gdl_ray": gdl_ray.__version__, "torch": torch.__version__},
        "git_commit": git_commit(),
    }


def _config(kind: type, fields: Mapping[str, Any]) -> Any:
    """Rebuild a Config; JSON has no tuples, so its lists were tuples."""
    return kind(
        **{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    )


@lru_cache
def git_commit() -> str:
    """Commit of the source that runs, or "unknown" where that is not a git checkout.

    A Ray job runs a copy of the checkout without its history; then the installed package says where that is.
    """
    git = shutil.which("git")
    for folder in (Path(gdl_ray.__file__).parents[1], *_installed_from()):
        if git and (folder / ".git").exists():
            command = [git, "-C", str(folder), "rev-parse", "HEAD"]
            return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()  # noqa: S603
    return "unknown"


def _installed_from() -> list[Path]:
    try:
        origin = distribution("gdl_ray").read_text("direct_url.json")
    except PackageNotFoundError:
        return []
    return [Path(unquote(urlsplit(json.loads(origin)["url"]).path))] if origin else []


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
