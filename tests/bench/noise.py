"""Time of our noise against torch.randn, for 64 samples of 784 values on one CPU thread: at most three times.

    python tests/bench/noise.py [ROUNDS]

The three draw in turns in one process; the ratio is that of the medians.
"""

import sys
import time
from collections.abc import Callable
from statistics import median

import torch

from gdl_ray.random import normal, uniform

KEYS, SHAPE = torch.arange(64), (784,)
DRAWS: dict[str, Callable[[], object]] = {
    "torch.randn": lambda: torch.randn(len(KEYS), *SHAPE),
    "normal": lambda: normal(KEYS, SHAPE),
    "uniform": lambda: uniform(KEYS, SHAPE),
}


def main(rounds: int) -> None:
    """Draw in turns, and print the ratio of medians."""
    torch.set_num_threads(1)
    spent_s: dict[str, list[float]] = {name: [] for name in DRAWS}
    for _ in range(rounds):
        for name, draw in DRAWS.items():
            since = time.perf_counter()
            draw()
            spent_s[name].append(time.perf_counter() - since)
    reference_s = median(spent_s.pop("torch.randn"))
    for name, times in spent_s.items():
        ratio = median(times) / reference_s
        print(f"{name}: {median(times) * 1e3:.2f} ms, {ratio:.2f} times torch.randn (bar: 3)")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000)
