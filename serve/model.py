"""One version of a registered model, ready to answer: its family, its engines and its card."""

import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch

from gdl_ray import registry
from gdl_ray.engine import Engine, Load
from gdl_ray.families import key_of
from gdl_ray.family import UNLABELLED, Completion, Decoder, Family, Latent, Likelihood
from gdl_ray.train.checkpoint import load_family
from serve import requests
from serve.encoding import formats

OPERATIONS: Mapping[str, Callable[[Family], bool]] = {
    "sample": lambda family: True,
    "complete": lambda family: isinstance(family, Completion),
    "log_likelihood": lambda family: isinstance(family, Likelihood),
    "classify": lambda family: isinstance(family, Likelihood) and family.spec.classes > 1,
    "encode": lambda family: isinstance(family, Latent),
    "decode": lambda family: isinstance(family, Decoder),
    "interpolate": lambda family: isinstance(family, Decoder),
}
"""What may be asked of a model, and whether its family can."""


class Model:
    """A version, with an engine that draws its samples and, once any is asked for, one for completions.

    Args:
        name: of the registered model.
        version: its number.
        family: in evaluation mode.
        engine: over the family.
    """

    def __init__(self, name: str, version: int, family: Family, engine: Engine) -> None:
        self.name, self.version, self.family, self.engine = name, version, family, engine
        self._completing: Engine | None = None
        self._lock = threading.Lock()

    @property
    def operations(self) -> list[str]:
        """What may be asked of it."""
        return [name for name, able in OPERATIONS.items() if able(self.family)]

    def completing(self) -> Engine:
        """Give the engine that completes examples."""
        with self._lock:
            if self._completing is None:
                self._completing = Engine(self.family, completes=True)
            return self._completing

    @property
    def loads(self) -> dict[str, Load]:
        """How busy each engine is."""
        engines = {"sample": self.engine, "complete": self._completing}
        return {name: engine.load for name, engine in engines.items() if engine}

    def close(self, drain: bool = True) -> None:
        """Take no more work and end the engines, after what they hold (`drain`); blocks."""
        for engine in filter(None, (self.engine, self._completing)):
            engine.close(drain=drain)

    def card(self) -> dict[str, Any]:
        """Describe the model: what it is and what may be asked of it."""
        family = self.family
        return {
            "name": self.name,
            "version": self.version,
            "family": key_of(family),
            "density": family.density,
            "likelihood": family.likelihood_kind if isinstance(family, Likelihood) else None,
            "operations": self.operations,
            "options": {name: asdict(option) for name, option in self.engine.options.items()},
            "formats": formats(family.spec),
            "data": family.spec.to_json(),
            "parameters": sum(parameter.numel() for parameter in family.parameters()),
            "limits": {
                "n": requests.MAX_SAMPLES,
                "draws": requests.MAX_DRAWS,
                "timeout_s": requests.MAX_TIMEOUT_S,
                "sample_body_bytes": requests.SAMPLE_BODY_BYTES,
                "examples_body_bytes": requests.EXAMPLES_BODY_BYTES,
            },
            "load": {name: asdict(load) for name, load in self.loads.items()},
        }


def load(name: str, version: int) -> Model:
    """Fetch a version from the registry and make it ready to answer; blocks.

    Raises:
        registry.RegistryUnavailable: the registry does not answer.
    """
    family = load_family(registry.fetch(name, version))
    if torch.cuda.is_available():
        family = family.cuda()
    engine = Engine(family)
    try:
        # The first sample is slower than all others: better ours than a user's.
        engine.submit(torch.tensor([0]), torch.tensor([UNLABELLED])).future.result()
    except Exception:
        engine.close(drain=False)
        raise
    return Model(name, version, family, engine)
