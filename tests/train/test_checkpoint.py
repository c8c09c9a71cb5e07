"""Checkpoints: read back exactly, refused by name when anything is amiss."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gdl_ray.families import build, preset
from gdl_ray.family import DataSpec
from gdl_ray.train import checkpoint
from gdl_ray.train.checkpoint import Contents, DamagedCheckpointError

SPEC = DataSpec(name="toy", kind="image", shape=(1, 8, 8), levels=17, classes=10)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = build("vae", preset("vae", "digits").model, SPEC)
    tensors = {"weights/a": torch.randn(3, 4).t(), "optimizer/main/0/step": torch.tensor(7.0)}
    contents = Contents(
        description=checkpoint.describe(model),
        weights=model.state_dict(),
        samples_png=b"picture",
        tensors=tensors,
        counters={"step": 1, "best": None},
        history=[(1, {"train/loss": 2.5})],
    )
    checkpoint.save(tmp_path / "step-1", contents)
    return tmp_path / "step-1"


def test_all_contents_are_given_back(saved: Path) -> None:
    contents = checkpoint.load(saved)
    model = build("vae", preset("vae", "digits").model, SPEC)
    assert contents.description == checkpoint.describe(model)
    assert all(torch.equal(contents.weights[name], value) for name, value in model.state_dict().items())
    assert contents.tensors["weights/a"].shape == (4, 3)
    assert contents.tensors["optimizer/main/0/step"] == 7
    assert contents.counters == {"step": 1, "best": None}
    assert contents.history == [(1, {"train/loss": 2.5})]
    assert contents.samples_png == b"picture"


def test_no_file_holds_code(saved: Path) -> None:
    files = {path.relative_to(saved).as_posix() for path in saved.rglob("*") if path.is_file()}
    assert files == {*json.loads((saved / "manifest.json").read_text()), "manifest.json"}
    assert {path.rpartition(".")[2] for path in files} == {"json", "safetensors", "png"}


def _truncate(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def _flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [_truncate, _flip_a_bit, Path.unlink])
@pytest.mark.parametrize(
    "file", ["model.safetensors", "config.json", "resume/tensors.safetensors", "resume/counters.json"]
)
def test_damage_is_refused_by_name(saved: Path, file: str, damage: Callable[[Path], None]) -> None:
    checkpoint.verify(saved)
    damage(saved / file)
    with pytest.raises(DamagedCheckpointError, match=f"{saved}.*{file}"):
        checkpoint.load(saved)
    if file in checkpoint.MODEL_FILES:
        with pytest.raises(DamagedCheckpointError, match=file):
            checkpoint.load_family(saved)
    else:
        checkpoint.load_family(saved)


@pytest.mark.parametrize("damage", [_truncate, Path.unlink])
def test_a_checkpoint_without_its_manifest_is_refused(saved: Path, damage: Callable[[Path], None]) -> None:
    damage(saved / "manifest.json")
    with pytest.raises(DamagedCheckpointError, match="no readable manifest"):
        checkpoint.load_family(saved)


def test_the_commit_of_the_source_is_recorded(saved: Path) -> None:
    commit = json.loads((saved / "config.json").read_text())["git_commit"]
    assert commit == "unknown" or int(commit, 16) >= 0
