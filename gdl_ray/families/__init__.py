"""The table of families: the only place that maps a name to code."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from gdl_ray.families.autoregressive import Autoregressive
from gdl_ray.families.diffusion import Diffusion
from gdl_ray.families.energy import Energy
from gdl_ray.families.flow import Flow
from gdl_ray.families.gan import GAN
from gdl_ray.families.hierarchical import Hierarchical
from gdl_ray.families.vae import VAE
from gdl_ray.family import DataSpec, Family, Preset

FAMILIES: Mapping[str, type[Family]] = {
    "autoregressive": Autoregressive,
    "flow": Flow,
    "vae": VAE,
    "energy": Energy,
    "diffusion": Diffusion,
    "hierarchical": Hierarchical,
    "gan": GAN,
}


def key_of(family: Family) -> str:
    """Look up the name of a family."""
    return {kind: key for key, kind in FAMILIES.items()}[type(family)]


def build(key: str, config: Any, spec: DataSpec, seed: int = 0) -> Family:
    """Make an untrained model whose weights are a function of the seed, on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return FAMILIES[key](config, spec)


def preset(key: str, dataset: str, size: float = 1.0) -> Preset:
    """Choose a family's configuration for a named dataset.

    Args:
        key: of the family.
        dataset: one of its presets.
        size: what to multiply the width and the depth of its network by, above 0.
    """
    kind = FAMILIES[key]
    chosen = kind.presets[dataset]()
    if size == 1:  # as it is written, also where a width is no multiple of 8
        return chosen
    fields = dict.fromkeys(kind.widths, 8) | dict.fromkeys(kind.depths, 1)
    scaled = {
        name: max(unit, unit * round(getattr(chosen.model, name) * size / unit))
        for name, unit in fields.items()
    }
    return replace(chosen, model=replace(chosen.model, **scaled))
