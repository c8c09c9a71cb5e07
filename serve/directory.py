"""What the operator knows of the registry, as it is sent to every replica."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from gdl_ray.registry import CHAMPION
from serve.problems import Problem


@dataclass(frozen=True, slots=True)
class Entry:
    """A registered model."""

    aliases: Mapping[str, int]
    """Versions by alias."""
    tags: Mapping[str, str] = field(default_factory=dict)
    description: Mapping[str, Any] = field(default_factory=dict)
    """Run, time and scores of the champion."""
    served: Mapping[int, int] = field(default_factory=dict)
    """How many replicas hold each version."""
    failure: str | None = None
    """Why the champion does not answer; None if it does."""
    own: bool = False
    """Whether it has an application of its own."""

    @property
    def champion(self) -> int | None:
        """The version that answers requests which name none."""
        return self.aliases.get(CHAMPION)


@dataclass(frozen=True, slots=True)
class Directory:
    """The registered models, and who may ask for them."""

    entries: Mapping[str, Entry] = field(default_factory=dict)
    failure: str | None = "the registry has not answered yet"
    """Why this may be out of date; None while the registry answers."""
    keys: tuple[Mapping[str, Any], ...] = ()
    """Records of the API keys."""
    replicas: int = 1
    """How many replicas share a key's rate limit."""
    hook_secret: str = ""
    """Signs the registry's events; empty where it sends none."""
    serial: int = 0
    """Counts changes; 0 while the registry has not answered."""

    def version(self, name: str, reference: str) -> int:
        """Find the version that a request means: a number, an alias, or the champion if empty.

        Raises:
            Problem: 404, there is no such model or alias; 503, the registry has not answered yet.
        """
        entry = self.entries.get(name)
        if entry is None:
            raise self.unknown(name)
        if reference.isascii() and reference.isdigit() and len(reference) < 10:
            return int(reference)
        version = entry.aliases.get(reference or CHAMPION)
        if version is None:
            raise _no_alias(name, reference, entry)
        return version

    def unknown(self, name: str) -> Problem:
        """Make the answer to a request for a model that there is not."""
        if not self.serial:
            return Problem(
                HTTPStatus.SERVICE_UNAVAILABLE,
                "not-loaded",
                f"What models there are is not known yet: {self.failure}.",
                headers={"Retry-After": "2"},
            )
        known = f"there are {', '.join(sorted(self.entries))}" if self.entries else "none is registered yet"
        return Problem(
            HTTPStatus.NOT_FOUND, "unknown-model", f"There is no model {name!r}: {known}. See /v1/models."
        )


def _no_alias(name: str, reference: str, entry: Entry) -> Problem:
    known = ", ".join(f"{name}@{alias}" for alias in sorted(entry.aliases)) or "none"
    cure = f"its aliases are: {known}; a number names a version, such as {name}@1."
    detail = f"{name} has no alias {reference!r}: {cure}"
    if not reference:
        detail = f"{name} has no champion, the version that answers unless another is named: {cure}"
    return Problem(HTTPStatus.NOT_FOUND, "unknown-version", detail)
