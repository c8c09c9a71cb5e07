"""Micro-batches: a worker's share of a batch in pieces that fit into its memory, one after the other."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from gdl_ray.data.batches import share_of
from gdl_ray.family import Batch, Family, Precision
from gdl_ray.train.parallel import fast_matrix_products
from gdl_ray.train.plan import Plan


class MemoryExhaustedError(Exception):
    """A forward and backward pass does not fit into a device's memory; the message says what would."""


def micro_batches(family: Family, batch: Batch, most: int) -> Iterator[tuple[Batch, bool]]:
    """Cut a batch into pieces of about one size, of at most `most` examples each; also tells the last one.

    What the family carries is cut too: while a piece is out, the family carries that piece's rows alone.
    """
    count = -(-len(batch.x) // most)
    if count == 1:
        yield batch, True
        return
    carried, after = family.carried, []
    for number in range(count):
        share = share_of(len(batch.x), number, count)
        rows = slice(share.start, share.stop)
        family.carried = {name: tensor[rows] for name, tensor in carried.items()}
        yield Batch(batch.x[rows], batch.y[rows], batch.key[rows]), number == count - 1
        after.append(family.carried)
    family.carried = {name: torch.cat([each[name] for each in after]) for name in after[0]}


@contextmanager
def fitting(family: Family, batch: Batch, phase: str, plan: Plan) -> Iterator[None]:
    """Find out, where a phase runs out of memory, how many examples at once would not.

    Raises:
        MemoryExhaustedError: naming the micro-batch that fits.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        traceback.clear_frames(error.__traceback__)  # they hold what the failed pass has in memory
        failed = str(error).partition("\n")[0]
    else:
        return
    size = min(plan.micro_batch or len(batch.x), len(batch.x))
    precision = plan.optimization.precision
    fits = next((half for half in _halves(size) if _fits(family, batch, phase, precision, half)), 0)
    cure = (
        f"{fits} fit: --micro-batch {fits} trains the same"
        if fits
        else "nor does one: make the model smaller"
    )
    raise MemoryExhaustedError(f"{size} examples at once exceed a worker's memory ({failed}); {cure}")


def _halves(size: int) -> Iterator[int]:
    while size > 1:
        size = -(-size // 2)
        yield size


def _fits(family: Family, batch: Batch, phase: str, precision: Precision, size: int) -> bool:
    """Try a forward and a backward pass, beside a gradient of those before."""
    family.zero_grad(set_to_none=True)
    if batch.x.is_cuda:
        torch.cuda.empty_cache()
    parameters = list(family.phase_parameters(phase))
    carried = family.carried
    family.carried = {}
    try:
        for _ in range(2):
            with fast_matrix_products(batch.x.device, precision):
                loss = family(Batch(batch.x[:size], batch.y[:size], batch.key[:size]), phase).loss
            gradient = torch.autograd.grad(loss, parameters, allow_unused=True)  # noqa: F841  (held meanwhile)
    except torch.OutOfMemoryError:
        return False
    finally:
        family.carried = carried
    return True
