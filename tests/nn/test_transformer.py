"""The transformer: its cached steps against its pass over whole sequences, and what each position sees."""

import pytest
import torch

from gdl_ray.nn import transformer
from gdl_ray.nn.transformer import CausalTransformer
from gdl_ray.random import fold, normal


def transformer_of(
    width: int = 12, depth: int = 3, heads: int = 2, dropout: float = 0.0
) -> CausalTransformer:
    """One that no longer is the identity."""
    model = CausalTransformer(width, depth, heads, dropout)
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.copy_(0.3 * normal(torch.tensor([i]), tuple(parameter.shape))[0])
    return model


def sequences(count: int, length: int = 7, width: int = 12) -> torch.Tensor:
    return normal(fold(1, torch.arange(count)), (length, width))


@torch.no_grad()
def test_steps_equal_the_whole_pass_with_each_sequence_at_its_own_position() -> None:
    model, h = transformer_of(), sequences(4)
    expected = model(h)
    cache = model.empty_cache(4, 7, h.device)
    rows, start = torch.arange(4), torch.tensor([0, -2, -5, -1])
    for now in range(12):
        index = start + now
        # A sequence that is not under way repeats its first or its last position.
        index = index.clamp(0, 6)
        output = model.step(h[rows, index], cache, index)
        torch.testing.assert_close(output, expected[rows, index], atol=2e-6, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("length", [70, 200, 256, 400, 784])
def test_a_step_has_the_same_bits_however_far_its_neighbours_are(length: int) -> None:
    model = transformer_of(width=32, depth=2)
    filled = normal(
        fold(2, torch.arange(8)), tuple(model.empty_cache(1, length, torch.device("cpu"))[0].shape)
    )
    h = normal(fold(3, torch.arange(8)), (32,))
    for position in range(0, length - 1, 37):
        index = torch.full((8,), position)
        near = model.step(h, filled.clone(), index)
        index[1:] = torch.linspace(0, length - 1, 7).long()
        assert torch.equal(model.step(h, filled.clone(), index)[0], near[0])


@torch.no_grad()
def test_what_the_cache_held_of_a_sequence_before_does_not_matter() -> None:
    model, h = transformer_of(), sequences(2)
    fresh = model.empty_cache(2, 7, h.device)
    used = normal(torch.arange(2), tuple(fresh.shape[1:]))
    for t in range(7):
        index = torch.full((2,), t)
        assert torch.equal(model.step(h[:, t], fresh, index), model.step(h[:, t], used, index))


@torch.no_grad()
def test_a_sequence_does_not_depend_on_its_neighbours() -> None:
    model, h = transformer_of(), sequences(4)
    one, other = (model.empty_cache(4, 7, h.device) for _ in range(2))
    neighbours = h.clone()
    neighbours[1:] += 1
    for t in range(7):
        index = torch.tensor([t, 0, t, 6])
        first = model.step(h[:, t], one, torch.full((4,), t))
        second = model.step(neighbours[:, t], other, index)
        assert torch.equal(first[0], second[0])


def test_a_position_depends_on_itself_and_all_before_it_alone() -> None:
    model, h = transformer_of(), sequences(1)
    h.requires_grad_()
    outputs = model(h)[0].sum(1)
    jacobian = torch.stack([torch.autograd.grad(y, h, retain_graph=True)[0][0].norm(dim=1) for y in outputs])
    assert torch.equal(jacobian > 1e-4, torch.ones(7, 7).tril().bool())
    assert not jacobian.triu(1).any()


def test_blocks_start_as_the_identity() -> None:
    model, h = CausalTransformer(12, 3, 2), sequences(2)
    assert torch.equal(model(h), model.norm(h))


def test_dropout_needs_a_key_and_each_key_drops_its_own() -> None:
    model, h = transformer_of(dropout=0.5), sequences(2)
    keys = fold(3, torch.arange(2))
    dropped = model(h, keys)
    assert torch.equal(model(h), transformer_of()(h))
    assert not torch.equal(dropped, model(h))
    assert torch.equal(dropped, model(h, keys))
    assert not torch.equal(dropped, model(h, keys, stream=6))
    torch.testing.assert_close(model(h.flip(0), keys.flip(0)).flip(0), dropped)


def test_every_use_of_dropout_has_a_noise_stream_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    streams: list[int] = []

    def spy(x: torch.Tensor, rate: float, key: torch.Tensor | None, stream: int) -> torch.Tensor:
        streams.append(stream)
        return x

    monkeypatch.setattr(transformer, "dropout", spy)
    transformer_of(depth=3, dropout=0.5)(sequences(2), fold(3, torch.arange(2)), stream=10)
    assert sorted(streams) == [10, 11, 12, 13, 14, 15]


def test_a_width_that_heads_do_not_share_is_named() -> None:
    with pytest.raises(ValueError, match="width=10 must be a multiple of heads=4"):
        CausalTransformer(10, 1, 4)
