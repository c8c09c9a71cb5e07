"""A comparison in one picture: what each family is worth, what it costs, and what it draws."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from PIL import Image

from gdl_ray.evaluate.metrics import bits_per_dim
from gdl_ray.family import LikelihoodKind
from jobs.report import Entry

# Okabe and Ito's colours, which people with any kind of colour vision tell apart.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
_MARKS = {LikelihoodKind.EXACT: "o", LikelihoodKind.LOWER_BOUND: "v", LikelihoodKind.ESTIMATE: "s"}
_STYLE: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10}


def picture(title: str, entries: Sequence[Entry]) -> bytes:
    """Draw a PNG: quality and speed, likelihood and fidelity, learning, and samples of each family."""
    families = [entry for entry in entries if not entry.is_reference]
    colours = {entry.name: _COLOURS[i % len(_COLOURS)] for i, entry in enumerate(families)}
    grid_columns = 4
    grid_rows = -(-len(families) // grid_columns)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(13, 4.2 + 1.9 * grid_rows), layout="constrained", dpi=110)
        figure.suptitle(title)
        above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=[4.0, 1.9 * grid_rows]).flat
        quality, likelihood, curves = above.subplots(1, 3)
        _draw_quality(quality, entries, colours)
        _draw_likelihood(likelihood, families, colours)
        _draw_curves(curves, families, colours)
        panels = list(below.subplots(grid_rows, grid_columns, squeeze=False).flat)
        for panel in panels:
            panel.axis("off")
        for panel, entry in zip(panels, families, strict=False):
            _draw_samples(panel, entry, colours)
        buffer = io.BytesIO()
        # Without the name of the software, and so its version: equal data are equal files.
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _draw_quality(axes: Axes, entries: Sequence[Entry], colours: Mapping[str, str]) -> None:
    """Set the distance of samples against the time that they take."""
    x, y = "efficiency/ms_per_sample_batch_64", "samples/frechet_distance"
    for entry in entries:
        distance, milliseconds = entry.mean(y), entry.mean(x)
        if distance is None:
            continue
        if entry.is_reference:
            axes.axhline(distance, color="0.6", linestyle=":", linewidth=1)
            axes.annotate(
                entry.name,
                (1, distance),
                (0, 2),
                xycoords=("axes fraction", "data"),
                ha="right",
                color="0.5",
                textcoords="offset points",
            )
        elif milliseconds is not None:
            _mark(axes, entry, milliseconds, distance, "o", colours)
    axes.set(xscale="log", xlabel="ms per sample, 64 at once", title="good samples, and soon: below left")
    axes.xaxis.set_major_formatter("{x:g}")
    _scale_distance(axes)


def _draw_likelihood(axes: Axes, families: Sequence[Entry], colours: Mapping[str, str]) -> None:
    """Set bits/dim, of each kind with its mark, against the distance of samples."""
    for entry in families:
        distance = entry.mean("samples/frechet_distance")
        for kind, mark in _MARKS.items():
            bits = entry.mean(bits_per_dim(kind, tight=True))
            if bits is not None and distance is not None:
                _mark(axes, entry, bits, distance, mark, colours)
    for kind, mark in _MARKS.items():
        axes.plot([], [], mark, color="0.4", label=kind.replace("_", " "))
    axes.legend(frameon=False, title="bits/dim are")
    axes.set(xlabel="test bits/dim", title="likely data, and good samples: below left")
    _scale_distance(axes)


def _scale_distance(axes: Axes) -> None:
    """Give an axis of distances the numbers that people read, and names at its right end room."""
    axes.set(yscale="log", ylabel="Fréchet distance")
    axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    for set_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        set_formatter("{x:g}")
    axes.margins(x=0.15)


def _mark(axes: Axes, entry: Entry, x: float, y: float, mark: str, colours: Mapping[str, str]) -> None:
    axes.plot([x], [y], mark, color=colours[entry.name], markersize=8)
    axes.annotate(entry.name, (x, y), (6, 4), textcoords="offset points", color=colours[entry.name])


def _draw_curves(axes: Axes, families: Sequence[Entry], colours: Mapping[str, str]) -> None:
    """Draw what validation said while training went on."""
    for entry in families:
        if entry.curve:
            seconds, bits = zip(*entry.curve, strict=True)
            axes.plot(seconds, bits, color=colours[entry.name], label=entry.name)
    lowest = [bits for entry in families for _, bits in entry.curve]
    if lowest:
        axes.set_ylim(min(lowest) - 0.05, np.quantile(lowest, 0.95))
        axes.legend(frameon=False, loc="upper right")
    axes.set(xlabel="seconds of training", ylabel="validation bits/dim, each of its kind", title="learning")


def _draw_samples(axes: Axes, entry: Entry, colours: Mapping[str, str]) -> None:
    axes.imshow(
        Image.open(io.BytesIO(entry.samples_png)), cmap="gray", vmin=0, vmax=255, interpolation="nearest"
    )
    axes.set_title(entry.name, color=colours[entry.name])
