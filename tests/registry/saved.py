"""A checkpoint to register."""

from pathlib import Path

from gdl_ray.data import Dataset
from gdl_ray.families import build, preset
from gdl_ray.train import checkpoint
from gdl_ray.train.validation import sample_grid


def saved(digits: Dataset, folder: Path, seed: int = 0) -> Path:
    """Save an untrained model of the digits; returns the folder."""
    model = build("vae", preset("vae", "digits").model, digits.spec, seed).eval()
    contents = checkpoint.Contents(
        description=checkpoint.describe(model), weights=model.state_dict(), samples_png=sample_grid(model)
    )
    checkpoint.save(folder, contents)
    return folder
