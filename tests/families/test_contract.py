"""What every family promises, checked on every entry of the table."""

import copy
import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from gdl_ray.data import Dataset, training_batch
from gdl_ray.families import FAMILIES, build, preset
from gdl_ray.family import UNLABELLED, Batch, DataSpec, Family, Latent, Likelihood
from gdl_ray.random import fold, uniform
from gdl_ray.train import checkpoint
from gdl_ray.train.parallel import require_grad

SPECS = {
    "grey": DataSpec(name="grey", kind="image", shape=(1, 8, 8), levels=17, classes=10),
    "colour": DataSpec(name="colour", kind="image", shape=(3, 12, 10), levels=256, classes=3),
    "unlabelled": DataSpec(name="unlabelled", kind="image", shape=(1, 8, 8), levels=2, classes=0),
}

pytestmark = pytest.mark.parametrize("key", FAMILIES)


def batch_of(spec: DataSpec, size: int = 8) -> Batch:
    keys = fold(3, torch.arange(size))
    x = (uniform(keys, spec.shape) * spec.levels).to(torch.uint8)
    y = torch.arange(size) % spec.classes if spec.classes else torch.full((size,), UNLABELLED)
    return Batch(x, y, keys)


def model_of(key: str, spec: DataSpec) -> Family:
    return build(key, preset(key, "digits").model, spec)


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
    checkpoint.save(tmp_path / "saved", model, b"png", {}, {})
    loaded = checkpoint.load_family(tmp_path / "saved")
    assert loaded.spec == model.spec
    assert loaded.config == model.config
    keys = fold(0, torch.arange(4))
    assert torch.equal(loaded.sample(keys), model.sample(keys))


def test_configs_are_frozen_data(key: str) -> None:
    presets: Mapping[str, Any] = FAMILIES[key].presets
    assert {"digits", "mnist"} <= set(presets)
    for make in presets.values():
        config: Any = make().model
        kind: Any = FAMILIES[key].Config
        assert isinstance(config, kind)
        assert json.loads(json.dumps(dataclasses.asdict(config))) == dataclasses.asdict(config)
        with pytest.raises(dataclasses.FrozenInstanceError):
            config.label_drop = 0.0


def test_loss_falls_on_a_fixed_batch(key: str, digits: Dataset) -> None:
    model = build(key, preset(key, "digits").model, digits.spec)
    batch = training_batch(digits.splits["train"], seed=0, step=0, batch_size=32)
    optimizers = {p: torch.optim.Adam(model.phase_parameters(p), 2e-3) for p in model.phases}
    totals = []
    for _ in range(25):
        total = 0.0
        for phase, optimizer in optimizers.items():
            require_grad(model, phase)
            optimizer.zero_grad()
            loss = model(batch, phase).loss
            loss.backward()
            optimizer.step()
            total += loss.item()
        totals.append(total)
    assert totals[-1] < 0.8 * totals[0]


def test_likelihood_is_in_nats_and_conditions_on_labels(key: str, digits: Dataset) -> None:
    model = build(key, preset(key, "digits").model, digits.spec).eval()
    if not isinstance(model, Likelihood):
        return
    batch = training_batch(digits.splits["train"], seed=0, step=0, batch_size=16)
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
        return
    batch = batch_of(spec)
    z = model.encode(batch.x, batch.y)
    assert z.shape[0] == len(batch.x)
    assert z.dim() == 2
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
