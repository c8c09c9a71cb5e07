"""The protocol: the same figures however the work is cut up, under the same names for every family."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from gdl_ray.data import Dataset, evaluation_batches
from gdl_ray.engine import request_keys
from gdl_ray.evaluate import protocol as module
from gdl_ray.evaluate.classifier import Classifier
from gdl_ray.evaluate.likelihood import log_likelihood
from gdl_ray.evaluate.metrics import METRICS, STANDARD_ERROR, bits_per_dim
from gdl_ray.evaluate.protocol import Piece, Subject, gather, measure, pieces, protocol_of, summarize
from gdl_ray.families import FAMILIES, build, preset
from gdl_ray.family import Family, Latent, Likelihood, Unnormalized

TIMED = ("efficiency/ms_per_sample", "efficiency/samples_per_s")


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure less than the protocol does: it is the same code."""
    few = {"_MOST_PROBED": 100, "_PATHS": 4, "_CHAINS": 20, "_BATCHES": (1,)}
    for name, value in few.items():
        monkeypatch.setattr(module, name, value)


def subject(family: str, digits: Dataset, draws: int = 2) -> Subject:
    """A small untrained model, to be measured on a few images."""
    chosen = preset(family, "digits", size=0.25)
    model = build(family, chosen.model, digits.spec).eval()
    classifier = Classifier(digits.spec).eval().requires_grad_(False)
    protocol = protocol_of(model, digits, "an untrained one", examples=40)
    draws = min(draws, protocol.draws)
    steps = {"steps": 10.0} if "steps" in protocol.options else {}
    quick = replace(protocol, draws=draws, bayes_draws=draws, options={**protocol.options, **steps})
    return Subject(model, digits, classifier, quick)


def figures(one: Subject) -> dict[str, float]:
    """All metrics but those of time."""
    found = gather(map(partial(measure, one), pieces(one.model, one.dataset, one.protocol)))
    return {name: value for name, value in summarize(one, found).items() if not name.startswith(TIMED)}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_measured_by_what_it_can_do_under_known_names(family: str, digits: Dataset) -> None:
    one = subject(family, digits)
    metrics = figures(one)
    assert {name.removesuffix(STANDARD_ERROR) for name in metrics} <= METRICS.keys()
    kinds = {name for name in metrics if name.startswith("test/bits_per_dim") and STANDARD_ERROR not in name}
    model = one.model
    assert kinds == (
        {bits_per_dim(model.likelihood_kind, tight=True)} if isinstance(model, Likelihood) else set()
    )
    assert ("latent/probe_accuracy" in metrics) == isinstance(one.model, Latent)
    assert ("test/log_z_gap_nats" in metrics) == isinstance(one.model, Unnormalized)


@pytest.mark.parametrize("family", ["vae", "autoregressive"])
def test_figures_do_not_depend_on_how_the_work_is_cut_up(
    family: str, digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = subject(family, digits)
    whole = figures(one)
    for name in ("_EXAMPLES", "_SAMPLES", "_LATENTS"):
        monkeypatch.setattr(module, name, 16)
    assert figures(one) == pytest.approx(whole, rel=1e-5, abs=1e-6)


def test_the_same_model_has_the_same_figures_again(digits: Dataset) -> None:
    one = subject("flow", digits)
    assert figures(one) == figures(one)


def test_the_likelihood_is_that_of_the_first_examples_of_the_test_split(digits: Dataset) -> None:
    one = subject("vae", digits)
    split = digits.splits["test"].first(40)
    batches = [batch.unlabelled() for batch in evaluation_batches(split, batch_size=40)]
    assert isinstance(one.model, Likelihood)
    nats = log_likelihood(one.model, batches, samples=2)
    metrics = figures(one)
    assert metrics["test/nats_lower_bound_tight"] == pytest.approx(nats.mean, rel=1e-6)
    assert metrics["test/bits_per_dim_lower_bound_tight"] == pytest.approx(
        -digits.spec.bits_per_dim(nats.mean)
    )


def test_samples_are_those_that_the_service_draws(digits: Dataset) -> None:
    one = subject("vae", digits)
    drawn = measure(one, Piece("samples", range(8, 24)))["samples"]
    labels = torch.tensor(digits.splits["test"].y[:24])
    assert torch.equal(drawn, one.model.sample(request_keys(0, 24), labels)[8:])


def test_protocols_are_equal_if_all_that_decides_figures_is(digits: Dataset) -> None:
    model: Family = subject("vae", digits).model
    one = protocol_of(model, digits, "classifier@1 aaaa")
    assert one.digest == protocol_of(model, digits, "classifier@1 aaaa").digest
    changed = [
        protocol_of(model, digits, "classifier@1 bbbb"),
        protocol_of(model, digits, "classifier@1 aaaa", examples=100),
        replace(one, draws=one.draws + 1),
        replace(one, dataset_digest="other"),
    ]
    assert len({one.digest, *(each.digest for each in changed)}) == 5


def test_what_takes_many_draws_reads_fewer_of_many_examples(digits: Dataset) -> None:
    train = digits.splits["train"]
    many = replace(digits, splits={**digits.splits, "test": replace(train, x=train.x.repeat(10, axis=0))})
    bound, exact = (protocol_of(subject(key, digits).model, many, "any") for key in ("vae", "autoregressive"))
    assert bound.examples == exact.examples == exact.likelihood_examples == 10_000
    assert (bound.likelihood_examples, bound.draws, exact.draws) == (1000, 1000, 1)


@pytest.mark.parametrize("asked", [{"examples": 5}, {"samples": 3}, {"examples": 100_000}, {"samples": 361}])
def test_counts_that_cannot_be_are_refused(asked: dict[str, int], digits: Dataset) -> None:
    ((name, count),) = asked.items()
    with pytest.raises(ValueError, match=f"{name}={count} must lie between 6 and the 360"):
        protocol_of(subject("gan", digits).model, digits, "any", **asked)


def test_more_samples_than_examples_have_the_labels_of_the_split(digits: Dataset) -> None:
    one = subject("gan", digits)
    more = Subject(one.model, digits, one.classifier, replace(one.protocol, examples=20, samples=60))
    assert 0 <= figures(more)["samples/label_fidelity"] <= 1
