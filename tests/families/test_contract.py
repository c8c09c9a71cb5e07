"""What every family promises, checked on every entry of the table."""

import copy
import dataclasses
import inspect
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gdl_ray.data import Dataset, training_batch
from gdl_ray.engine import Engine, request_keys, seeds_of
from gdl_ray.families import FAMILIES, build, preset
from gdl_ray.family import (
    UNLABELLED,
    Batch,
    Completion,
    DataSpec,
    Decoder,
    Density,
    Family,
    Latent,
    Likelihood,
    Sampler,
    Unnormalized,
)
from gdl_ray.random import fold, uniform
from gdl_ray.train import checkpoint
from gdl_ray.train.loop import Training
from gdl_ray.train.parallel import World, require_grad
from gdl_ray.train.plan import Budget, Plan

SPECS = {
    "grey": DataSpec(name="grey", kind="image", shape=(1, 8, 8), levels=17, classes=10),
    "colour": DataSpec(name="colour", kind="image", shape=(3, 12, 10), levels=256, classes=3),
    "unlabelled": DataSpec(name="unlabelled", kind="image", shape=(1, 8, 8), levels=2, classes=0),
}

pytestmark = pytest.mark.parametrize("key", FAMILIES)


class Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations on tensors."""

    operations: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        return func(*args, **(kwargs or {}))


def batch_of(spec: DataSpec, size: int = 8) -> Batch:
    keys = fold(3, torch.arange(size))
    x = (uniform(keys, spec.shape) * spec.levels).to(torch.uint8)
    y = torch.arange(size) % spec.classes if spec.classes else torch.full((size,), UNLABELLED)
    return Batch(x, y, keys)


def model_of(key: str, spec: DataSpec) -> Family:
    return build(key, preset(key, "digits").model, spec)


def disturbed(model: Family) -> Family:
    """Move every weight a little: much of a new model is zero, and nothing depends on anything."""
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.add_(uniform(torch.tensor([i]), tuple(parameter.shape))[0] - 0.5, alpha=0.05)
    return model.eval()


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_losses_are_finite_and_train_their_phase_alone(key: str, spec: DataSpec) -> None:
    model = model_of(key, spec)
    owners = [parameter for phase in model.phases for parameter in model.phase_parameters(phase)]
    assert {id(p) for p in owners} == {id(p) for p in model.parameters()}
    assert len(owners) == len(set(map(id, owners)))
    for phase in model.phases:
        model.zero_grad()
        require_grad(model, phase)
        losses = model(batch_of(spec), phase)
        assert losses.loss.shape == ()
        assert losses.loss.isfinite()
        for name, value in losses.metrics.items():
            assert value.isfinite(), name
            assert not value.requires_grad, name
        losses.loss.backward()
        trained = {id(p) for p in model.phase_parameters(phase)}
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == (id(parameter) in trained), name


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_samples_are_data_and_a_function_of_key_and_label(key: str, spec: DataSpec) -> None:
    model = model_of(key, spec).eval()
    keys = fold(0, torch.arange(6))
    labels = torch.arange(6) % spec.classes if spec.classes else None
    x = model.sample(keys, labels)
    assert x.shape == (6, *spec.shape)
    assert x.dtype == torch.uint8
    assert x.int().max() < spec.levels
    assert torch.equal(x, model.sample(keys, labels))
    alone = model.sample(keys[4:5], labels if labels is None else labels[4:5])
    # Other kernels serve other batch sizes: the last bit of a float may move a value over a bin's edge.
    assert (alone != x[4:5]).float().mean() < 0.02
    assert not torch.equal(x, model.sample(fold(1, torch.arange(6)), labels))


def test_the_weights_are_a_function_of_the_seed(key: str) -> None:
    config, spec = preset(key, "digits").model, SPECS["grey"]
    first, second, other = (build(key, config, spec, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_a_saved_model_is_the_same_model(key: str, tmp_path: Path) -> None:
    model = model_of(key, SPECS["colour"]).eval()
    contents = checkpoint.Contents(description=checkpoint.describe(model), weights=model.state_dict())
    checkpoint.save(tmp_path / "saved", contents)
    loaded = checkpoint.load_family(tmp_path / "saved")
    assert loaded.spec == model.spec
    assert loaded.config == model.config
    keys = fold(0, torch.arange(4))
    assert torch.equal(loaded.sample(keys), model.sample(keys))


def test_configs_are_frozen_data(key: str) -> None:
    presets: Mapping[str, Any] = FAMILIES[key].presets
    assert {"digits", "mnist", "cifar10"} <= set(presets)
    for make in presets.values():
        config: Any = make().model
        kind: Any = FAMILIES[key].Config
        assert isinstance(config, kind)
        assert json.loads(json.dumps(dataclasses.asdict(config))) == dataclasses.asdict(config)
        with pytest.raises(dataclasses.FrozenInstanceError):
            config.label_drop = 0.0


@pytest.mark.parametrize("size", [0.5, 1, 2, 3])
@pytest.mark.parametrize("name", ["digits", "mnist", "cifar10"])
def test_presets_build_at_every_size(key: str, name: str, size: float) -> None:
    shape, levels = {"digits": ((1, 8, 8), 17), "mnist": ((1, 28, 28), 256), "cifar10": ((3, 32, 32), 256)}[
        name
    ]
    spec = DataSpec(name=name, kind="image", shape=shape, levels=levels, classes=10)
    with torch.device("meta"):
        usual, sized = (FAMILIES[key](preset(key, name, s).model, spec) for s in (1, size))
    weights, more = (sum(p.numel() for p in model.parameters()) for model in (usual, sized))
    assert (size == 1) == (weights == more)
    assert (size > 1) == (weights < more)


def test_other_kinds_of_data_are_refused_by_name(key: str) -> None:
    spec = DataSpec(name="sound", kind="waves", shape=(8,), levels=4, classes=0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="sound is waves: choose another family or other data"):
        model_of(key, spec)


def test_a_family_file_can_be_read_at_a_sitting(key: str) -> None:
    module = sys.modules[FAMILIES[key].__module__]
    assert module.__doc__
    assert "References:" in module.__doc__
    assert "https://arxiv.org/" in module.__doc__
    assert len(inspect.getsource(module).splitlines()) <= 400


def test_resumed_equals_never_interrupted(key: str, digits: Dataset, tmp_path: Path) -> None:
    chosen = preset(key, "digits")
    optimization = dataclasses.replace(chosen.optimization, batch_size=8)
    plan = Plan(optimization=optimization, budget=Budget(steps=100))

    def training(seed: int = 0) -> Training:
        return Training(build(key, chosen.model, digits.spec, seed), plan, World())

    def advance(run: Training, steps: range) -> None:
        for step in steps:
            run.advance(training_batch(digits.splits["train"], seed=0, step=step, batch_size=8))

    whole, resumed = training(), training(seed=1)
    advance(whole, range(2))
    saved = whole.snapshot(None, evaluated=True)
    assert saved
    saved.write(tmp_path)
    resumed.restore(checkpoint.load(tmp_path))
    for run in (whole, resumed):
        advance(run, range(2, 4))
    for mine, other in ((whole.family, resumed.family), (whole.average, resumed.average)):
        for name, tensor in mine.state_dict().items():
            assert torch.equal(tensor.nan_to_num(), other.state_dict()[name].nan_to_num()), name
    assert whole.family.carried.keys() == resumed.family.carried.keys()
    for name, rows in whole.family.carried.items():
        assert torch.equal(rows, resumed.family.carried[name]), name


def test_a_sample_from_the_engine_is_the_same_alone_and_in_company(key: str) -> None:
    model = disturbed(model_of(key, SPECS["grey"]))
    options = {"guidance": 2.0} if "guidance" in model.sampler().options else {}
    labels = torch.tensor([1, UNLABELLED, 3])
    engine = Engine(model)
    try:
        alone = engine.submit(seeds_of(7, 3), labels, options).future.result(timeout=120)
        company = [engine.submit(seeds_of(1, 20), torch.full((20,), 5))]
        amid = engine.submit(seeds_of(7, 3), labels, options)
        company.append(engine.submit(seeds_of(2, 30), torch.full((30,), UNLABELLED), options))
        assert torch.equal(amid.future.result(timeout=120), alone)
        assert [len(job.future.result(timeout=120)) for job in company] == [20, 30]
    finally:
        engine.close(drain=False)
    expected = model.sample(request_keys(7, 3), labels, **options)
    assert (alone != expected).float().mean() < 0.02  # to rounding: the batch has another shape


def few_steps(model: Family, **asked: float) -> dict[str, float]:
    """Keep of the options asked for those that the model has, and take few steps if that can be asked."""
    known = model.sampler().options
    asked |= {"steps": known["steps"].least + 2} if "steps" in known else {}
    return {name: value for name, value in asked.items() if name in known}


def columns_of(sampler: Sampler, n: int, **asked: float) -> dict[str, torch.Tensor]:
    return {name: torch.full((n,), value) for name, value in sampler.settle(asked).items()}


def computed(model: Family, keys: torch.Tensor, labels: torch.Tensor) -> list[torch.Tensor]:
    """List the state after two steps, the samples, and what each module said on the way: a row a sample."""
    found: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, given: Any, made: torch.Tensor) -> None:
        if len(made) == len(keys):
            found.append(made.detach().clone())

    hooks = [module.register_forward_hook(keep) for module in model.modules()]
    sampler = model.sampler()
    options = columns_of(sampler, len(keys), **few_steps(model, guidance=2.0, temperature=0.7))
    with torch.no_grad():
        state = sampler.start(keys, labels, options)
        for step in range(min(2, sampler.steps)):
            state = sampler.step(state, torch.full_like(keys, step))
        found += [*state.values(), sampler.finish(state)]
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 7, 5)], ids=["even", "odd"])
def test_a_sample_is_the_same_bits_in_any_row_of_any_number_of_rows(key: str, shape: Any) -> None:
    """Of rows in granules, as the engine steps them; one by one, other kernels may serve them."""
    model = disturbed(model_of(key, dataclasses.replace(SPECS["grey"], shape=shape)))
    require_same_bits(model, rows=(8, 16, 24, 40, 56))


def test_a_sample_of_28_by_28_pixels_is_the_same_bits_too(key: str) -> None:
    spec = DataSpec(name="mnist", kind="image", shape=(1, 28, 28), levels=256, classes=10)
    require_same_bits(disturbed(build(key, preset(key, "mnist", 0.5).model, spec)), rows=(8, 16, 48))


def require_same_bits(model: Family, rows: tuple[int, ...]) -> None:
    keys, labels = fold(5, torch.arange(64)), torch.arange(64) % 10
    crowd = computed(model, keys, labels)
    for count in (count for count in rows if count % model.sampler().granule == 0):
        place = fold(count, torch.arange(64)).argsort()[:count]
        few = computed(model, keys[place], labels[place])
        for mine, among in zip(few, crowd, strict=True):
            assert len(among) != 64 or torch.equal(mine, among[place])


@torch.no_grad()
def test_a_sample_is_the_same_bits_beside_others_at_any_step(key: str) -> None:
    model = disturbed(model_of(key, SPECS["grey"]))
    sampler = model.sampler()
    options = columns_of(sampler, 64, **few_steps(model, guidance=2.0))
    keys, labels = fold(5, torch.arange(64)), torch.arange(64) % 10
    steps = torch.arange(64) % 3 % sampler.steps  # how many each has taken before the one that counts

    def advance(index: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """Take step 0 with all rows; from then on rows that are not to go on stay as they are."""
        state = sampler.start(keys.clone(), labels.clone(), options)
        for step in range(int(index.max()) + 1):
            now = torch.minimum(index, torch.tensor(step))
            held = {name: tensor.clone() for name, tensor in state.items()}
            state = sampler.step(state, now)
            for name, tensor in state.items():
                stays = (index < step).view(-1, *[1] * (tensor.dim() - 1))
                state[name] = torch.where(stays, held[name], tensor)
        return state

    mixed = advance(steps)
    for step in set(steps.tolist()):
        alike = advance(torch.full_like(steps, step))
        for name, tensor in alike.items():
            assert torch.equal(mixed[name][steps == step], tensor[steps == step]), name


def test_rows_that_are_nobodys_cost_nothing_extra(key: str) -> None:
    sampler = disturbed(model_of(key, SPECS["grey"])).sampler()
    keys, labels = fold(0, torch.arange(8)), torch.arange(8)
    dear = {"guidance": 3.0} if "guidance" in sampler.options else {}

    def operations(options: Mapping[str, torch.Tensor], cleared: bool) -> int:
        with torch.no_grad():
            state = sampler.start(keys, labels, options)
            for name in sampler.options.keys() & state.keys() if cleared else ():
                state[name].fill_(sampler.options[name].default)
            with Counting() as counting:  # type: ignore[no-untyped-call]
                sampler.step(state, torch.zeros_like(keys))
        return int(counting.operations)

    usual = operations(columns_of(sampler, 8), cleared=False)
    assert operations(columns_of(sampler, 8, **dear), cleared=True) == usual


@torch.no_grad()
def test_a_row_that_is_nobodys_may_be_given_any_step(key: str) -> None:
    sampler = disturbed(model_of(key, SPECS["grey"])).sampler()
    keys = fold(0, torch.arange(8))
    most = sampler.options["steps"].most if "steps" in sampler.options else sampler.steps
    for last in {sampler.steps, int(most)}:
        state = sampler.start(keys, keys % 10, columns_of(sampler, 8))
        sampler.step(state, torch.full_like(keys, last - 1))


def test_a_step_costs_no_more_than_the_samples_in_it_need(key: str) -> None:
    """Five samples at one step cost what eight do: what the engine has the others do is what these do."""
    model = disturbed(model_of(key, SPECS["grey"]))
    costs: list[int] = []

    class Counted(type(model.sampler())):  # type: ignore[misc]
        def step(self, state: Any, index: torch.Tensor) -> Any:
            with Counting() as counting:  # type: ignore[no-untyped-call]
                stepped = super().step(state, index)
            costs.append(counting.operations)
            return stepped

    sampler = model.sampler()
    sampler.__class__ = Counted
    model.sampler = lambda: sampler  # type: ignore[method-assign]
    engine = Engine(model, slots=16)
    try:
        for n in (sampler.granule, sampler.granule - 3):
            engine.submit(seeds_of(0, n), torch.arange(n) % 10, few_steps(model)).future.result(timeout=120)
    finally:
        engine.close(drain=False)
    many, few = costs[: len(costs) // 2], costs[len(costs) // 2 :]
    assert few == many


def test_completions_of_many_requests_share_an_engine(key: str) -> None:
    model = disturbed(model_of(key, SPECS["grey"]))
    if not isinstance(model, Completion):
        with pytest.raises(ValueError, match=f"{type(model).__name__} does not complete"):
            Engine(model, completes=True)
        return
    options = few_steps(model)
    batch = batch_of(SPECS["grey"], 12)
    upper, left = torch.zeros(2, *batch.x.shape, dtype=torch.bool)
    upper[:, :, :4], left[..., :4] = True, True
    engine = Engine(model, completes=True)
    try:
        alone = engine.submit(seeds_of(7, 3), batch.y[:3], options, given=(batch.x[:3], upper[:3]))
        expected = alone.future.result(timeout=120)
        jobs = [
            engine.submit(seeds_of(seed, 12), batch.y, options, given=(batch.x, known))
            for seed, known in ((7, left), (7, upper), (8, upper))
        ]
        drawn = [job.future.result(timeout=120) for job in jobs]
        for x, known in zip(drawn, (left, upper, upper), strict=True):
            assert torch.equal(x[known], batch.x[known])
        assert torch.equal(drawn[1][:3], expected)
    finally:
        engine.close(drain=False)
    keys = request_keys(7, 3)
    directly = model.complete(batch.x[:3], upper[:3], keys, batch.y[:3], **options)
    assert (directly != expected).float().mean() < 0.02  # to rounding: the batch has another shape


def test_an_unfinished_sample_has_a_preview(key: str) -> None:
    model = disturbed(model_of(key, SPECS["colour"]))
    sampler = model.sampler()
    keys = fold(0, torch.arange(4))
    options = {name: torch.full((4,), float(option.default)) for name, option in sampler.options.items()}
    with torch.no_grad():
        state = sampler.start(keys, keys % 3, options)
        begun = {name: (tensor.dtype, tensor.shape) for name, tensor in state.items()}
        for step in range(max(1, sampler.steps // 2)):
            state = sampler.step(state, torch.full_like(keys, step))
            assert {name: (tensor.dtype, tensor.shape) for name, tensor in state.items()} == begun
        held = {name: tensor.clone() for name, tensor in state.items()}
        preview = sampler.finish(state)
    assert all(torch.equal(state[name], tensor) for name, tensor in held.items())
    assert preview.shape == (4, *model.spec.shape)
    assert preview.dtype == torch.uint8


def test_guidance_weighs_the_label(key: str) -> None:
    model = disturbed(model_of(key, SPECS["grey"]))
    if "guidance" not in model.sampler().options:
        return
    keys, labels = fold(0, torch.arange(16)), torch.arange(16) % 10
    usual, without = model.sample(keys, labels), model.sample(keys, labels, guidance=0.0)
    assert torch.equal(usual, model.sample(keys, labels, guidance=1.0))
    assert not torch.equal(usual, without)
    assert torch.equal(without, model.sample(keys))
    assert torch.equal(model.sample(keys, guidance=3.0), model.sample(keys))


def test_steps_are_as_many_as_asked_for(key: str) -> None:
    model = disturbed(model_of(key, SPECS["grey"]))
    option = model.sampler().options.get("steps")
    if option is None:
        return
    assert (option.default, option.whole) == (model.sampler().steps, True)
    assert option.least >= 1
    keys = fold(0, torch.arange(4))
    few = model.sample(keys, steps=option.default // 2)
    assert few.shape == (4, *model.spec.shape)
    assert not torch.equal(few, model.sample(keys))


def test_completion_keeps_what_is_known(key: str) -> None:
    spec = SPECS["colour"]
    model = disturbed(model_of(key, spec))
    if not isinstance(model, Completion):
        return
    batch = batch_of(spec, 4)
    known = torch.zeros(batch.x.shape, dtype=torch.bool)
    known[:, :, :6] = True
    filled = model.complete(batch.x, known, batch.key, batch.y)
    assert filled.shape == batch.x.shape
    assert filled.dtype == torch.uint8
    assert torch.equal(filled[known], batch.x[known])
    # What is unknown is not read.
    elsewhere = torch.where(known, batch.x, 0)
    assert torch.equal(filled, model.complete(elsewhere, known, batch.key, batch.y))


def test_each_loss_falls_on_a_fixed_batch(key: str, digits: Dataset) -> None:
    """One phase at a time: together, those of a game may well rise."""
    model = build(key, preset(key, "digits").model, digits.spec)
    batch = training_batch(digits.splits["train"], seed=0, step=0, batch_size=32)
    for phase in model.phases:
        require_grad(model, phase)
        optimizer = torch.optim.Adam(model.phase_parameters(phase), 2e-3)
        losses = []
        for _ in range(25):
            optimizer.zero_grad()
            loss = model(batch, phase).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.8 * losses[0], phase


def test_likelihood_is_in_nats_and_conditions_on_labels(key: str, digits: Dataset) -> None:
    model = build(key, preset(key, "digits").model, digits.spec).eval()
    if not isinstance(model, Likelihood):
        return
    batch = training_batch(digits.splits["train"], seed=0, step=0, batch_size=16)
    model = disturbed(model)
    assert isinstance(model, Likelihood)
    if isinstance(model, Unnormalized):
        model.normalize()
    nats = model.log_likelihood(batch)
    assert nats.shape == (16,)
    assert not nats.requires_grad
    # No model of 64 pixels of 17 levels is worse than ten times uniform, nor better than certain.
    assert ((nats < 0) & (nats > -10 * 64 * math.log(17))).all()
    assert torch.equal(nats, model.log_likelihood(batch))
    assert not torch.equal(nats, model.log_likelihood(batch.unlabelled()))


def test_latents_decode_to_data(key: str) -> None:
    spec = SPECS["colour"]
    model = model_of(key, spec).eval()
    if not isinstance(model, Latent):
        assert not isinstance(model, Decoder) or model.density == Density.IMPLICIT
        return
    batch = batch_of(spec)
    z = model.encode(batch.x, batch.y)
    assert z.shape == (len(batch.x), model.latent_dims)
    x = model.decode(z, batch.y)
    assert x.shape == batch.x.shape
    assert x.dtype == torch.uint8


def test_a_copy_shares_nothing(key: str) -> None:
    model = model_of(key, SPECS["grey"])
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert any(parameter.abs().sum() > 0 for parameter in twin.parameters())
