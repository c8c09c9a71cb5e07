"""Which registered version a command means, and its model."""

import re

from gdl_ray import registry
from gdl_ray.family import Family
from gdl_ray.train.checkpoint import DamagedCheckpointError, load_family
from jobs.options import UsageError


def resolve(reference: str) -> tuple[str, int]:
    """Find the version that NAME, NAME@NUMBER or NAME@ALIAS means.

    Raises:
        UsageError: if there is none.
        RegistryUnavailable: if MLflow does not answer.
    """
    name, _, which = reference.partition("@")
    models = registry.registered()
    if name not in models:
        raise UsageError(
            f"no model {name!r} is registered: choose from {', '.join(sorted(models)) or 'none yet'}"
        )
    if re.fullmatch(r"\d{1,9}", which, re.ASCII):
        if not registry.exists(name, int(which)):
            raise UsageError(f"{name} has no version {which}; the newest is {models[name].latest}")
        return name, int(which)
    aliases = models[name].aliases
    version = aliases.get(which or registry.CHAMPION)
    if version is None:
        known = ", ".join(f"{name}@{alias}" for alias in sorted(aliases)) or "none"
        raise UsageError(
            f"{name} has no alias {which or registry.CHAMPION!r}: its aliases are {known}; "
            f"{name}@{models[name].latest} is its newest version"
        )
    return name, version


def open_model(name: str, version: int) -> Family:
    """Load a version, which an alias may name that was deleted since.

    Raises:
        UsageError: if there is none, or its files are damaged.
        RegistryUnavailable: if MLflow does not answer.
    """
    try:
        return load_family(registry.fetch(name, version))
    except registry.VersionNotFound as error:
        raise UsageError(f"{error}: name another, as {name}@NUMBER, or move the alias") from error
    except DamagedCheckpointError as error:
        raise UsageError(f"{name}@{version}: {error}; name another version") from error
