"""The table of families: the only place that maps a name to code."""

from collections.abc import Mapping
from typing import Any

import torch

from gdl_ray.families.vae import VAE
from gdl_ray.family import DataSpec, Family, Preset

FAMILIES: Mapping[str, type[Family]] = {"vae": VAE}


def key_of(family: Family) -> str:
    """Look up the name of a family."""
    return next(key for key, kind in FAMILIES.items() if type(family) is kind)


def build(key: str, config: Any, spec: DataSpec, seed: int = 0) -> Family:
    """Make an untrained model whose weights are a function of the seed, on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return FAMILIES[key](config, spec)


def preset(key: str, spec: DataSpec) -> Preset:
    """Choose a family's configuration for a dataset: the one of that name, else of the nearest size."""
    presets = FAMILIES[key].presets
    if spec.name in presets:
        return presets[spec.name]()
    return presets["digits" if spec.dims <= 256 else "mnist"]()
