"""What is asked over HTTP: typed bodies, and the checks that need to know the model."""

import asyncio
import json
import secrets
from collections.abc import AsyncIterable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Annotated, Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from gdl_ray.engine import seeds_of
from gdl_ray.family import UNLABELLED, DataSpec, Option
from serve.encoding import Format, accepted_format, formats
from serve.problems import FieldProblem, Problem, invalid, wrong

MAX_SAMPLES = 1024
"""Most samples of one request."""
MAX_DRAWS = 65_536
"""Most examples times Monte-Carlo samples of one request, and times classes where it asks for them all."""
MAX_SEED = 2**53 - 1
"""Largest integer that every JSON reader holds exactly."""
MIN_TIMEOUT_S, MAX_TIMEOUT_S = 0.1, 600.0
MAX_FIELDS = 50
SAMPLE_BODY_BYTES = 2**20
EXAMPLES_BODY_BYTES = 2**24
BIG_BODY_BYTES = 2**16

Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
Label = Annotated[int, Field(ge=0)]
Labels = Annotated[list[Label | None], Field(min_length=1, max_length=MAX_DRAWS, fail_fast=True)]
"""A class for each; null for any."""
Examples = Annotated[list[Any], Field(min_length=1)]


class Body(BaseModel):
    """Exact types, no unknown fields: a typing error is answered, not guessed at."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    timeout_s: float = Field(
        default=60.0,
        ge=MIN_TIMEOUT_S,
        le=MAX_TIMEOUT_S,
        description="Longest wait for the answer; after it, 504.",
    )

    @model_validator(mode="before")
    @classmethod
    def _few(cls, fields: Any) -> Any:
        """Refuse a flood of fields, each of which would be answered."""
        if isinstance(fields, dict) and len(fields) > MAX_FIELDS:
            raise ValueError(f"{len(fields)} fields; a body has at most {MAX_FIELDS}")
        return fields


class Drawing(Body):
    """A body that asks for samples; further fields are the options of the model: its card lists them."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)
    __pydantic_extra__: dict[str, float] = Field(init=False)

    seed: Seed | None = Field(
        default=None, description="The same seed and model version give the same samples; random if left out."
    )
    seeds: list[Seed] | None = Field(
        default=None,
        min_length=1,
        max_length=MAX_SAMPLES,
        fail_fast=True,
        description="A seed for each sample instead: those that an answer named give its samples again.",
    )
    label: Label | None = Field(default=None, description="The class of all samples; any if left out.")
    format: Format | None = Field(
        default=None, description="Encoding of the answer; by the Accept header, else png, if left out."
    )
    stream: bool = Field(
        default=False, description="Answer with server-sent events: previews, then the samples."
    )

    @property
    def options(self) -> dict[str, float]:
        """What is asked of the model's own options."""
        return self.__pydantic_extra__


class SampleRequest(Drawing):
    """Body of `sample`; an empty body asks for the defaults.

    Further fields are the options of the model, such as `guidance` or `steps`: its card lists them.
    """

    n: int | None = Field(
        default=None, ge=1, le=MAX_SAMPLES, description="How many; as many as seeds or labels, else 16."
    )
    labels: Labels | None = Field(
        default=None, max_length=MAX_SAMPLES, description="A class for each sample."
    )


class CompleteRequest(Drawing):
    """Body of `complete`: draw what is not known of examples. Further fields are the options of the model."""

    x: Examples = Field(
        description="Examples, integers of the shape (B, C, H, W) or (B, T); unknown values are not read."
    )
    known: Examples = Field(
        description="What is known: booleans of the shape of one example, for all, or of x."
    )
    n: int = Field(default=1, ge=1, le=MAX_SAMPLES, description="How many completions of each example.")
    labels: Labels | None = Field(default=None, description="A class for each example.")


class LikelihoodRequest(Body):
    """Body of `log_likelihood`."""

    x: Examples = Field(description="Examples: nested lists of integers, shape (B, C, H, W) or (B, T).")
    labels: Labels | None = Field(default=None, description="A class per example; log p(x) without.")
    samples: int = Field(default=1, ge=1, le=1000, description="Monte-Carlo samples per example.")
    seed: Seed = Field(default=0, description="Decides the noise of the estimate.")


class ClassifyRequest(Body):
    """Body of `classify`."""

    x: Examples = Field(description="Examples: nested lists of integers, shape (B, C, H, W) or (B, T).")
    samples: int = Field(default=1, ge=1, le=1000, description="Monte-Carlo samples per example and class.")
    seed: Seed = Field(default=0, description="Decides the noise of the estimate.")


class EncodeRequest(Body):
    """Body of `encode`."""

    x: Examples = Field(description="Examples: nested lists of integers, shape (B, C, H, W).")
    labels: Labels | None = Field(default=None, description="A class per example, where it is known.")


class DecodeRequest(Body):
    """Body of `decode`."""

    z: Examples = Field(description="Latents: nested lists of numbers, shape (B, D).")
    labels: Labels | None = Field(default=None, description="A class per latent; any without.")
    format: Format | None = Field(default=None, description="Encoding of the answer, as of samples.")


class InterpolateRequest(Body):
    """Body of `interpolate`: give two examples, where the model can encode them, or two latents."""

    x: Examples | None = Field(default=None, description="Two examples: integers, shape (2, C, H, W).")
    z: Examples | None = Field(default=None, description="Or two latents: numbers, shape (2, D).")
    label: Label | None = Field(default=None, description="The class on the way; any if left out.")
    steps: int = Field(default=8, ge=2, le=64, description="How many on the way, both ends among them.")
    format: Format | None = Field(default=None, description="Encoding of the answer, as of samples.")


async def read_body(chunks: AsyncIterable[bytes], limit_bytes: int) -> bytes:
    """Read a request body.

    Raises:
        Problem: 413, the body is longer than `limit_bytes`.
    """
    body = bytearray()
    length = 0
    async for chunk in chunks:
        length += len(chunk)
        if length <= limit_bytes:
            body += chunk
        # The rest is read and dropped, up to a point: many clients listen only after they have sent it all.
        elif length > 8 * limit_bytes + EXAMPLES_BODY_BYTES:
            break
    if length > limit_bytes:
        detail = f"The body is longer than the {limit_bytes} bytes that this operation takes."
        raise Problem(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "body-too-large", detail)
    return bytes(body)


Parsed = TypeVar("Parsed", bound=Body)


def parse(request: type[Parsed], body: bytes) -> Parsed:
    """Read a request from JSON, whatever content type was declared: plain `curl -d` declares a form.

    Raises:
        Problem: 422, naming each wrong field, its value and the cure.
    """
    try:
        return request.model_validate_json(body or b"{}")
    except ValidationError as error:
        unknown = f"Unknown field; known are {', '.join(request.model_fields)}"
        raise invalid(
            *(
                FieldProblem(
                    field=_brief(".".join(map(str, one["loc"]))) or "body",
                    value=_brief(one["input"]),
                    cure=unknown if one["type"] == "extra_forbidden" else one["msg"],
                )
                for one in error.errors(include_url=False)
            )
        ) from None


async def read(kind: type[Parsed], body: bytes) -> Parsed:
    """Read a request as `parse` does; a long one on a thread, so that others are answered meanwhile."""
    if len(body) < BIG_BODY_BYTES:
        return parse(kind, body)
    return await asyncio.to_thread(parse, kind, body)


def _brief(value: object) -> str:
    """Show a value of a request in a line."""
    if isinstance(value, bytes):  # a body that is not JSON
        value = value.decode(errors="replace")
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."


@dataclass(frozen=True, slots=True)
class Draw:
    """Which samples to draw."""

    seed: int | None
    """Of the request; None if it gave a seed for each sample."""
    seeds: Tensor
    """Of each sample, int64 (n,)."""
    labels: Tensor
    """Class of each sample, int64 (n,); UNLABELLED for any."""


def draw_of(asked: SampleRequest, spec: DataSpec) -> Draw:
    """Settle how many samples are asked for, of which seeds and classes.

    Raises:
        Problem: 422, the fields contradict each other, or a label is no class of the data.
    """
    lists = {"seeds": asked.seeds, "labels": asked.labels}
    lengths = {name: len(given) for name, given in lists.items() if given is not None}
    n = asked.n or next(iter(lengths.values()), 16)
    for name, length in lengths.items():
        if length != n:
            raise wrong(name, f"{length} values", f"Give one for each of the {n} samples")
    seed, seeds = _seeds(asked, n)
    return Draw(seed, seeds, _labels(asked.label, asked.labels, n, spec))


def completions_of(asked: CompleteRequest, spec: DataSpec) -> tuple[Draw, Tensor, Tensor]:
    """Settle which completions are asked for: those of an example follow each other.

    Returns:
        The draw, examples as in Batch, and which of their values are known, bool; one row a completion.

    Raises:
        Problem: 422, the fields contradict each other, or are not of the model's data.
    """
    known = _mask(asked.known, spec.shape)
    x = examples(_blanked(asked.x, known), spec)
    if len(known) not in (1, len(x)):
        raise wrong("known", f"{len(known)} masks", f"Give one for all, or one for each of {len(x)} examples")
    n = len(x) * asked.n
    if n > MAX_SAMPLES:
        raise wrong("n", asked.n, f"{len(x)} examples take at most {MAX_SAMPLES // len(x)} completions each")
    if asked.seeds is not None and len(asked.seeds) != n:
        raise wrong("seeds", f"{len(asked.seeds)} values", f"Give one for each of the {n} completions")
    seed, seeds = _seeds(asked, n)
    labels = _labels(asked.label, asked.labels, len(x), spec).repeat_interleave(asked.n)
    known = known.expand_as(x).repeat_interleave(asked.n, 0)
    return Draw(seed, seeds, labels), x.repeat_interleave(asked.n, 0), known


def _seeds(asked: Drawing, n: int) -> tuple[int | None, Tensor]:
    if asked.seeds is not None:
        if asked.seed is not None:
            raise wrong("seed", asked.seed, "Give seed or seeds, not both")
        return None, torch.tensor(asked.seeds)
    seed = secrets.randbelow(MAX_SEED + 1) if asked.seed is None else asked.seed
    return seed, seeds_of(seed, n)


def _labels(label: int | None, labels: list[int | None] | None, n: int, spec: DataSpec) -> Tensor:
    if labels is not None and label is not None:
        raise wrong("label", label, "Give label or labels, not both")
    if labels is not None:
        return labels_of(labels, n, spec)
    return torch.full((n,), _class(label, spec, "label"))


def labels_of(labels: list[int | None] | None, n: int, spec: DataSpec) -> Tensor:
    """Turn the labels of n examples into a tensor: int64 (n,), UNLABELLED without one.

    Raises:
        Problem: 422, there are more or fewer than examples, or one is no class of the data.
    """
    if labels is None:
        return torch.full((n,), UNLABELLED)
    if len(labels) != n:
        raise wrong("labels", f"{len(labels)} labels", f"Give one for each of the {n}, or none at all")
    return torch.tensor([_class(label, spec, "labels") for label in labels])


def _class(label: int | None, spec: DataSpec, field: str) -> int:
    """Check that a label is a class of the data; UNLABELLED for none."""
    if label is None:
        return UNLABELLED
    if label >= spec.classes:
        cure = f"Give a class from 0 to {spec.classes - 1}"
        raise wrong(field, label, cure if spec.classes else "This model has no classes; leave it out")
    return label


def check_options(asked: Drawing, options: Mapping[str, Option]) -> None:
    """Check that a request sets options that the model has, to values in their range.

    Raises:
        Problem: 422, naming each that is unknown or out of range.
    """
    problems = []
    for name, value in asked.options.items():
        if name not in options:
            known = [*type(asked).model_fields, *options]
            cure = f"Unknown field; this model knows {', '.join(known)}"
            problems.append(FieldProblem(field=name, value=f"{value:g}", cure=cure))
            continue
        try:
            options[name].check(name, value)
        except ValueError as error:
            problems.append(FieldProblem(field=name, value=f"{value:g}", cure=str(error)))
    if problems:
        raise invalid(*problems)


def format_of(asked: Format | None, accept: str, spec: DataSpec) -> Format:
    """Settle the encoding of samples: as asked, else by the Accept header, else the first that suits.

    Raises:
        Problem: 422, the one asked for does not suit the data.
    """
    suitable = formats(spec)
    encoding = asked or accepted_format(accept, suitable)
    if encoding not in suitable:
        cure = f"Ask for {', '.join(suitable)}: these samples are not images of 1 or 3 channels"
        raise wrong("format", encoding, cure)
    return encoding


def check_draws(examples: int, samples: int, classes: int = 1) -> None:
    """Check that an estimate is not too long a work.

    Raises:
        Problem: 422, it is.
    """
    if examples * samples * classes > MAX_DRAWS:
        most = MAX_DRAWS // (examples * classes)
        cure = f"Send fewer examples or ask for fewer: {examples} examples take at most {most}"
        raise wrong("samples", samples, cure)


def examples(x: list[Any], spec: DataSpec) -> Tensor:
    """Turn nested lists into examples, as in Batch.

    Raises:
        Problem: 422, they have another shape, another type or other values.
    """
    shape = ", ".join(map(str, spec.shape))
    cure = f"Give integers from 0 to {spec.levels - 1} as nested lists of the shape (B, {shape})"
    if len(x) > MAX_DRAWS:
        raise wrong("x", f"{len(x)} examples", f"Give at most {MAX_DRAWS}")
    array = _array("x", x, cure)
    if array.dtype.kind not in "iu" or array.shape[1:] != spec.shape:
        raise wrong("x", f"{array.dtype} values of the shape {array.shape}", cure)
    if array.min() < 0 or array.max() >= spec.levels:
        raise wrong("x", f"values from {array.min()} to {array.max()}", cure)
    return torch.from_numpy(array).to(torch.uint8 if spec.kind == "image" else torch.int64)


def latents(z: list[Any]) -> Tensor:
    """Turn nested lists into latents, float32 (B, D).

    Raises:
        Problem: 422, they are not numbers of that shape.
    """
    cure = "Give finite numbers as nested lists of the shape (B, D)"
    array = _array("z", z, cure)
    if array.dtype.kind not in "iuf" or array.ndim != 2 or not array.size:
        raise wrong("z", f"{array.dtype} values of the shape {array.shape}", cure)
    with np.errstate(over="ignore"):
        single = array.astype(np.float32)
    if not np.isfinite(single).all():
        raise wrong("z", "values that are not finite in float32", cure)
    return torch.from_numpy(single)


def _mask(known: list[Any], shape: tuple[int, ...]) -> Tensor:
    """Turn nested lists into masks, bool (1 or B, *shape)."""
    cure = (
        f"Give booleans as nested lists of the shape ({', '.join(map(str, shape))}), or one of them for each"
    )
    array = _array("known", known, cure)
    if array.shape == shape:
        array = array[None]
    if array.dtype != bool or array.shape[1:] != shape:
        raise wrong("known", f"{array.dtype} values of the shape {array.shape}", cure)
    return torch.from_numpy(array)


def _blanked(x: list[Any], known: Tensor) -> list[Any]:
    """Put 0 where values are not known: they may be anything, null too."""
    try:
        array = np.asarray(x, dtype=object)
    except ValueError:
        return x  # what is wrong with it is told by `examples`
    fits = array.shape[1:] == known.shape[1:] and len(known) in (1, len(array))
    blanked: list[Any] = np.where(known.numpy(), array, 0).tolist() if fits else x
    return blanked


def _array(field: str, values: list[Any], cure: str) -> NDArray[Any]:
    try:
        return np.asarray(values)
    except (ValueError, OverflowError):
        raise wrong(field, "lists of unequal lengths", cure) from None
