"""One protocol for every model: on which examples it is measured, with which draws, by which features.

What is measured is cut into pieces. Each is a function of the model, the data and the protocol, so that any
number of workers, in any order, find the same: only the seconds of the last piece are of the machine.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from gdl_ray.data import Dataset, Split, evaluation_batch
from gdl_ray.engine import request_keys
from gdl_ray.evaluate.bayes import log_posterior, log_prior
from gdl_ray.evaluate.classifier import Classifier
from gdl_ray.evaluate.efficiency import parameters, sampling_speed, training_memory_bytes
from gdl_ray.evaluate.fidelity import frechet_distance, kernel_distance, label_agreement, neighbours
from gdl_ray.evaluate.interpret import active_units, class_coverage, linear_probe, smoothness
from gdl_ray.evaluate.memory import memorisation, nearest
from gdl_ray.evaluate.metrics import bits_per_dim, nats, standard_error
from gdl_ray.family import Batch, Family, Latent, Likelihood, Unnormalized, draw

MOST_EXAMPLES = 10_000
"""Of the split, and samples as many, unless other numbers are asked for."""

_FORMAT = 1
_NEIGHBOURS = 5  # the usual k
_FEW_EXAMPLES = 1000  # for what takes many draws of each
_MOST_BAYES_DRAWS = 16  # every one of them for each class
_MOST_PROBED = 1000  # training examples whose latents a probe learns from
_CHAINS = 360  # draws that are annealed back
_MOST_FREE = 1000  # samples without a label
_PATHS = 64  # examples between whose latents ways are measured
_EXAMPLES, _SAMPLES, _LATENTS = 100, 250, 1000  # rows of a piece
_BATCHES = (1, 64)  # whose seconds are measured


@dataclass(frozen=True, kw_only=True, slots=True)
class Protocol:
    """What decides the figures of a model; those of equal protocols compare."""

    format: int = _FORMAT
    dataset: str
    dataset_digest: str
    split: str = "test"
    examples: int
    """The first of the split."""
    likelihood: str
    """Its kind; `none` where the model has none."""
    likelihood_examples: int
    """The first of the split whose likelihood is computed; fewer where it takes many draws."""
    draws: int
    """Monte-Carlo samples an example, for the likelihood; 0 without one."""
    bayes_examples: int
    bayes_draws: int
    """Monte-Carlo samples an example and class."""
    samples: int
    """How many are drawn, of the classes of as many examples of the split."""
    seed: int = 0
    """Of the samples, as of a request to the service."""
    options: Mapping[str, float] = field(default_factory=dict)
    """Of the sampler: its defaults."""
    extractor: str
    """The classifier in whose features samples are compared: its version, and its weights' fingerprint."""
    neighbours: int = _NEIGHBOURS
    """The k of precision, recall, density and coverage."""

    @property
    def digest(self) -> str:
        """Twelve characters that equal protocols share."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]


def protocol_of(
    model: Family, dataset: Dataset, extractor: str, examples: int = 0, samples: int = 0
) -> Protocol:
    """Choose the protocol for a model.

    Args:
        model: in evaluation mode.
        dataset: that it was trained on.
        extractor: names the classifier.
        examples: how many of the test split; 0 for all, at most MOST_EXAMPLES.
        samples: how many to draw; 0 for as many as examples.

    Raises:
        ValueError: there are not so many in the split, or they are too few to have neighbours.
    """
    there = len(dataset.splits["test"])
    examples = examples or min(there, MOST_EXAMPLES)
    samples = samples or examples
    for name, asked in (("examples", examples), ("samples", samples)):
        if not _NEIGHBOURS < asked <= there:
            raise ValueError(
                f"{name}={asked} must lie between {_NEIGHBOURS + 1} and the {there} of its test split"
            )
    is_likelihood = isinstance(model, Likelihood)
    draws = model.tight_samples if isinstance(model, Likelihood) else 0
    return Protocol(
        dataset=dataset.spec.name,
        dataset_digest=dataset.digest,
        examples=examples,
        likelihood=model.likelihood_kind if isinstance(model, Likelihood) else "none",
        likelihood_examples=examples if draws == 1 else min(examples, _FEW_EXAMPLES) * is_likelihood,
        draws=draws,
        bayes_examples=min(examples, _FEW_EXAMPLES) * is_likelihood,
        bayes_draws=min(draws, _MOST_BAYES_DRAWS),
        samples=samples,
        options=model.sampler().settle({}),
        extractor=extractor,
    )


@dataclass(frozen=True, slots=True)
class Subject:
    """A model, and what it is measured by."""

    model: Family
    """In evaluation mode."""
    dataset: Dataset
    classifier: Classifier
    protocol: Protocol

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def rows(self, split: str, rows: range) -> Batch:
        """Read rows of a split; the noise of each depends on its number alone."""
        return evaluation_batch(self.dataset.splits[split], np.arange(rows.start, rows.stop)).to(self.device)


Findings = dict[str, Tensor]
"""What a piece finds, by name: a row for each of its rows, on the CPU."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A share of a measurement: what is measured, and of which rows."""

    what: str
    rows: range

    @property
    def is_timed(self) -> bool:
        """Whether it measures time, and so wants the machine for itself."""
        return self.what == "speed"


def pieces(model: Family, dataset: Dataset, protocol: Protocol) -> list[Piece]:
    """Cut all that the protocol measures of a model into pieces."""
    train = len(dataset.splits["train"])
    free = min(protocol.samples, _MOST_FREE)
    wanted = [("samples", protocol.samples, _SAMPLES), ("free_samples", free, _SAMPLES)]
    wanted += [("training", 1, 1), ("speed", 1, 1)]
    if isinstance(model, Likelihood):
        wanted += [("likelihood", protocol.likelihood_examples, _EXAMPLES)]
        wanted += [("bayes", protocol.bayes_examples, _EXAMPLES)]
    if isinstance(model, Unnormalized):
        wanted += [("constant", min(protocol.samples, _CHAINS), _CHAINS)]
    if isinstance(model, Latent):
        wanted += [("test_latents", protocol.examples, _LATENTS)]
        wanted += [("train_latents", min(_MOST_PROBED, train), _LATENTS)]
        wanted += [("paths", min(_PATHS, protocol.examples), _PATHS)]
    return [Piece(what, rows) for what, total, size in wanted for rows in _cut(total, size)]


def _cut(total: int, size: int) -> Iterator[range]:
    for start in range(0, total, size):
        yield range(start, min(start + size, total))


def measure(subject: Subject, piece: Piece) -> Findings:
    """Measure one piece."""
    found = _MEASURES[piece.what](subject, piece.rows)
    return {name: values.cpu() for name, values in found.items()}


def _samples(subject: Subject, rows: range) -> Findings:
    """Draw samples of the classes that the examples have, as the service does for the protocol's seed."""
    protocol = subject.protocol
    keys = request_keys(protocol.seed, protocol.samples)[rows.start : rows.stop].to(subject.device)
    labels = subject.rows(protocol.split, rows).y
    return {"samples": draw(subject.model.sampler(), keys, labels, protocol.options)}


def _free_samples(subject: Subject, rows: range) -> Findings:
    """Draw samples of any class, by other keys."""
    protocol = subject.protocol
    keys = request_keys(protocol.seed + 1, protocol.samples)[rows.start : rows.stop].to(subject.device)
    return {"free_samples": draw(subject.model.sampler(), keys, asked=protocol.options)}


def _likelihood(subject: Subject, rows: range) -> Findings:
    """Compute log p(x) of examples, without their labels."""
    model = _as(Likelihood, subject.model)
    batch = subject.rows(subject.protocol.split, rows).unlabelled()
    return {"nats": model.log_likelihood(batch, subject.protocol.draws).double()}


def _bayes(subject: Subject, rows: range) -> Findings:
    """Tell which examples Bayes' rule classifies rightly."""
    batch = subject.rows(subject.protocol.split, rows)
    prior = log_prior(torch.tensor(subject.dataset.splits["train"].y), subject.dataset.spec.classes)
    model, draws = _as(Likelihood, subject.model), subject.protocol.bayes_draws
    return {"bayes_right": log_posterior(model, batch, prior, draws).argmax(1) == batch.y}


def _constant(subject: Subject, rows: range) -> Findings:
    """Estimate log Z from both sides, by draws of any class."""
    model = _as(Unnormalized, subject.model)
    keys = request_keys(subject.protocol.seed + 2, len(rows)).to(subject.device)
    log_z = model.log_constant(draw(subject.model.sampler(), keys, asked=subject.protocol.options))
    return {
        "log_z_gap": torch.tensor([log_z.reverse - log_z.forward]),
        "effective": torch.tensor([log_z.effective]),
    }


def _latents(split: str) -> "Measure":
    """Make what encodes examples of a split, without their labels."""

    def encode(subject: Subject, rows: range) -> Findings:
        batch = subject.rows(split, rows).unlabelled()
        return {f"{split}_latents": _as(Latent, subject.model).encode(batch.x, batch.y)}

    return encode


def _paths(subject: Subject, rows: range) -> Findings:
    """Measure how straight the ways are between the latents of examples, two and two."""
    x = subject.rows(subject.protocol.split, rows).x
    ways = smoothness(_as(Latent, subject.model), subject.classifier.features, x)
    return {"straightness": torch.tensor([ways.straightness])}


def _training(subject: Subject, rows: range) -> Findings:
    """Measure what a step of training holds in memory for each family alike: with a batch of 64."""
    batch = subject.rows("train", range(min(64, len(subject.dataset.splits["train"]))))
    return {"training_bytes": torch.tensor([training_memory_bytes(subject.model, batch)])}


def _speed(subject: Subject, rows: range) -> Findings:
    """Measure the seconds that samples take, alone and together."""
    return {f"seconds_{batch}": torch.tensor([sampling_speed(subject.model, batch)]) for batch in _BATCHES}


Measure = Callable[[Subject, range], Findings]

_MEASURES: Mapping[str, Measure] = {
    "samples": _samples,
    "free_samples": _free_samples,
    "training": _training,
    "speed": _speed,
    "likelihood": _likelihood,
    "bayes": _bayes,
    "constant": _constant,
    "test_latents": _latents("test"),
    "train_latents": _latents("train"),
    "paths": _paths,
}

Able = TypeVar("Able")


def _as(kind: type[Able], model: Family) -> Able:
    """Take a model for what it can do, which its pieces were chosen by."""
    if not isinstance(model, kind):
        raise TypeError(f"{type(model).__name__} is no {kind.__name__}")
    return model


def gather(found: Iterable[Findings]) -> Findings:
    """Lay what pieces have found one below the other, in their order."""
    rows: dict[str, list[Tensor]] = {}
    for each in found:
        for name, values in each.items():
            rows.setdefault(name, []).append(values)
    return {name: torch.cat(values) for name, values in rows.items()}


def summarize(subject: Subject, found: Findings) -> dict[str, float]:
    """Turn what all pieces have found into metrics; errors of a mean are standard errors over examples."""
    free = subject.classifier.predict(found["free_samples"])
    metrics = sample_metrics(subject, found["samples"]) | _cost_metrics(subject, found)
    metrics["samples/class_coverage"] = class_coverage(free, subject.dataset.spec.classes)
    if isinstance(subject.model, Likelihood):
        metrics |= _likelihood_metrics(subject.model, subject, found)
    if "log_z_gap" in found:
        metrics["test/log_z_gap_nats"] = found["log_z_gap"].item()
        metrics["test/effective_sample_size"] = found["effective"].item()
    if "test_latents" in found:
        metrics |= _latent_metrics(subject, found)
    return metrics


def _likelihood_metrics(model: Likelihood, subject: Subject, found: Findings) -> dict[str, float]:
    spec = subject.dataset.spec
    in_nats, in_bits = (name(model.likelihood_kind, tight=True) for name in (nats, bits_per_dim))
    mean, error = _mean(found["nats"])
    accuracy, accuracy_error = _mean(found["bayes_right"])
    return {
        in_nats: mean,
        standard_error(in_nats): error,
        in_bits: -spec.bits_per_dim(mean),
        standard_error(in_bits): spec.bits_per_dim(error),
        "test/bayes_accuracy": accuracy,
        standard_error("test/bayes_accuracy"): accuracy_error,
    }


def _mean(values: Tensor) -> tuple[float, float]:
    """Mean and standard error of values, (N,)."""
    values = values.double()
    return values.mean().item(), (values.std() / len(values) ** 0.5).item()


def sample_metrics(subject: Subject, x: Tensor) -> dict[str, float]:
    """Compare samples with the examples of the split.

    As samples have the labels of the examples, distances are a little smaller than those of independent
    draws, and the kernel distance of good samples lies below 0: by as much for all models that heed labels.

    Args:
        subject: what they are compared by; its model is not asked.
        x: samples, uint8 (N, C, H, W), asked to be of the classes of the first N examples.
    """
    dataset, classifier, protocol = subject.dataset, subject.classifier, subject.protocol
    split = dataset.splits[protocol.split].first(protocol.examples)
    real, train = torch.tensor(split.x), torch.tensor(dataset.splits["train"].x)
    asked = torch.tensor(dataset.splits[protocol.split].y[: len(x)])
    features, (sampled, guessed) = classifier.features(real), classifier.look_at(x)
    near = neighbours(features, sampled, protocol.neighbours)
    distance, error = kernel_distance(features, sampled)
    copying = memorisation(nearest(train, real)[0], nearest(train, x)[0])
    return {
        "samples/frechet_distance": frechet_distance(features, sampled),
        "samples/kernel_distance": distance,
        standard_error("samples/kernel_distance"): error,
        "samples/precision": near.precision,
        "samples/recall": near.recall,
        "samples/density": near.density,
        "samples/coverage": near.coverage,
        "samples/label_fidelity": label_agreement(guessed, asked),
        "samples/copied_share": copying.copied_share,
        "samples/copying_z": copying.z,
        "samples/memorised": float(copying.is_memorised),
    }


def _latent_metrics(subject: Subject, found: Findings) -> dict[str, float]:
    latents, held_out = found["train_latents"], found["test_latents"]
    train = subject.dataset.splits["train"].first(len(latents))
    test = subject.dataset.splits[subject.protocol.split].first(len(held_out))
    (train_x, train_y), (test_x, test_y) = _tensors(train), _tensors(test)
    return {
        "latent/probe_accuracy": linear_probe(latents, train_y, held_out, test_y),
        "latent/pixel_probe_accuracy": linear_probe(train_x.flatten(1), train_y, test_x.flatten(1), test_y),
        "latent/active_units": float(active_units(held_out)),
        "latent/smoothness": found["straightness"].item(),
    }


def _tensors(split: Split) -> tuple[Tensor, Tensor]:
    return torch.tensor(split.x), torch.tensor(split.y)


def _cost_metrics(subject: Subject, found: Findings) -> dict[str, float]:
    metrics = {
        "efficiency/parameters": float(parameters(subject.model)),
        "efficiency/training_memory_mib": found["training_bytes"].item() / 2**20,
    }
    for batch in _BATCHES:
        seconds = found[f"seconds_{batch}"].item()
        metrics[f"efficiency/ms_per_sample_batch_{batch}"] = 1000 * seconds / batch
        metrics[f"efficiency/samples_per_s_batch_{batch}"] = batch / seconds
    return metrics
