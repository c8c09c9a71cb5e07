"""The table of families: the only place that maps a name to code."""

from collections.abc import Mapping
from typing import Any

import torch

from gdl_ray.families.vae import VAE
from gdl_ray.family import DataSpec, Family, Preset

FAMILIES: Mapping[str, type[Family]] = {"vae": VAE}


def key_of(family: Family) -> str:
    """Look up the name of a family."""
    return {kind: key for key, kind in FAMILIES.items()}[type(family)]


def build(key: str, config: Any, spec: DataSpec, seed: int = 0) -> Family:
    """Make an untrained model whose weights are a function of the seed, on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return FAMILIES[key](config, spec)


def preset(key: str, dataset: str) -> Preset:
    """Choose a family's configuration for a named dataset."""
    return FAMILIES[key].presets[dataset]()
