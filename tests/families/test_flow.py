"""The flow against what must hold of one: an inverse, a Jacobian, a density that integrates to one."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gdl_ray.data import Dataset, training_batch
from gdl_ray.families import build
from gdl_ray.families.flow import Flow, FlowConfig, _patches
from gdl_ray.family import UNLABELLED, Batch, DataSpec, draw
from gdl_ray.random import fold, normal, uniform

TINY = DataSpec(name="tiny", kind="image", shape=(1, 1, 2), levels=3, classes=0)
ODD = DataSpec(name="odd", kind="image", shape=(2, 5, 7), levels=4, classes=3)
SMALL = DataSpec(name="small", kind="image", shape=(1, 3, 5), levels=4, classes=3)

CONFIGS = {
    "autoregressive": FlowConfig(kind="autoregressive", width=16, depth=2, patch=2),
    "coupling": FlowConfig(kind="coupling", width=16, depth=2),
}
STRENGTH = {"autoregressive": 0.4, "coupling": 2.0}
both_kinds = pytest.mark.parametrize("kind", CONFIGS)


def jacobian(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """Differentiate by autograd: the shape of the result, then that of the argument."""
    derivatives: Tensor = torch.autograd.functional.jacobian(function, at)  # type: ignore[no-untyped-call]
    return derivatives


def random_flow(kind: str, spec: DataSpec, strength: float = 1.0) -> Flow:
    """A flow as training might leave it: every weight that starts at nothing matters, uneven masses."""
    model = build("flow", CONFIGS[kind], spec, seed=1)
    assert isinstance(model, Flow)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            started = weight.abs().max() > 0.01 and "log_mass" not in name
            spread = 0.0 if started else strength * STRENGTH[kind] / weight.shape[-1] ** 0.5
            weight.add_(spread * torch.randn(weight.shape, generator=generator))
    return model.eval()


def labels_of(spec: DataSpec, size: int) -> Tensor:
    """Every class, and no label, in turn."""
    return torch.arange(size) % (spec.classes + 1) - 1


def every_image(spec: DataSpec) -> Tensor:
    values = torch.arange(spec.levels, dtype=torch.uint8)
    return torch.cartesian_prod(*[values] * spec.dims).view(-1, *spec.shape)


def log_density(model: Flow, x: Tensor, u: Tensor, y: Tensor) -> Tensor:
    """Compute log p(x + u | y) from the map to z alone."""
    z, log_det = model._to_latent(x, u, y)
    return log_det - 0.5 * (z.square() + math.log(2 * math.pi)).sum(1)


def exact_log_likelihood(model: Flow, x: Tensor, cells: int = 100) -> Tensor:
    """Integrate the density over the unit square of x; u = Phi(t), for the density may be steep at edges."""
    t = torch.linspace(-5, 5, cells)
    u = torch.cartesian_prod(torch.special.ndtr(t), torch.special.ndtr(t))
    log_weight = torch.cartesian_prod(t, t).square().sum(1) / -2 + math.log(
        100 / (2 * math.pi * (cells - 1) ** 2)
    )
    y = torch.full((len(u),), UNLABELLED)
    with torch.no_grad():
        logs = [log_density(model, image.expand(len(u), *image.shape), u, y) + log_weight for image in x]
    return torch.stack(logs).logsumexp(1)


@both_kinds
def test_bounds_lie_below_the_exact_likelihood_and_close_in(kind: str) -> None:
    # Gently, for the quadrature and the importance weights to be precise.
    model, x = random_flow(kind, TINY, strength=0.3), every_image(TINY)
    exact = exact_log_likelihood(model, x)
    assert exact.exp().sum().item() == pytest.approx(1, abs=1e-3)

    def mean_bound(samples: int, draws: int) -> Tensor:
        rows = x.repeat(draws, 1, 1, 1)
        batch = Batch(rows, torch.full((len(rows),), UNLABELLED), fold(0, torch.arange(len(rows))))
        return model.log_likelihood(batch, samples).view(draws, len(x)).mean(0)

    single, tighter, tight = mean_bound(1, 1000), mean_bound(10, 100), mean_bound(200, 20)
    assert (single <= exact + 0.02).all()
    assert (exact - single).mean() > 0.02  # or the bound would hold for nothing
    assert single.mean() < tighter.mean() < exact.mean() + 1e-3
    torch.testing.assert_close(tight, exact, atol=0.05, rtol=0)


@both_kinds
def test_each_block_has_an_inverse(kind: str) -> None:
    model, keys = random_flow(kind, ODD), fold(0, torch.arange(12))
    y, ones = labels_of(ODD, 12), torch.ones(12)
    x = normal(keys, (ODD.dims,))
    with torch.no_grad():
        for i in range(len(model.blocks)):
            block = model._block(i)
            z, _ = block(x, y, None, 0)
            assert (z - x).abs().mean() > 0.05  # or there would be nothing to invert
            torch.testing.assert_close(block.inverse(z, y, ones), x, atol=1e-4, rtol=0)
            torch.testing.assert_close(block(block.inverse(x, y, ones), y, None, 0)[0], x, atol=1e-4, rtol=0)


@both_kinds
def test_decode_inverts_encode(kind: str) -> None:
    model, keys = random_flow(kind, ODD), fold(0, torch.arange(12))
    x = (uniform(keys, ODD.shape) * ODD.levels).to(torch.uint8)
    y = labels_of(ODD, 12)
    z = model.encode(x, y)
    assert z.shape == (12, ODD.dims)
    assert torch.equal(model.decode(z, y), x)


@both_kinds
def test_log_determinant_is_the_jacobians(kind: str) -> None:
    model, y = random_flow(kind, SMALL), labels_of(SMALL, 4)
    keys = fold(0, torch.arange(4))
    x = (uniform(keys, SMALL.shape) * SMALL.levels).to(torch.uint8)
    u = uniform(keys, (SMALL.dims,), 1)
    _, log_det = model._to_latent(x, u, y)

    def latent(u: Tensor) -> Tensor:
        return model._to_latent(x, u, y)[0]

    jacobians = jacobian(latent, u)[range(4), :, range(4)]
    torch.testing.assert_close(
        log_det, torch.linalg.slogdet(jacobians.double())[1].float(), atol=2e-4, rtol=0
    )


def jacobian_of_block(model: Flow, number: int) -> Tensor:
    x = normal(fold(0, torch.arange(1)), (model.spec.dims,))

    def through(x: Tensor) -> Tensor:
        z: Tensor = model._block(number)(x, torch.tensor([1]), None, 0)[0]
        return z

    return jacobian(through, x)[0, :, 0]


def test_an_autoregressive_block_sees_only_what_comes_before() -> None:
    model, directions = random_flow("autoregressive", ODD), set()
    for i in range(4):
        slots = model._block(i).get_buffer("slots").flatten()
        order = slots[slots < ODD.dims]
        in_order = jacobian_of_block(model, i)[order][:, order]
        assert (in_order.triu(1) == 0).all()
        assert (in_order.tril(-1) != 0).float().mean() > 0.4  # of all; half of them lie below
        directions.add(tuple(order.tolist()))
    assert len(directions) == 4


def test_a_coupling_block_keeps_what_it_reads() -> None:
    model = random_flow("coupling", ODD)
    for i in range(2):
        free = model._block(i).get_buffer("free")
        slopes = jacobian_of_block(model, i)
        assert torch.equal(slopes[~free], torch.eye(ODD.dims)[~free])
        own = slopes[free][:, free]
        assert torch.equal(own, own.diag().diag())
        assert (slopes[free][:, ~free] != 0).all()
    assert torch.equal(model._block(0).get_buffer("free"), ~model._block(1).get_buffer("free"))


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("side", [1, 2, 3, 4])
def test_patches_hold_every_pixel_once(side: int, apart: bool) -> None:
    slots = _patches(ODD, side, apart)
    assert slots.shape == (math.ceil(5 / side) * math.ceil(7 / side), 2 * side**2)
    present = slots[slots < ODD.dims]
    assert torch.equal(present.sort().values, torch.arange(ODD.dims))


def test_patches_are_of_neighbours_or_of_pixels_far_apart() -> None:
    assert _patches(ODD, 2, apart=False)[0].tolist() == [0, 1, 7, 8, 35, 36, 42, 43]
    assert _patches(ODD, 2, apart=False)[3].tolist() == [6, 70, 13, 70, 41, 70, 48, 70]  # 70: absent
    assert _patches(ODD, 2, apart=True)[0].tolist() == [0, 4, 21, 25, 35, 39, 56, 60]


@both_kinds
def test_sampling_decodes_the_prior_whatever_its_neighbours_do(kind: str) -> None:
    model = random_flow(kind, ODD)
    sampler, keys, y = model.sampler(), fold(0, torch.arange(8)), labels_of(ODD, 8)
    z = normal(keys, (ODD.dims,), 0)
    assert torch.equal(model.decode(z, y), draw(sampler, keys, y))

    # The second half starts two steps later, and half of that is guided.
    options = {"guidance": torch.tensor([1.0] * 6 + [3.0] * 2), "temperature": torch.ones(8)}
    late = torch.arange(8) >= 4
    with torch.no_grad():
        state = sampler.start(keys, y, options)
        fresh = sampler.start(keys, y, options)
        for i in range(sampler.steps + 2):
            if i == 2:
                state = {name: torch.where(_like(late, row), fresh[name], row) for name, row in state.items()}
            stepped = sampler.step(state, (i - 2 * late) % sampler.steps)
            running = torch.where(late, i >= 2, i < sampler.steps)
            state = {
                name: torch.where(_like(running, row), stepped[name], row) for name, row in state.items()
            }
    alone = final_latents(model, keys, y)
    assert torch.equal(state["z"][:6], alone[:6])  # to the last bit
    assert not torch.equal(state["z"][6:], alone[6:])


def _like(rows: Tensor, tensor: Tensor) -> Tensor:
    return rows.view(-1, *[1] * (tensor.dim() - 1))


@both_kinds
def test_guidance_weighs_the_label(kind: str) -> None:
    model = random_flow(kind, ODD)
    with torch.no_grad():  # a label that matters
        for i in range(len(model.blocks)):
            model._block(i).get_parameter("embed_class.table.weight").mul_(3)
    keys, y = fold(0, torch.arange(16)), torch.arange(16) % 3
    without = model.sample(keys)
    assert torch.equal(model.sample(keys, y, guidance=0), without)
    assert torch.equal(model.sample(keys, guidance=5), without)
    states = [final_latents(model, keys, y, guidance) for guidance in (0.0, 0.5, 1.0, 20.0)]
    none, half, full, much = states
    assert much.isfinite().all()
    assert (half - none).norm() < (full - none).norm() < (much - none).norm()


def final_latents(
    model: Flow, keys: Tensor, y: Tensor, guidance: float = 1.0, temperature: float = 1.0
) -> Tensor:
    """Run the sampler up to z_0."""
    sampler, ones = model.sampler(), torch.ones(len(keys))
    state = sampler.start(keys, y, {"guidance": guidance * ones, "temperature": temperature * ones})
    with torch.no_grad():
        for i in range(sampler.steps):
            state = sampler.step(state, torch.full_like(keys, i))
    return state["z"]


@both_kinds
def test_low_temperatures_end_at_the_image_of_the_priors_mode(kind: str) -> None:
    model, keys, y = random_flow(kind, ODD), fold(0, torch.arange(9)), torch.zeros(9, dtype=torch.int64)
    cold = final_latents(model, keys, y, temperature=0.01)
    mode = final_latents(model, keys, y, temperature=0.0)
    torch.testing.assert_close(mode, mode[:1].expand(9, -1))
    assert (cold - mode).abs().max() < 0.3
    assert (final_latents(model, keys, y) - mode).abs().max() > 3
    agreeing = model.sample(keys, y, temperature=0.01) == model.decode(torch.zeros(9, ODD.dims), y)
    assert agreeing.float().mean() > 0.95


@both_kinds
def test_the_loss_is_the_bound_of_what_is_shown(kind: str, digits: Dataset) -> None:
    config = FlowConfig(kind=CONFIGS[kind].kind, width=16, label_drop=0.0)
    model = build("flow", config, digits.spec).eval()
    assert isinstance(model, Flow)
    batch = training_batch(digits.splits["train"], seed=0, step=0, batch_size=16)
    loss = model(batch).loss.detach()
    torch.testing.assert_close(loss, -model.log_likelihood(batch).mean(), rtol=1e-5, atol=0)


@both_kinds
def test_it_starts_from_independent_pixels_and_finds_dependence(kind: str, digits: Dataset) -> None:
    model = build("flow", FlowConfig(kind=CONFIGS[kind].kind, width=32, patch=4), digits.spec)
    assert digits.spec.counts is not None
    counts = digits.spec.counts.double()
    share = (counts + 1 / 17) / (counts.sum(1, keepdim=True) + 1)
    train = digits.splits["train"]
    batch = training_batch(train, seed=0, step=0, batch_size=256)
    pixels = batch.x.flatten(1).long()
    independent = -share.log()[torch.arange(64), pixels].sum(1).mean().item()
    assert model(batch).loss.item() == pytest.approx(independent, abs=0.1)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(80):
        optimizer.zero_grad()
        model(training_batch(train, seed=0, step=1 + step, batch_size=64)).loss.backward()
        optimizer.step()
    assert model.eval()(batch).loss.item() < independent - 8


@pytest.mark.parametrize("field", ["blocks", "depth", "width", "heads", "patch"])
def test_impossible_sizes_are_named(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field}=0 must be at least 1"):
        FlowConfig(**{field: 0})  # type: ignore[arg-type]


def test_other_impossible_values_are_named() -> None:
    with pytest.raises(ValueError, match="width=20 must be a multiple of heads=8"):
        FlowConfig(width=20, heads=8)
    with pytest.raises(ValueError, match=r"dropout=1 must lie in \[0, 1\)"):
        FlowConfig(dropout=1)
    with pytest.raises(ValueError, match=r"label_drop=1.5 must lie in \[0, 1\]"):
        FlowConfig(label_drop=1.5)
    with pytest.raises(ValueError, match="kind=glow must be one of: autoregressive, coupling"):
        FlowConfig(kind="glow")  # type: ignore[arg-type]
