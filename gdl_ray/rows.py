"""The rows of one state, where an engine keeps the samples that are under way.

Samples fill the first rows: where one leaves, the last moves in. A step is taken with these rows alone, up to
a multiple of the sampler's granule: a few samples do not pay for all rows. Kernels of such shapes were found
to give a row the same values wherever it is and however many there are: bit for bit on the CPU, for the
families, shapes and sizes that tests/families/test_contract.py covers. Elsewhere a sample depends on its
neighbours by rounding alone.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from gdl_ray.family import Sampler, State


class Rows:
    """As many samples as there are rows, at most.

    Args:
        sampler: that steps them.
        most: how many rows there are, a multiple of the sampler's granule.
        device: that holds the state.

    Raises:
        ValueError: most is no multiple of the granule.
    """

    def __init__(self, sampler: Sampler, most: int, device: torch.device) -> None:
        if most < 1 or most % sampler.granule:
            raise ValueError(f"slots={most} must be a positive multiple of {sampler.granule}")
        self._sampler, self._most, self._device = sampler, most, device
        self._state: State = {}
        # Each row's step number, 0 where nobody is. On the CPU, where asking needs no wait.
        self._index = torch.zeros(most, dtype=torch.int64)
        self._count = 0  # the first rows are somebody's, the others nobody's

    def computed(self, count: int) -> int:
        """Count the rows that are computed for so many samples; all on an accelerator, to which it is one."""
        granule = self._sampler.granule
        return -(-count // granule) * granule if self._device.type == "cpu" else self._most

    def add(self, started: State, count: int) -> None:
        """Let samples follow those that are there: the first rows of what `Sampler.start` made."""
        if not self._state:
            self._state = {
                name: tensor[:1].repeat(self._most, *[1] * (tensor.dim() - 1))
                for name, tensor in started.items()
            }
            self._clear(0, self._most)
        end = self._count + count
        for name, tensor in self._state.items():
            tensor[self._count : end] = started[name][:count]
        self._count = end

    def step(self) -> None:
        """Advance every sample by its next step."""
        rows = self.computed(self._count)
        view = {name: tensor[:rows] for name, tensor in self._state.items()}
        index = self._index[:rows].clone()
        index[self._count :] = index[0]  # a step that no sample takes might cost as much as one that does
        stepped = self._sampler.step(dict(view), index.to(self._device))
        for name, tensor in view.items():
            if stepped[name] is not tensor:  # else it was overwritten in its place
                tensor.copy_(stepped[name])
        self._index[: self._count] += 1

    def finish(self, rows: list[int]) -> Callable[[list[int]], Tensor]:
        """Read off the samples in some rows: a function gives those of a part of them, on the CPU."""
        some = self._sampler.padded(torch.tensor(rows, device=self._device), self._most)
        samples = self._sampler.finish(_Chosen(self._state, some)).cpu()
        place = {row: i for i, row in enumerate(rows)}
        return lambda part: samples[[place[row] for row in part]]

    def free(self, rows: list[int]) -> list[int]:
        """Let some samples go, the last of the others move in; returns the former row of each that stays."""
        before, kept = self._count, self._count - len(rows)
        holes = [row for row in rows if row < kept]
        movers = sorted(set(range(kept, before)).difference(rows))
        for tensor in [*self._state.values(), self._index] if holes else []:
            tensor[holes] = tensor[movers]
        self._count = kept
        self._clear(kept, before)
        moved = dict(zip(holes, movers, strict=True))
        return [moved.get(row, row) for row in range(kept)]

    def reset(self) -> None:
        """Let all samples go, and whatever is wrong with the state."""
        self._state, self._count = {}, 0
        self._index.zero_()

    def _clear(self, begin: int, end: int) -> None:
        """Let rows that are nobody's hold the defaults: a costly option must not be paid for longer."""
        self._index[begin:end] = 0
        for name, option in self._sampler.options.items():
            if name in self._state:
                self._state[name][begin:end] = option.default


class _Chosen(State):
    """Some rows of a state, each tensor taken when it is asked for: few of them are, and others are large."""

    def __init__(self, state: State, rows: Tensor) -> None:
        super().__init__()
        self._state, self._rows = state, rows

    def __missing__(self, name: str) -> Tensor:
        self[name] = self._state[name][self._rows]
        return self[name]
