"""The autoregressive model against enumeration: of all data of a tiny space, and of all values of a pixel."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from gdl_ray.data import Dataset, training_batch
from gdl_ray.families import build
from gdl_ray.families.autoregressive import Autoregressive, AutoregressiveConfig, _MixtureHead, _RasterSampler
from gdl_ray.family import UNLABELLED, Batch, DataSpec
from gdl_ray.nn import logistic
from gdl_ray.random import fold, normal, uniform

LINE = DataSpec(name="line", kind="image", shape=(1, 1, 3), levels=3, classes=2)
PIXEL = DataSpec(name="pixel", kind="image", shape=(3, 1, 1), levels=3, classes=2)
WORD = DataSpec(name="word", kind="tokens", shape=(3,), levels=3, classes=2)
GREY = DataSpec(name="grey", kind="image", shape=(1, 5, 4), levels=5, classes=2)
COLOUR = DataSpec(name="colour", kind="image", shape=(3, 3, 2), levels=3, classes=2)
TEXT = DataSpec(name="text", kind="tokens", shape=(9,), levels=6, classes=2)

EDGES_256 = np.concatenate([[-np.inf], np.linspace(-1, 1, 257)[1:-1], [np.inf]])  # of the bins of levels

TINY = pytest.mark.parametrize("spec", [LINE, PIXEL, WORD], ids=lambda spec: spec.name)
SMALL = pytest.mark.parametrize("spec", [GREY, COLOUR, TEXT], ids=lambda spec: spec.name)


def model_of(spec: DataSpec) -> Autoregressive:
    """A model in which everything depends on everything that it may depend on."""
    config = AutoregressiveConfig(width=16, depth=2, heads=2, reach=2, components=3)
    model = build("autoregressive", config, spec)
    assert isinstance(model, Autoregressive)
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.add_(normal(torch.tensor([i]), tuple(parameter.shape))[0], alpha=0.3)
    return model.eval()


def every(spec: DataSpec) -> Tensor:
    """All data of a spec, in the order of their numbers written with `levels` digits."""
    dtype = torch.uint8 if spec.kind == "image" else torch.int64
    return torch.cartesian_prod(*[torch.arange(spec.levels, dtype=dtype)] * spec.dims).view(-1, *spec.shape)


def numbers(spec: DataSpec, x: Tensor) -> Tensor:
    """Place of data in `every`."""
    return (x.flatten(1).long() * spec.levels ** torch.arange(spec.dims).flip(0)).sum(1)


def random_data(spec: DataSpec, count: int, seed: int = 0) -> Tensor:
    x = uniform(fold(seed, torch.arange(count)), spec.shape) * spec.levels
    return x.to(torch.uint8 if spec.kind == "image" else torch.int64)


def probabilities(model: Autoregressive, label: int) -> Tensor:
    """Probability of each of `every`, by the likelihood."""
    x = every(model.spec)
    y = torch.full((len(x),), label)
    return model.log_likelihood(Batch(x, y, y)).double().exp()


def assert_frequencies(drawn: Tensor, expected: Tensor) -> None:
    """Compare counts with probabilities by the chi-square test, rare outcomes taken together."""
    rare = expected * len(drawn) < 10
    counts = torch.bincount(drawn, minlength=len(expected)).double()
    observed = torch.cat([counts[~rare], counts[rare].sum()[None]])
    wanted = torch.cat([expected[~rare], expected[rare].sum()[None]]) * len(drawn)
    assert not observed[wanted == 0].any()
    assert stats.chisquare(observed[wanted > 0], wanted[wanted > 0], sum_check=False).pvalue > 1e-3


@TINY
@pytest.mark.parametrize("label", [UNLABELLED, 1])
def test_probabilities_of_all_data_sum_to_one(spec: DataSpec, label: int) -> None:
    p = probabilities(model_of(spec), label)
    assert p.sum().item() == pytest.approx(1, abs=1e-5)
    assert p.max() < 0.9  # or it would say little


@TINY
@pytest.mark.parametrize("label", [UNLABELLED, 1])
def test_samples_come_as_often_as_their_likelihood_says(spec: DataSpec, label: int) -> None:
    model = model_of(spec)
    keys = fold(5, torch.arange(20_000))
    x = model.sample(keys, torch.full_like(keys, label))
    assert_frequencies(numbers(spec, x), probabilities(model, label))


@SMALL
def test_no_term_depends_on_what_comes_later(spec: DataSpec) -> None:
    model = model_of(spec)
    x = random_data(spec, 1)
    positions = math.prod(spec.shape) // model.channels
    changed = x.repeat(positions, *[1] * len(spec.shape))
    pixels = changed.view(positions, model.channels, positions)
    pixels[torch.arange(positions), :, torch.arange(positions)] ^= 1
    with torch.no_grad():
        before, after = (model._log_prob(each, torch.zeros(len(each)).long()) for each in (x, changed))
    differs = after != before
    assert differs.diagonal().all()
    assert not differs.tril(-1).any()  # row: the position that changed; column: the term
    assert differs.triu(1).float().sum() > 0.9 * positions * (positions - 1) / 2


def oracle(model: Autoregressive, keys: Tensor, y: Tensor, guidance: Tensor, temperature: Tensor) -> Tensor:
    """Sample without a cache: ask the likelihood for all values of a pixel, and walk up their shares."""
    C, L, positions = model.channels, model.spec.levels, len(model.window)
    values = torch.tensor(list(itertools.product(range(L), repeat=C)))
    x = torch.zeros(len(keys), C, positions, dtype=torch.int64)

    def joint(t: int, labels: Tensor) -> Tensor:
        trials = x.repeat_interleave(len(values), 0)
        trials[:, :, t] = values.repeat(len(keys), 1)
        terms = model._log_prob(trials, labels.repeat_interleave(len(values)))[:, t]
        return terms.view(len(keys), *[L] * C).double().exp()

    for t in range(positions):
        u = uniform(keys, (C,), t)
        tables = [joint(t, y), joint(t, torch.full_like(y, UNLABELLED))]
        for b, c in itertools.product(range(len(keys)), range(C)):
            drawn = x[b, :c, t].tolist()
            p, free = (table[(b, *drawn)].reshape(L, -1).sum(1) for table in tables)
            guided = free * (p / free) ** guidance[b] if y[b] != UNLABELLED else p
            weights = guided ** (1 / temperature[b])
            below = weights.cumsum(0) / weights.sum()
            x[b, c, t] = int((below < u[b, c]).sum())
    return x.view(-1, *model.spec.shape)


@SMALL
@torch.no_grad()
def test_sampling_with_caches_options_and_labels_equals_sampling_by_the_likelihood(spec: DataSpec) -> None:
    model = model_of(spec)
    keys = fold(2, torch.arange(24))
    y = torch.arange(24) % 3 + UNLABELLED
    guidance = torch.tensor([0.0, 1.0, 2.5, 1.0]).repeat(6)
    temperature = torch.tensor([1.0, 0.5, 1.7]).repeat_interleave(8)
    sampler = model.sampler()
    state = sampler.start(keys, y, {"guidance": guidance, "temperature": temperature})
    for t in range(sampler.steps):
        state = sampler.step(state, torch.full_like(keys, t))
    expected = oracle(model, keys, y, guidance, temperature)
    assert torch.equal(sampler.finish(state).long(), expected)


@torch.no_grad()
def test_a_sample_does_not_notice_when_others_start_nor_what_they_ask_for() -> None:
    model = model_of(GREY)
    keys, y = fold(4, torch.arange(16)), torch.arange(16) % 3 + UNLABELLED
    expected = model.sample(keys, y, temperature=0.8)
    sampler = model.sampler()
    late = torch.arange(16) % 2 == 1
    options = {"guidance": torch.where(late, 3.0, 1.0), "temperature": torch.where(late, 1.3, 0.8)}
    state = sampler.start(keys, y, options)
    index = torch.zeros(16, dtype=torch.int64)
    for t in range(sampler.steps):
        if t == 7:
            fresh = sampler.start(keys, y, options)
            state = {
                name: torch.where(late.view(-1, *[1] * (old.dim() - 1)), fresh[name], old)
                for name, old in state.items()
            }
            index[late] = 0
        state = sampler.step(state, index.clone())
        index += 1
    assert torch.equal(sampler.finish(state)[~late], expected[~late])


def test_guidance_leaves_the_law_of_others_as_it_is_to_the_bit() -> None:
    sampler = model_of(GREY).sampler()
    assert isinstance(sampler, _RasterSampler)
    log_p, free = normal(fold(0, torch.arange(2)), (3, 40)).log_softmax(2).unbind(0)
    ones = torch.ones(3)
    state = {
        "guidance": torch.tensor([1.0, 3.0, 3.0]),
        "label": torch.tensor([0, 0, -1]),
        "temperature": ones,
    }
    log_q = sampler._guide(state, log_p, free)
    assert torch.equal(log_q[[0, 2]], log_p[[0, 2]])
    torch.testing.assert_close(log_q[1], 3 * log_p[1] - 2 * free[1])


@TINY
def test_a_completion_after_a_known_beginning_has_the_law_of_the_model(spec: DataSpec) -> None:
    model = model_of(spec)
    x = torch.full((10_000, *spec.shape), 2, dtype=every(spec).dtype)
    known = torch.zeros(x.shape, dtype=torch.bool)
    known.view(10_000, -1)[:, 0] = True
    keys = fold(6, torch.arange(10_000))
    filled = model.complete(x, known, keys, torch.full_like(keys, 1))
    assert torch.equal(filled[known], x[known])
    p = probabilities(model, 1)
    begins = every(spec).flatten(1)[:, 0] == 2
    assert_frequencies(numbers(spec, filled), torch.where(begins, p / p[begins].sum(), 0))


@SMALL
def test_what_is_known_anywhere_is_kept_and_what_is_unknown_is_not_read(spec: DataSpec) -> None:
    model = model_of(spec)
    x, other = random_data(spec, 12), random_data(spec, 12, seed=1)
    keys = fold(8, torch.arange(12))
    known = uniform(keys, spec.shape, stream=999) < 0.5
    filled = model.complete(x, known, keys)
    assert torch.equal(filled[known], x[known])
    assert torch.equal(filled, model.complete(torch.where(known, x, other), known, keys))
    assert torch.equal(model.complete(x, torch.zeros_like(known), keys), model.sample(keys))
    sampler = model.completion(x, known)
    start = sampler.start(keys, torch.full_like(keys, UNLABELLED), {"temperature": torch.ones(12)})
    assert torch.equal(sampler.finish(start), torch.where(known, x, 0))


def test_a_mixture_sums_to_one_over_256_levels_and_is_that_of_scipy() -> None:
    head = _MixtureHead(4, components=5, channels=1, levels=256)
    h = normal(fold(1, torch.arange(40)), (4,)) * torch.linspace(0.1, 30, 40)[:, None]
    with torch.no_grad():
        parameters = head(h)
        log_p = head.conditional(parameters, torch.zeros(40, 0, dtype=torch.int64))
        level = torch.arange(256).expand(40, 256)
        terms = head.log_prob(parameters[:, None], level[..., None])
    torch.testing.assert_close(log_p, terms)
    torch.testing.assert_close(log_p.exp().sum(1), torch.ones(40), atol=1e-5, rtol=0)
    weight, mean, log_scale = parameters.double().unbind(1)
    law = stats.logistic(mean.numpy()[..., None], log_scale.clamp(-7, 4).exp().numpy()[..., None])
    expected = (weight.softmax(1).numpy()[..., None] * np.diff(law.cdf(EDGES_256), axis=-1)).sum(1)
    np.testing.assert_allclose(log_p.exp().numpy(), expected, atol=1e-5)


def test_channels_are_coupled_as_in_equation_2() -> None:
    head = _MixtureHead(4, components=2, channels=3, levels=256)
    x = random_data(DataSpec(name="x", kind="image", shape=(3,), levels=256, classes=0), 30)
    with torch.no_grad():
        parameters = head(normal(fold(1, torch.arange(30)), (4,)))
        log_p = head.log_prob(parameters, x)
        terms = [
            head.conditional(parameters, x[:, :c].long())[torch.arange(30), x[:, c].long()] for c in range(3)
        ]
    torch.testing.assert_close(sum(terms), log_p)
    weight, m_r, m_g, m_b, s_r, s_g, s_b, a_gr, a_br, a_bg = parameters.double().unbind(1)
    r, g, _ = (logistic.centers(value, 256).double()[:, None] for value in x.unbind(1))
    means, log_scales = (m_r, m_g + a_gr * r, m_b + a_br * r + a_bg * g), (s_r, s_g, s_b)
    expected = weight.softmax(1).numpy()
    for value, mean, log_scale in zip(x[:, :, None].long().unbind(1), means, log_scales, strict=True):
        law = stats.logistic(mean.numpy(), log_scale.exp().numpy())
        expected = expected * (law.cdf(EDGES_256[value + 1]) - law.cdf(EDGES_256[value]))
    np.testing.assert_allclose(log_p.exp().numpy(), expected.sum(1), rtol=1e-3)


def test_labelled_and_unlabelled_examples_share_a_batch(digits: Dataset) -> None:
    model = model_of(digits.spec)
    batch = training_batch(digits.splits["train"], seed=0, step=0, batch_size=16)
    mixed = torch.where(torch.arange(16) % 2 == 0, batch.y, UNLABELLED)
    whole, none = model.log_likelihood(batch), model.log_likelihood(batch.unlabelled())
    expected = torch.where(torch.arange(16) % 2 == 0, whole, none)
    assert torch.equal(model.log_likelihood(Batch(batch.x, mixed, batch.key)), expected)


def test_the_loss_is_the_mean_of_the_likelihood_and_its_halves_make_the_whole(digits: Dataset) -> None:
    model = model_of(digits.spec)
    batch = training_batch(digits.splits["train"], seed=0, step=0, batch_size=16).unlabelled()
    losses = model(batch)
    nats = -model.log_likelihood(batch).mean()
    assert losses.loss.item() == pytest.approx(nats.item(), rel=1e-5)
    bits = {name: value.item() for name, value in losses.metrics.items()}
    assert bits["bits_per_dim"] == pytest.approx(digits.spec.bits_per_dim(nats.item()), rel=1e-5)
    sum_of_halves = bits["bits_per_dim_first_half"] + bits["bits_per_dim_second_half"]
    assert sum_of_halves / 2 == pytest.approx(bits["bits_per_dim"], rel=1e-5)


def test_eighty_steps_beat_independent_pixels(digits: Dataset) -> None:
    model = build("autoregressive", AutoregressiveConfig(width=32, dropout=0.0), digits.spec)
    assert isinstance(model, Autoregressive)
    optimizer = torch.optim.Adam(model.parameters(), 6e-3)
    for step in range(80):
        optimizer.zero_grad()
        model(training_batch(digits.splits["train"], seed=0, step=step, batch_size=32)).loss.backward()
        optimizer.step()
    held_out = digits.splits["validation"]
    x = torch.from_numpy(held_out.x.copy())
    y = torch.full((len(x),), UNLABELLED)
    bits = -digits.spec.bits_per_dim(model.eval().log_likelihood(Batch(x, y, y)).mean().item())
    assert digits.spec.counts is not None
    share = (digits.spec.counts + 1 / 17) / (digits.spec.counts.sum(1, keepdim=True) + 1)
    of_pixel = share.log()[torch.arange(64), x.flatten(1).long()]
    assert bits < -digits.spec.bits_per_dim(of_pixel.sum(1).mean().item()) - 0.3


@pytest.mark.parametrize(
    ("field", "value", "range_"),
    [(name, 0, "be at least 1") for name in ("width", "depth", "heads", "reach", "components")]
    + [("dropout", 1, r"lie in \[0, 1\)"), ("label_drop", 1.5, r"lie in \[0, 1\]")],
)
def test_an_impossible_value_is_named(field: str, value: Any, range_: str) -> None:
    with pytest.raises(ValueError, match=f"{field}={value} must {range_}"):
        AutoregressiveConfig(**{field: value})
