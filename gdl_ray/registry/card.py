"""Model cards: the Markdown that MLflow shows on the page of a version.

A card is written when the version is registered. What is measured later replaces its section of numbers, and
leaves the others as they are, for people may have written there.

References:
    Mitchell et al. Model Cards for Model Reporting. 2019. https://arxiv.org/abs/1810.03993
"""

import math
import re
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from gdl_ray.evaluate.metrics import METRICS, STANDARD_ERROR, standard_error

LIMIT = 5000
"""Most characters of a description, in the tables of MLflow's databases."""

_NUMBERS = "## Numbers"
_SECTION = re.compile(rf"^{_NUMBERS}\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
_PROTOCOL_LIMIT = 600


def numbers(record: Mapping[str, Any]) -> str:
    """Write the section of numbers.

    Args:
        record: of an evaluation, as `write_evaluation` takes it.
    """
    protocol = textwrap.shorten(", ".join(flat(record["protocol"])), _PROTOCOL_LIMIT, placeholder=" ...")
    return "\n".join(
        [
            _NUMBERS,
            "",
            "| metric | value | better |",
            "|---|---|---|",
            *_rows(record["metrics"]),
            "",
            f"Measured under protocol `{record['protocol_digest']}`: {protocol}.",
            "Numbers of another protocol do not compare. The run has the record, below `evaluation/`; the "
            "experiment's note says what each metric is.",
            "",
        ]
    )


def _rows(metrics: Mapping[str, float]) -> Iterator[str]:
    """Write a row for each metric, in the order of the table METRICS; those it does not know come last."""
    order = {name: place for place, name in enumerate(METRICS)}
    for name in sorted(metrics, key=lambda name: (order.get(name, len(order)), name)):
        if name.endswith(STANDARD_ERROR):
            continue
        known = METRICS.get(name)
        value = spelled(metrics[name], metrics.get(standard_error(name)))
        unit = f" {known.unit}" if known and known.unit else ""
        yield f"| {name} | {value}{unit} | {known.better if known and known.better != 'neither' else ''} |"


def spelled(value: float, error: float | None = None) -> str:
    """Write a value, to two digits of its standard error where it has one: 1.842 ± 0.0051."""
    if error and math.isfinite(error) and math.isfinite(value):
        places = max(0, 1 - math.floor(math.log10(error)))
        return f"{value:,.{places}f} ± {error:.{places}f}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def flat(protocol: Mapping[str, Any], above: str = "") -> Iterator[str]:
    """List the fields of a protocol as `samples.count=10000`, by name."""
    for name, value in sorted(protocol.items()):
        if isinstance(value, Mapping):
            yield from flat(value, f"{above}{name}.")
        else:
            yield f"{above}{name}={value}"


def with_numbers(card: str, section: str) -> str:
    """Put a section of numbers in place of the card's own, or at its end where it has none."""
    if _SECTION.search(card):
        return _SECTION.sub(lambda _: f"{section}\n", card, count=1).rstrip() + "\n"
    return f"{card.rstrip()}\n\n{section}".lstrip()
