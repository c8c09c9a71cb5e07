"""The hierarchical model where all codes can be listed: likelihood, prior and samples are known exactly."""

import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from gdl_ray.families import build
from gdl_ray.families.hierarchical import Hierarchical, HierarchicalConfig, _TokenSampler
from gdl_ray.family import UNLABELLED, Batch, DataSpec
from gdl_ray.nn import logistic
from gdl_ray.random import fold, uniform

TINY = DataSpec(name="tiny", kind="image", shape=(1, 1, 3), levels=3, classes=2)
SMALL = DataSpec(name="small", kind="image", shape=(2, 13, 9), levels=5, classes=3)
# Codes of TINY: one digit at the top, two below it.
CODES = torch.cartesian_prod(*[torch.arange(3)] * 3)


def model_of(spec: DataSpec, seed: int = 0, **fields: float) -> Hierarchical:
    """A model whose every part matters: no weight is left at zero."""
    small = {"width": 8, "prior_width": 8, "prior_depth": 1, "base": 3}
    config = HierarchicalConfig(**{**small, **fields})  # type: ignore[arg-type]
    model = build("hierarchical", config, spec, seed)
    assert isinstance(model, Hierarchical)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model.eval()


def tiny_model() -> Hierarchical:
    """A model whose encoder is so unsure that a few draws find every code."""
    model = model_of(TINY, halvings=1, digits=1)
    with torch.no_grad():
        for head in model.posterior:
            head.get_parameter("bias")[1:] += 1.5
    return model


def batch_of(spec: DataSpec, size: int, draw: int = 0) -> Batch:
    keys = fold(draw, torch.arange(size))
    x = (uniform(fold(9, torch.arange(size)), spec.shape) * spec.levels).to(torch.uint8)
    return Batch(x, torch.arange(size) % spec.classes, keys)


def log_joint(model: Hierarchical, x: Tensor, label: int) -> Tensor:
    """log p(x, c | y) of every image and each of all codes: (images, codes)."""
    y = torch.full((len(CODES),), label)
    with torch.no_grad():
        log_prior = model.prior(CODES, y)
        pixels = model._pixels(logistic.centers(CODES, 3), y)
        log_pixels = [logistic.log_prob(image, *pixels, 3).flatten(1).sum(1) for image in x.unsqueeze(1)]
    return torch.add(torch.stack(log_pixels), log_prior)


@pytest.mark.parametrize("label", [UNLABELLED, 0, 1])
def test_bounds_lie_below_the_exact_likelihood_and_close_in(label: int) -> None:
    model = tiny_model()
    x = torch.cartesian_prod(*[torch.arange(3, dtype=torch.uint8)] * 3).view(-1, 1, 1, 3)
    y = torch.full((len(x),), label)
    exact = log_joint(model, x, label).logsumexp(1)
    assert exact.exp().sum().item() == pytest.approx(1, abs=1e-4)

    def bounds(samples: int, draws: int) -> Tensor:
        keys = fold(samples, torch.arange(draws * len(x)))
        batch = Batch(x.repeat(draws, 1, 1, 1), y.repeat(draws), keys)
        return model.log_likelihood(batch, samples).view(draws, len(x))

    plain, tighter, tight = bounds(1, 1000), bounds(8, 100), bounds(100, 20)
    assert (plain.mean(0) < exact + 0.02).all()
    assert (exact - plain.mean(0)).mean() > 0.5  # or the bound would hold for nothing
    assert plain.mean() < tighter.mean() < tight.mean() < exact.mean() + 0.01
    torch.testing.assert_close(tight.mean(0), exact, atol=0.2, rtol=0)


def test_training_loss_is_the_negative_bound() -> None:
    model, size = tiny_model(), 20_000
    x = torch.tensor([[0, 2, 1], [1, 1, 0]], dtype=torch.uint8).view(2, 1, 1, 3).repeat(size // 2, 1, 1, 1)
    y = torch.arange(size) // 2 % 2
    with torch.no_grad():
        loss = model(Batch(x, y, fold(0, torch.arange(size)))).loss.item()
    given = Batch(x, y, fold(1, torch.arange(size)))
    # Training leaves half of the labels out.
    bounds = torch.cat([model.log_likelihood(given), model.log_likelihood(given.unlabelled())])
    assert loss == pytest.approx(-bounds.mean().item(), abs=4 * bounds.std().item() * (2 / size) ** 0.5)


def test_prior_sums_to_one_over_all_codes_and_depends_on_the_label() -> None:
    model = tiny_model()
    with torch.no_grad():
        tables = [model.prior(CODES, torch.full((len(CODES),), y)).exp() for y in (UNLABELLED, 0, 1)]
    for table in tables:
        assert table.sum().item() == pytest.approx(1, abs=1e-5)
    assert (tables[1] - tables[2]).abs().sum() > 0.05
    assert (tables[0] - tables[1]).abs().sum() > 0.05


def test_tokens_number_the_codes() -> None:
    model = model_of(SMALL, digits=3, base=4)
    tokens = torch.arange(4**3).view(2, 32)
    code = model._code(tokens)
    assert torch.equal(model._tokens(code.to(torch.uint8)), tokens)
    assert set(map(tuple, code.flatten(0, 1).tolist())) == set(
        map(tuple, torch.cartesian_prod(*[torch.arange(4)] * 3).tolist())
    )


def record(module: nn.Module, inputs: bool) -> list[Tensor]:
    """Collect what a module is given, or what it returns."""
    seen: list[Tensor] = []
    module.register_forward_hook(lambda _, given, returned: seen.append(given[0] if inputs else returned))
    return seen


def test_codes_are_rounded_and_gradients_go_straight_through() -> None:
    model = model_of(SMALL, base=5)
    heads, codes = record(model.posterior[1], inputs=False), record(model.from_code[1], inputs=True)
    batch = batch_of(SMALL, 6)
    u = uniform(batch.key, (model.prior.tokens, 2), 7)
    drawn, log_q, _ = model._draw(model._features(batch.x), batch.y, u)
    value, head = codes[0], heads[0]
    grid = torch.tensor([-0.8, -0.4, 0.0, 0.4, 0.8])
    assert (value[..., None] - grid).abs().amin(-1).max() < 1e-5

    here = u[:, 1:5].transpose(1, 2).reshape(value.shape)  # the second grid is 2x2
    mean, scale = head[:, :2].tanh(), head[:, 2:].exp() * 0.6 / 5
    before = mean + scale * torch.logit(here)
    nearest = (before[..., None] - grid).abs().argmin(-1)
    torch.testing.assert_close(value, grid[nearest], atol=1e-5, rtol=0)
    assert torch.equal(drawn[:, 1:5], nearest.flatten(2).transpose(1, 2).to(torch.uint8))
    torch.testing.assert_close(log_q.exp().sum(-1), torch.ones(6, model.prior.tokens, 2))

    weights = torch.linspace(-1, 1, value.numel()).view(value.shape)
    (gradient,) = torch.autograd.grad((weights * value).sum(), head)
    expected = weights.repeat(1, 2, 1, 1) * torch.cat([1 - mean**2, scale * torch.logit(here)], 1)
    torch.testing.assert_close(gradient, expected)


def test_encode_rounds_without_noise_and_decode_reads_every_grid_and_the_label() -> None:
    model = model_of(SMALL)
    batch = batch_of(SMALL, 4)
    heads = [record(head, inputs=False) for head in model.posterior]
    z = model.encode(batch.x, batch.y)
    means = torch.cat([seen[0][:, :2].tanh().flatten(2).transpose(1, 2) for seen in heads], 1).flatten(1)
    grid = torch.tensor([-2 / 3, 0, 2 / 3])
    torch.testing.assert_close(z, grid[(means[..., None] - grid).abs().argmin(-1)])
    assert model.grids == [(1, 1), (2, 2), (4, 3)]
    before, first = model._pixels(z, batch.y)[0], 0
    for height, width in model.grids:
        changed, end = z.clone(), first + 2 * height * width
        changed[:, first:end] *= -1
        changed[:, first:end] += 0.1
        assert ((model._pixels(changed, batch.y)[0] - before).abs().flatten(1).amax(1) > 1e-3).all()
        first = end
    assert first == z.shape[1]
    others = model._pixels(z, (batch.y + 1) % SMALL.classes)[0]
    assert ((others - before).abs().flatten(1).amax(1) > 1e-3).all()


def test_the_prior_gives_the_encoder_no_gradient() -> None:
    model, batch = model_of(SMALL), batch_of(SMALL, 8)
    outside = [p for name, p in model.named_parameters() if not name.startswith("prior.")]
    first = torch.autograd.grad(model(batch).loss, outside)
    with torch.no_grad():
        for parameter in model.prior.parameters():
            parameter.mul_(-2)
    second = torch.autograd.grad(model(batch).loss, outside)
    for one, other in zip(first, second, strict=True):
        assert one.any()
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_the_use_of_codes_is_counted() -> None:
    model = model_of(SMALL, base=4, digits=1)
    tokens = torch.zeros(4, model.prior.tokens, dtype=torch.int64)
    tokens[:, 1:5] = torch.tensor([0, 1, 0, 1])
    use = model._use(tokens)
    assert {name: value.item() for name, value in use.items()} == pytest.approx(
        {"codes_used": 0.5, "perplexity_1x1": 1, "perplexity_2x2": 2, "perplexity_4x3": 1}
    )


def tilted(model: Hierarchical, label: int, guidance: float, temperature: float) -> Tensor:
    """What the sampler should draw, from the prior's tables of all codes: (3, 3, 3)."""
    with torch.no_grad():
        tables = [
            model.prior(CODES, torch.full((len(CODES),), y)).exp().view(3, 3, 3) for y in (UNLABELLED, label)
        ]
    joint = torch.ones(3, 3, 3)
    for t in range(3):
        # p(c_t | c_<t) of the joint: sum the later tokens out, and divide by the sum over this one.
        sums = [table.flatten(t + 1).sum(-1) if t < 2 else table for table in tables]
        free, given = ((each / each.sum(-1, keepdim=True)).log() for each in sums)
        step = ((free + guidance * (given - free)) / temperature).softmax(-1)
        joint = joint * step.view(*step.shape, *[1] * (2 - t))
    return joint


def sampled_tokens(model: Hierarchical, count: int, label: int, options: Mapping[str, float]) -> Tensor:
    sampler = model.sampler()
    columns = {name: torch.full((count,), value) for name, value in sampler.settle(options).items()}
    with torch.no_grad():
        state = sampler.start(fold(5, torch.arange(count)), torch.full((count,), label), columns)
        for t in range(sampler.steps):
            state = sampler.step(state, torch.full((count,), t))
    return state["tokens"]


@pytest.mark.parametrize(
    ("label", "guidance", "temperature"),
    [(UNLABELLED, 1, 1), (1, 1, 1), (1, 3, 1), (0, 0.5, 0.6), (1, 0, 1), (UNLABELLED, 5, 2)],
)
def test_cached_sampling_draws_from_the_guided_prior(label: int, guidance: float, temperature: float) -> None:
    model, count = tiny_model(), 20_000
    tokens = sampled_tokens(model, count, label, {"guidance": guidance, "temperature": temperature})
    expected = tilted(model, label, guidance, temperature).flatten() * count
    found = (tokens @ torch.tensor([9, 3, 1])).bincount(minlength=27)
    chi_square = ((found - expected) ** 2 / expected.clamp(min=1)).sum().item()
    assert chi_square < 26 + 5 * math.sqrt(2 * 26)


def test_no_label_and_no_weight_of_it_are_the_same_sample() -> None:
    model, keys = model_of(SMALL), fold(1, torch.arange(6))
    labels = torch.arange(6) % 3
    assert torch.equal(model.sample(keys, labels, guidance=0), model.sample(keys))
    assert not torch.equal(model.sample(keys, labels), model.sample(keys))


def test_pixels_are_drawn_given_the_codes() -> None:
    model, count = tiny_model(), 20_000
    x = model.sample(fold(2, torch.arange(count)), torch.zeros(count, dtype=torch.int64))
    images = torch.cartesian_prod(*[torch.arange(3, dtype=torch.uint8)] * 3).view(-1, 1, 1, 3)
    expected = log_joint(model, images, 0).logsumexp(1).exp() * count
    found = (x.flatten(1).long() @ torch.tensor([9, 3, 1])).bincount(minlength=27)
    assert ((found - expected) ** 2 / expected.clamp(min=1)).sum() < 26 + 5 * math.sqrt(2 * 26)


def test_samples_ignore_their_neighbours_steps_and_guidance() -> None:
    model, count = model_of(SMALL, seed=1), 8
    sampler, keys = _TokenSampler(model), fold(4, torch.arange(8))
    labels = torch.arange(count) % 3
    plain = {"guidance": torch.ones(count), "temperature": torch.ones(count)}
    mixed = {**plain, "guidance": torch.tensor([1.0, 3.0] * 4)}
    aligned, staggered = sampler.start(keys, labels, plain), sampler.start(keys, labels, mixed)
    staggered["tokens"].zero_()  # rows that begin midway need something to go on from
    found = torch.empty(count, sampler.steps, dtype=torch.int64)
    with torch.no_grad():
        for t in range(sampler.steps):
            aligned = sampler.step(aligned, torch.full((count,), t))
        for t in range(2 * sampler.steps):  # each row begins at another step, and anew when it has ended
            index = (t + torch.arange(count)) % sampler.steps
            staggered = sampler.step(staggered, index)
            ended = index == sampler.steps - 1
            found[ended] = staggered["tokens"][ended]
        # Not a bit of it, though the guidance of others at weight 1 would only change the last.
        one, other = (sampler.start(keys, labels, columns) for columns in (plain, mixed))
        first = torch.zeros(count, dtype=torch.int64)
        assert torch.equal(sampler._logits(one, first)[::2], sampler._logits(other, first)[::2])
    assert torch.equal(found[::2], aligned["tokens"][::2])
    assert not torch.equal(found[1::2], aligned["tokens"][1::2])


def test_it_starts_at_the_marginal_mean() -> None:
    counts = torch.tensor([[1, 2, 1], [4, 0, 0], [1, 1, 2]])
    spec = DataSpec(name="counted", kind="image", shape=(1, 1, 3), levels=3, classes=0, counts=counts)
    model = build("hierarchical", HierarchicalConfig(), spec)
    mean = model.get_parameter("marginal").detach()[0, 0]
    torch.testing.assert_close(mean, torch.tensor([0, -2 / 3, 1 / 6]))


@pytest.mark.parametrize("field", ["halvings", "digits", "width", "prior_width", "prior_depth"])
def test_impossible_sizes_are_named(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field}=0 must be at least 1"):
        HierarchicalConfig(**{field: 0})


def test_what_is_out_of_range_is_named() -> None:
    with pytest.raises(ValueError, match=r"base=1 must lie in \[2, 256\]"):
        HierarchicalConfig(base=1)
    with pytest.raises(ValueError, match=r"dropout=1 must lie in \[0, 1\)"):
        HierarchicalConfig(dropout=1)
    with pytest.raises(ValueError, match=r"label_drop=1.5 must lie in \[0, 1\]"):
        HierarchicalConfig(label_drop=1.5)
