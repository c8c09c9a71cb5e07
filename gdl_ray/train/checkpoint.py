"""Checkpoints: a folder that can be served, resumed and trusted.

    model.safetensors       averaged weights: what is evaluated and served
    config.json             family, its Config, the DataSpec, versions
    samples.png             what the averaged weights sampled
    resume/                 raw weights, optimizers, counters and past metrics: what training needs to go on
    manifest.json           sha256 of each file above, written last

Tensors are safetensors and the rest is JSON: nothing in a checkpoint is code.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
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
MANIFEST = "manifest.json"
"""Written last: a folder without one is half a checkpoint."""
MODEL_FILES = ("model.safetensors", "config.json", SAMPLES_FILE)
"""The files that serving needs; the rest is for training."""


class DamagedCheckpointError(Exception):
    """A checkpoint is incomplete or does not match its manifest."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Contents:
    """What a checkpoint holds."""

    description: Mapping[str, Any]
    """Of the model, by `describe`."""
    weights: Mapping[str, Tensor]
    """Averaged weights: what is evaluated and served."""
    samples_png: bytes = b""
    """A picture of what they sample."""
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    """What training resumes from, by name."""
    counters: Mapping[str, Any] = field(default_factory=dict)
    """The rest of it, as JSON values."""
    history: Sequence[tuple[int, Mapping[str, float]]] = ()
    """Every report so far: its step and metrics."""


def save(directory: Path, contents: Contents) -> None:
    """Write a checkpoint into an empty folder, made if it is not there; a power cut does not harm it then."""
    resume = directory / "resume"
    resume.mkdir(parents=True)
    save_file(_contiguous(contents.weights), directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(contents.description, indent=2) + "\n")
    (directory / SAMPLES_FILE).write_bytes(contents.samples_png)
    save_file(_contiguous(contents.tensors), resume / "tensors.safetensors")
    (resume / "counters.json").write_text(json.dumps(contents.counters, indent=2) + "\n")
    (resume / "history.json").write_text(json.dumps(contents.history) + "\n")
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    manifest = {path.relative_to(directory).as_posix(): file_sha256(path) for path in files}
    _flush(*files)
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    _flush(directory / MANIFEST, resume, directory, directory.parent)


def _flush(*paths: Path) -> None:
    """Wait until files and folders are on the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def verify(directory: Path, files: tuple[str, ...] | None = None) -> None:
    """Check the files of a checkpoint, or some of them, against its manifest.

    Raises:
        DamagedCheckpointError: naming the first file that is missing or differs.
    """
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
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


def load(directory: Path) -> Contents:
    """Load all of a checkpoint, on the CPU.

    Raises:
        DamagedCheckpointError: if any file is missing or altered.
    """
    verify(directory)
    resume = directory / "resume"
    return Contents(
        description=json.loads((directory / "config.json").read_text()),
        weights=load_file(directory / "model.safetensors"),
        samples_png=(directory / SAMPLES_FILE).read_bytes(),
        tensors=load_file(resume / "tensors.safetensors"),
        counters=json.loads((resume / "counters.json").read_text()),
        history=[(step, metrics) for step, metrics in json.loads((resume / "history.json").read_text())],
    )


def describe(model: Family) -> dict[str, Any]:
    """Tell what builds this model again, and what built it."""
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
