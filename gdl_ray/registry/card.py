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
from inspect import getdoc, getmodule
from typing import Any
from urllib.parse import urlencode

from gdl_ray.evaluate.metrics import METRICS, STANDARD_ERROR, standard_error
from gdl_ray.families import key_of
from gdl_ray.family import (
    Completion,
    Decoder,
    Density,
    Family,
    Latent,
    Likelihood,
    LikelihoodKind,
    Unnormalized,
)
from gdl_ray.tracking import RunFacts

LIMIT = 5000
"""Most characters of a description, in the tables of MLflow's databases."""

_NUMBERS = "## Numbers"
_SECTION = re.compile(rf"^{_NUMBERS}\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
_PROTOCOL_LIMIT = 600
_FOLDER = "card"  # of the run's artifacts, where the pictures of cards are
_DENSITIES = {
    Density.TRACTABLE: "explicit and tractable",
    Density.APPROXIMATE: "explicit, and approximated",
    Density.IMPLICIT: "implicit",
}
_LIKELIHOODS = {
    LikelihoodKind.EXACT: "Its log-likelihoods are exact.",
    LikelihoodKind.LOWER_BOUND: "Its log-likelihoods are lower bounds: the true ones are higher, by a gap "
    "that nobody knows, so that a worse bound need not be a worse model.",
    LikelihoodKind.ESTIMATE: "Its log-likelihoods are estimates, which may be too high or too low.",
}

# The page breaks lines where the text does.
_CARD = """\
# {name}, version {version}

{about} Density: {density}. Parameters: {parameters:,}.

![samples]({picture})

## Data

`{data}`: {kind} of shape {shape}, {levels} levels, {classes} classes; \
{splits} examples; sha256 `{digest}...`.

{numbers}
## Intended use

To learn, to compare families of generative models, and to draw examples like those of `{data}`. Not as \
evidence of anything, and not in place of data on which decisions about people rest.

## Limits

{limits}

## Sample it

    curl -sS -X POST http://127.0.0.1:8000/v1/models/{name}@{version}/sample \\
         -d '{{"n": 64, "seed": 7, "format": "png"}}' -o samples.png

    from gdl_ray.client import Client
    x = Client("http://127.0.0.1:8000").sample("{name}@{version}", n=64, seed=7)

It answers {operations}. Options of a sample: {options}.

## Made by

Run `{run}`, commit `{commit}`. The code is under Apache-2.0; for the weights, mind the licence \
of the data too.
"""
_MODEL = """\
{about}

Fitted to `{data}`. Each version has its card, with numbers and limits. The alias `champion` names the \
version that the service answers with: `python -m jobs.promote {name} --if-better METRIC` moves it, and \
`--history` tells when, by whom and why it was moved.
"""


def written(name: str, version: int, family: Family, run: RunFacts, scores: Mapping[str, float]) -> str:
    """Write the card of a version that was registered just now.

    Args:
        name: of the registered model.
        version: its number.
        family: the model.
        run: that trained it.
        scores: what training measured.
    """
    spec = family.spec
    evaluate = f"python -m jobs.evaluate {name}@{version}"
    return _CARD.format(
        name=name,
        version=version,
        about=about(family),
        density=_DENSITIES[family.density],
        parameters=sum(each.numel() for each in family.parameters()),
        picture=_address(run.id, version),
        data=spec.name,
        kind=spec.kind,
        shape="×".join(map(str, spec.shape)),
        levels=spec.levels,
        classes=spec.classes,
        splits=", ".join(f"{count:,} {split}" for split, count in run.splits.items()) or "unknown",
        digest=run.dataset,
        numbers=numbers(scores, f"Measured by the training job; `{evaluate}` measures more."),
        limits="\n".join(f"- {limit}" for limit in _limits(family)),
        operations=", ".join(f"`{each}`" for each in _operations(family)),
        options=", ".join(f"`{option}`" for option in family.sampler().options) or "none",
        run=run.name,
        commit=run.tags.get("git_commit", "unknown")[:12],
    )


def of_model(name: str, family: Family) -> str:
    """Describe a registered model, whose versions have a card each."""
    return _MODEL.format(about=about(family), data=family.spec.name, name=name)


def about(family: Family) -> str:
    """Say in a sentence what a family is: the first line of its own file."""
    text = getdoc(getmodule(type(family)) or type(family)) or f"{key_of(family)}."
    return text.splitlines()[0]


def _address(run_id: str, version: int) -> str:
    """Address of the picture, from where MLflow's pages are."""
    return f"get-artifact?{urlencode({'path': f'{_FOLDER}/{_picture(version)}', 'run_uuid': run_id})}"


def _picture(version: int) -> str:
    return f"samples-v{version}.png"


def pictures(version: int, samples_png: bytes) -> tuple[str, dict[str, bytes]]:
    """Name the folder and the files among the run's artifacts that the card shows."""
    return _FOLDER, {_picture(version): samples_png}


def _limits(family: Family) -> Iterator[str]:
    if isinstance(family, Likelihood):
        yield _LIKELIHOODS[family.likelihood_kind]
    else:
        yield "It has no likelihood: whether it covers the data is told by recall and coverage alone."
    if isinstance(family, Unnormalized):
        yield "It knows p(x) up to a constant: trust differences of log-likelihoods more than their values."
    sampler = family.sampler()
    steps = sampler.steps_of({name: option.default for name, option in sampler.options.items()})
    yield f"A sample takes {steps} step{'s, one after the other' if steps > 1 else ''}."
    if not isinstance(family, Latent):
        yield "It does not encode examples."
    if not isinstance(family, Completion):
        yield "It does not complete parts of examples."
    yield "It knows its data and nothing else, and may repeat training examples: see `samples/copied_share`."


def _operations(family: Family) -> Iterator[str]:
    """Name what the service answers for a family."""
    yield "sample"
    if isinstance(family, Completion):
        yield "complete"
    if isinstance(family, Likelihood):
        yield from ("log_likelihood", "classify") if family.spec.classes else ("log_likelihood",)
    if isinstance(family, Latent):
        yield from ("encode", "interpolate")
    if isinstance(family, Decoder):
        yield "decode"


def evaluated(record: Mapping[str, Any]) -> str:
    """Write the section of numbers of an evaluation, whose record is as `write_evaluation` takes it."""
    protocol = textwrap.shorten(", ".join(flat(record["protocol"])), _PROTOCOL_LIMIT, placeholder=" ...")
    return numbers(
        record["metrics"],
        f"Measured under protocol `{record['protocol_digest']}`: {protocol}. Numbers of another one do not "
        "compare. The run has the record in `evaluation/`; the experiment's note says what each metric is.",
    )


def numbers(metrics: Mapping[str, float], note: str) -> str:
    """Write the section of numbers, and how they were measured."""
    head = [_NUMBERS, "", "| metric | value | better |", "|---|---|---|"]
    return "\n".join([*(head if metrics else head[:2]), *_rows(metrics), "", note, ""])


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
