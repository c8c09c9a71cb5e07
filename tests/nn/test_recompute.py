"""What is computed again has the same loss and gradient, and less of it is kept."""

import pytest
import torch
from torch import Tensor

from gdl_ray.data import Dataset, training_batch
from gdl_ray.families import FAMILIES, build, preset
from gdl_ray.family import Family
from gdl_ray.nn.recompute import recompute_blocks
from gdl_ray.nn.transformer import CausalTransformer


def gradients(family: Family, digits: Dataset) -> list[Tensor]:
    """Compute each phase's loss and, one behind the other, its gradients."""
    batch = training_batch(digits.splits["train"], seed=0, step=0, batch_size=8)
    found = []
    for phase in family.train().phases:
        loss = family(batch, phase).loss
        parts = torch.autograd.grad(loss, list(family.phase_parameters(phase)))
        found += [loss.detach(), torch.cat([part.flatten() for part in parts])]
    return found


@pytest.mark.parametrize("key", FAMILIES)
def test_losses_and_gradients_are_the_same(key: str, digits: Dataset) -> None:
    model = preset(key, "digits").model
    kept, again = (build(key, model, digits.spec) for _ in range(2))
    recompute_blocks(again)
    recompute_blocks(again)  # a second time changes nothing
    for expected, found in zip(gradients(kept, digits), gradients(again, digits), strict=True):
        assert torch.equal(found, expected)
    assert again.state_dict().keys() == kept.state_dict().keys()


def kept_bytes(network: CausalTransformer) -> int:
    """Add up what a forward pass keeps for the backward one, beside weights."""
    weights = {weight.data_ptr() for weight in network.parameters()}
    sizes: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in weights:
            sizes[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        h = network(torch.ones(4, 16, 32, requires_grad=True))
    del h
    return sum(sizes.values())


def test_less_is_kept() -> None:
    network = CausalTransformer(width=32, depth=4, heads=2)
    before = kept_bytes(network)
    recompute_blocks(network)
    assert kept_bytes(network) < before / 4
