"""Which of several models draws the best samples: one order, by one rule.

Models that repeat their training split have no place: by every distance, copies are as good as data. The
others are ordered by the kernel distance: it sees what samples lack as well as what they have too much, it
has not the Frechet distance's bias, which shrinks with the number of samples, and it has an error, which
tells which differences are none.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Standing:
    """What a model is ranked by; all with the same features, data and number of samples."""

    distance: float
    """Kernel distance; less is better."""
    error: float
    """Its standard error."""
    is_memorised: bool
    """Whether its samples are copies."""


def rank(rows: Mapping[str, Standing]) -> list[tuple[int | None, str]]:
    """Order models from the best to the worst.

    Returns:
        Place, from 1, and name. A model within two standard errors of the first at a place shares that place.
        Models whose samples are copies follow, in order of their names, without a place.
    """
    placed: list[tuple[int | None, str]] = []
    ranked = sorted(name for name in rows if not rows[name].is_memorised)
    leader, place = "", 1
    for number, name in enumerate(sorted(ranked, key=lambda name: rows[name].distance), start=1):
        if not leader or _is_worse(rows[name], rows[leader]):
            leader, place = name, number
        placed.append((place, name))
    return placed + [(None, name) for name in sorted(rows.keys() - set(ranked))]


def _is_worse(row: Standing, than: Standing) -> bool:
    return row.distance - than.distance > 2 * math.hypot(row.error, than.error)
