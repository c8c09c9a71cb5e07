"""What a sampling step costs in CPU time, on one thread as in a replica: the cache of the past, rows in use.

    python tests/bench/engine.py [cache] [rows]

`cache`: sixteen 28x28 images drawn pixel by pixel by the transformer of the mnist preset, with the keys and
values of past pixels kept, against computing the past anew at each pixel: at least twenty times as fast. The
slow way is timed at pixels spread evenly over the image, and the time of all follows from their mean; the
law that both find for such a pixel is compared. `rows`: milliseconds a step, and a whole sample, of the
digits presets with as many rows in use. Weights are random: they change no time.
"""

import sys
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from torch import Tensor

from gdl_ray.engine import request_keys
from gdl_ray.families import FAMILIES, build, preset
from gdl_ray.families.autoregressive import Autoregressive
from gdl_ray.family import DataSpec, Sampler, State
from gdl_ray.random import uniform

DIGITS = DataSpec(name="digits", kind="image", shape=(1, 8, 8), levels=17, classes=10)
MNIST = DataSpec(name="mnist", kind="image", shape=(1, 28, 28), levels=256, classes=10)
BATCH = 16
POSITIONS = 14
ROWS = (8, 16, 24, 32, 48, 64)
BAR = 20


def seconds(work: Callable[[], object]) -> float:
    """Time a piece of work: of this process, so that others on the machine take nothing from it."""
    since = time.process_time()
    work()
    return time.process_time() - since


def started(sampler: Sampler, rows: int) -> State:
    """Begin as many samples, of all classes."""
    options = {name: torch.full((rows,), value) for name, value in sampler.settle({}).items()}
    return sampler.start(request_keys(0, rows), torch.arange(rows) % 10, options)


def anew(model: Autoregressive, x: Tensor, y: Tensor, position: int) -> Tensor:
    """Find the parameters of a pixel's law, (B, ...), from all pixels before it and no cache."""
    before = torch.arange(position + 1)
    seen = x[:, :, model.window[before]].transpose(1, 2)
    h = model.transformer(model._input(seen, before, y[:, None]))
    parameters: Tensor = model.head(h[:, -1])
    return parameters


def draw_anew(model: Autoregressive, state: State, position: int) -> Tensor:
    """Draw a pixel of each image, (B,), without a cache."""
    parameters = anew(model, state["x"], state["label"], position)
    below = model.head.conditional(parameters, state["x"][:, :0, position]).softmax(-1).cumsum(-1)
    u = uniform(state["key"], (1,), torch.full((BATCH,), position))
    return torch.searchsorted(below, u * below[:, -1:]).squeeze(1)


@torch.no_grad()
def cache() -> None:
    """Print the time of a batch of images, with the cache and without."""
    model = build("autoregressive", preset("autoregressive", "mnist").model, MNIST).eval()
    assert isinstance(model, Autoregressive)
    sampler = model.sampler()
    state = started(sampler, BATCH)
    kept_s = 0.0
    for position in range(sampler.steps):
        index = torch.full((BATCH,), position)
        kept_s += seconds(partial(sampler.step, state, index))
    positions = torch.linspace(0, sampler.steps - 1, POSITIONS).round().int().tolist()
    for position in positions:  # the last steps once more, for the laws
        index = torch.full((BATCH,), position)
        kept = model._step(state["x"], state["cache"], index, state["label"])
        torch.testing.assert_close(anew(model, state["x"], state["label"], position), kept)
    draw_anew(model, state, 0)
    spent_s = [seconds(partial(draw_anew, model, state, at)) for at in positions]
    anew_s = sum(spent_s) / len(spent_s) * sampler.steps
    print(f"{BATCH} images of 784 pixels: {kept_s:.1f} s with the cache, {anew_s:.1f} s without")
    print(f"{anew_s / kept_s:.0f} times as fast (bar: {BAR})")


@torch.no_grad()
def rows() -> None:
    """Print the cost of a step against the rows in use."""
    print(f"{'ms a step with rows':20}", *(f"{count:8}" for count in ROWS), "   ms a sample, 8 rows and 64")
    for key in FAMILIES:
        sampler = build(key, preset(key, "digits").model, DIGITS).eval().sampler()
        step_ms = [1e3 * step_seconds(sampler, count) for count in ROWS]
        whole = f"{step_ms[0] * sampler.steps:12.1f} {step_ms[-1] * sampler.steps:8.1f}"
        print(f"{key:20}", *(f"{ms:8.2f}" for ms in step_ms), whole)


def step_seconds(sampler: Sampler, count: int) -> float:
    """Time a step of as many samples: the median of the first ones."""
    state = started(sampler, count)
    spent_s = []
    for step in range(15):
        index = torch.full((count,), min(step, sampler.steps - 1))
        since = time.process_time()
        state = sampler.step(state, index)
        spent_s.append(time.process_time() - since)
    return median(spent_s)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[1:] or ["cache", "rows"]:
        {"cache": cache, "rows": rows}[name]()
