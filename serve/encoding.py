"""Samples as files: a grid of pictures, arrays, nested lists, or an archive of pictures."""

import io
import json
import math
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args
from urllib.parse import quote

import numpy as np
import torch
from numpy.typing import NDArray

from gdl_ray.family import DataSpec
from gdl_ray.images import png, png_grid

Format = Literal["png", "npy", "npz", "json", "zip"]
PICTURES: tuple[Format, ...] = ("png", "zip")
MEDIA_TYPES: Mapping[Format, str] = {
    "png": "image/png",
    "npy": "application/x-npy",
    "npz": "application/x-npz",
    "json": "application/json",
    "zip": "application/zip",
}


@dataclass(frozen=True, slots=True)
class Samples:
    """Samples, and all that it takes to make them again."""

    x: NDArray[Any]
    """uint8 (n, C, H, W) or int64 (n, T)."""
    model: str
    version: int
    seed: int | None
    """Of the request; None if it gave a seed for each sample, or needs none."""
    seeds: NDArray[np.int64] | None
    """Of each sample, (n,); None where nothing was drawn."""
    labels: NDArray[np.int64]
    """Class of each sample, (n,); -1 for any."""
    options: Mapping[str, float]
    """A value of each option that the model has."""

    @property
    def origin(self) -> dict[str, Any]:
        """All but the samples, as JSON values."""
        return {
            "model": self.model,
            "version": self.version,
            "n": len(self.x),
            "seed": self.seed,
            "seeds": None if self.seeds is None else self.seeds.tolist(),
            "labels": [None if label < 0 else label for label in self.labels.tolist()],
            "options": dict(self.options),
        }

    @property
    def headers(self) -> dict[str, str]:
        """What of the origin fits into a response's headers."""
        # MLflow lets names have letters that headers have not.
        told = {"model": quote(self.model), "version": self.version, "n": len(self.x), "seed": self.seed}
        if len(self.labels) and (self.labels == self.labels[0]).all() and self.labels[0] >= 0:
            told["label"] = int(self.labels[0])
        told |= self.options
        return {f"X-{name.title()}": f"{value}" for name, value in told.items() if value is not None}


@cache
def formats(spec: DataSpec) -> tuple[Format, ...]:
    """List the encodings that suit data, the default first: pictures are of 1 or 3 channels."""
    drawable = spec.kind == "image" and spec.shape[0] in (1, 3)
    return tuple(known for known in get_args(Format) if drawable or known not in PICTURES)


def accepted_format(accept: str, suitable: Sequence[Format]) -> Format:
    """Find the first suitable encoding that an Accept header names; where it names none, the first of all."""
    for entry in accept.split(","):
        media_type = entry.partition(";")[0].strip().lower()
        for name in suitable:
            if media_type == MEDIA_TYPES[name]:
                return name
    return suitable[0]


def finite(value: Any) -> Any:
    """Put null for numbers that JSON cannot say, such as log p(x) = -infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return {key: finite(each) for key, each in value.items()} if isinstance(value, dict) else value


def encode(samples: Samples, encoding: Format, levels: int) -> bytes:
    """Encode samples, one or more.

    Args:
        samples: images of 1 or 3 channels for png and zip.
        encoding: of the result; png and zip scale values to 0..255, the others leave them alone.
        levels: values lie in [0, levels - 1].
    """
    if encoding == "png":
        return png_grid(torch.from_numpy(samples.x), levels)
    if encoding == "json":
        return json.dumps({**samples.origin, "samples": samples.x.tolist()}).encode()
    stream = io.BytesIO()
    if encoding == "npy":
        np.save(stream, samples.x, allow_pickle=False)
    elif encoding == "npz":
        np.savez_compressed(stream, allow_pickle=False, samples=samples.x, **_arrays(samples))
    else:
        _write_zip(stream, samples, levels)
    return stream.getvalue()


def _arrays(samples: Samples) -> dict[str, NDArray[Any]]:
    """Give the origin as arrays; -1 for a seed that there is not."""
    return {
        "seeds": np.full(len(samples.x), -1) if samples.seeds is None else samples.seeds,
        "labels": samples.labels,
        "model": np.asarray(samples.model),
        "version": np.asarray(samples.version),
        "seed": np.asarray(-1 if samples.seed is None else samples.seed),
        **{f"option_{name}": np.asarray(value) for name, value in samples.options.items()},
    }


def _write_zip(stream: io.BytesIO, samples: Samples, levels: int) -> None:
    """Write a PNG for each sample, of its own size, and the origin."""
    with zipfile.ZipFile(stream, "w") as archive:  # not compressed again: PNGs are
        for i, image in enumerate(torch.from_numpy(samples.x)):
            archive.writestr(f"{i:04d}.png", png(image, levels))
        archive.writestr("samples.json", json.dumps(samples.origin, indent=1))
