"""Registered models and their versions in MLflow: `{dataset}-{family}`.

A version holds the files of a checkpoint that serving needs, beside the code that reads them: safetensors,
JSON, no pickle. The alias `champion` names the version that is served.
"""

from gdl_ray.registry.evaluations import read_evaluation, run_of, write_evaluation
from gdl_ray.registry.events import EVENTS, MAX_AGE_S, hook, signed
from gdl_ray.registry.extractors import CLASSIFIER, extractor, fitted_with, register_classifier
from gdl_ray.registry.model import GenerativeModel, set_model, signature
from gdl_ray.registry.registration import Version, register, registered_by
from gdl_ray.registry.versions import (
    CHAMPION,
    KIND,
    SCORES,
    Registered,
    VersionNotFound,
    describe,
    exists,
    fetch,
    model_name,
    page,
    registered,
)
from gdl_ray.tracking import RegistryUnavailable, RunFacts, history

__all__ = [
    "CHAMPION",
    "CLASSIFIER",
    "EVENTS",
    "KIND",
    "MAX_AGE_S",
    "SCORES",
    "GenerativeModel",
    "Registered",
    "RegistryUnavailable",
    "RunFacts",
    "Version",
    "VersionNotFound",
    "describe",
    "exists",
    "extractor",
    "fetch",
    "fitted_with",
    "history",
    "hook",
    "model_name",
    "page",
    "read_evaluation",
    "register",
    "register_classifier",
    "registered",
    "registered_by",
    "run_of",
    "set_model",
    "signature",
    "signed",
    "write_evaluation",
]
