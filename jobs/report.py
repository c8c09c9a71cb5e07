"""A comparison as people read it: four tables, one for each thing that a generative model should be good at.

Each is in the order of its first column, the best first. Families whose samples are copies of the training
images stand last among those that are good to sample from, whatever else their samples look like.
"""

import html
import math
import statistics
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from gdl_ray.evaluate.metrics import METRICS, standard_error
from gdl_ray.evaluate.ranking import Standing, rank

Figures = Mapping[str, float]
"""Metrics of one model, by name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A row of each table: a family with all its seeds, or data to read the figures of families beside."""

    name: str
    figures: Sequence[Figures]
    """Of each seed."""
    versions: Sequence[str] = ()
    """As `digits-vae@3`, of each seed."""
    curve: Sequence[tuple[float, float]] = ()
    """Seconds of training, and bits/dim on the validation split, of the first seed."""
    samples_png: bytes = b""
    """Picture of samples, of the first seed."""
    is_reference: bool = False

    def mean(self, metric: str) -> float | None:
        """Average a metric over seeds; None unless all have it."""
        values = self.values(metric)
        return statistics.fmean(values) if values else None

    def values(self, metric: str) -> list[float]:
        """List a metric of each seed; nothing unless all have it."""
        values = [figures[metric] for figures in self.figures if metric in figures]
        return values if len(values) == len(self.figures) else []

    def spread(self, metric: str) -> float | None:
        """Tell the standard deviation over seeds; of one seed, the standard error, where it has one."""
        values = self.values(metric)
        return statistics.stdev(values) if len(values) > 1 else self.mean(standard_error(metric))


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """A table: a question, and the metrics that answer it, each under a short heading."""

    title: str
    asks: str
    columns: Mapping[str, str]
    """Headings, by metric. The first that a family has gives its place."""


_DISTANCE = "samples/kernel_distance"

SECTIONS = (
    Section(
        title="Expressive",
        asks="does it reach all of the data, and how likely are they to it?",
        columns={
            "samples/coverage": "coverage",
            "samples/recall": "recall",
            "samples/class_coverage": "classes",
            "test/bits_per_dim_exact": "bits/dim exact",
            "test/bits_per_dim_lower_bound_tight": "bits/dim bound",
            "test/bits_per_dim_estimate_tight": "bits/dim estimate",
        },
    ),
    Section(
        title="Efficient to train",
        asks="what does it cost?",
        columns={
            "efficiency/seconds_to_quality": "s to quality",
            "efficiency/usd_to_quality": "USD to quality",
            "efficiency/examples_per_s": "examples/s",
            "efficiency/parameters": "parameters",
            "efficiency/training_memory_mib": "MiB",
        },
    ),
    Section(
        title="Good to sample from",
        asks="are samples like data, of the class asked for, new, and soon there?",
        columns={
            _DISTANCE: "kernel",
            "samples/frechet_distance": "Fréchet",
            "samples/precision": "precision",
            "samples/density": "density",
            "samples/label_fidelity": "labels",
            "samples/copied_share": "copied",
            "efficiency/ms_per_sample_batch_1": "ms alone",
            "efficiency/samples_per_s_batch_64": "1/s in 64",
        },
    ),
    Section(
        title="Interpretable",
        asks="does it know classes, and has it a space to look into?",
        columns={
            "test/bayes_accuracy": "Bayes",
            "latent/probe_accuracy": "probe",
            "latent/active_units": "active units",
            "latent/smoothness": "smoothness",
        },
    ),
)


def ordered(section: Section, entries: Sequence[Entry]) -> list[Entry]:
    """Put families in the order of a table: the best first, references after all of them."""
    lead = next(iter(section.columns))
    sign = 1 if METRICS[lead].better == "lower" else -1

    def place(entry: Entry) -> tuple[bool, bool, float]:
        mean = entry.mean(lead)
        is_behind = lead.startswith("samples/") and is_memorised(entry)
        return entry.is_reference, is_behind, math.inf if mean is None else sign * mean

    return sorted((entry for entry in entries if _measured(section, entry)), key=place)


def leaders(section: Section, entries: Sequence[Entry]) -> list[Entry]:
    """Find who leads a table: the first, or, among samples, all whom their errors do not tell from it."""
    first = [entry for entry in ordered(section, entries) if not entry.is_reference][:1]
    if next(iter(section.columns)) != _DISTANCE:
        return first
    places = rank(
        {
            entry.name: _standing(entry)
            for entry in entries
            if not entry.is_reference and entry.mean(_DISTANCE) is not None
        }
    )
    best = [name for place, name in places if place == 1]
    return [entry for entry in ordered(section, entries) if entry.name in best]


def _standing(entry: Entry) -> Standing:
    """Take the mean over seeds; its error is that which they show, or which each has, whichever is larger."""
    distances, errors = entry.values(_DISTANCE), entry.values(standard_error(_DISTANCE))
    n = len(distances)
    shown = statistics.stdev(distances) / math.sqrt(n) if n > 1 else 0.0
    had = math.hypot(*errors) / n
    return Standing(
        distance=statistics.fmean(distances), error=max(shown, had), is_memorised=is_memorised(entry)
    )


def _measured(section: Section, entry: Entry) -> bool:
    return not entry.is_reference or any(entry.mean(metric) is not None for metric in section.columns)


def is_memorised(entry: Entry) -> bool:
    """Tell whether samples, of any seed, are copies of training images."""
    return any(figures.get("samples/memorised", 0) for figures in entry.figures)


def cells(section: Section, entries: Sequence[Entry]) -> list[list[str]]:
    """Write a table: headings, then a row for each entry, in order."""
    metrics = [metric for metric in section.columns if any(entry.values(metric) for entry in entries)]
    rows = [["", *(f"{section.columns[metric]} {_ARROWS[METRICS[metric].better]}" for metric in metrics)]]
    for entry in ordered(section, entries):
        note = " (copies)" if is_memorised(entry) else ""
        rows.append([entry.name + note, *(figure(entry, metric) for metric in metrics)])
    return rows


def figure(entry: Entry, metric: str) -> str:
    """Write a metric of an entry, with its spread where there is one."""
    mean = entry.mean(metric)
    return "-" if mean is None else written(mean, entry.spread(metric))


def written(value: float, spread: float | None = None) -> str:
    """Write a value to the digits that its spread leaves certain; to three without one."""
    if not spread:
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    digits = max(0, 1 - math.floor(math.log10(spread)))
    return f"{value:,.{digits}f} ± {spread:,.{digits}f}"


def picks(entries: Sequence[Entry]) -> list[str]:
    """Say for each table who leads it, and by what."""
    lines = []
    for section in SECTIONS:
        lead = next(iter(section.columns))
        heading = section.columns[lead]
        best = [
            f"{entry.name} ({heading} {figure(entry, lead)})"
            for entry in leaders(section, entries)
            if entry.values(lead)
        ]
        lines += [f"{section.title}: {' or '.join(best)}"] if best else []
    return lines


def text(entries: Sequence[Entry]) -> str:
    """Lay the tables out for a terminal."""
    return "\n\n".join(f"{_title(section)}\n{_aligned(cells(section, entries))}" for section in SECTIONS)


def _title(section: Section) -> str:
    return f"{section.title}: {section.asks}"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = [
        [
            f"{cell:{'<' if i == 0 else '>'}{width}}"
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        for row in rows
    ]
    return "\n".join(("  " + "  ".join(row)).rstrip() for row in padded)


def markdown(title: str, facts: Mapping[str, str], entries: Sequence[Entry]) -> str:
    """Write the comparison as Markdown: the facts that hold for all of it, who leads, and the tables."""
    lines = [f"# {title}", "", *(f"- {name}: {value}" for name, value in facts.items()), ""]
    lines += [*(f"- **{line.replace(':', ':**', 1)}" for line in picks(entries))]
    for section in SECTIONS:
        head, *rows = cells(section, entries)
        lines += ["", f"## {_title(section)}", "", _bars(head), "|---" + "|---:" * (len(head) - 1) + "|"]
        lines += map(_bars, rows)
    return "\n".join([*lines, "", "## What the columns are", "", *_legend()]) + "\n"


def _bars(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _legend() -> list[str]:
    """Explain each column in a line."""
    columns = {heading: metric for section in SECTIONS for metric, heading in section.columns.items()}
    return [
        f"- **{heading}** (`{metric}`{f', {METRICS[metric].unit}' if METRICS[metric].unit else ''}): "
        f"{METRICS[metric].meaning}"
        for heading, metric in columns.items()
    ]


_ARROWS = {"higher": "↑", "lower": "↓", "neither": " "}

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem }
body { color: #222; background: #fff }
table { border-collapse: collapse; margin: .5rem 0 2rem; display: block; overflow-x: auto }
table { font-variant-numeric: tabular-nums }
th, td { padding: .25rem .75rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #ddd }
th:first-child, td:first-child { text-align: left }
tbody tr:first-child td { font-weight: 600 }
th { cursor: help }
tr.reference td { color: #777; font-style: italic; font-weight: 400 }
img { max-width: 100% }
"""


def page(title: str, facts: Mapping[str, str], entries: Sequence[Entry], picture_png: bytes) -> str:
    """Write the comparison as a page that needs no other file."""
    say = html.escape
    body = [f"<h1>{say(title)}</h1>", "<ul>"]
    body += [f"<li>{say(name)}: {say(value)}</li>" for name, value in facts.items()]
    body += [f"<li><b>{say(line)}</b></li>" for line in picks(entries)]
    body += [
        "</ul>",
        f'<img alt="{say(title)}" src="data:image/png;base64,{b64encode(picture_png).decode()}">',
    ]
    for section in SECTIONS:
        body += [f"<h2>{say(_title(section))}</h2>", *_table(section, entries)]
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{say(title)}</title>'
        f"<style>{_STYLE}</style>{''.join(body)}</html>\n"
    )


def _table(section: Section, entries: Sequence[Entry]) -> Iterator[str]:
    head, *rows = cells(section, entries)
    meanings = {heading: METRICS[metric].meaning for metric, heading in section.columns.items()}
    yield "<table><thead><tr>"
    for cell in head:
        yield f'<th title="{html.escape(meanings.get(cell[:-2], ""))}">{html.escape(cell)}</th>'
    yield "</tr></thead><tbody>"
    for entry, row in zip(ordered(section, entries), rows, strict=True):
        yield '<tr class="reference">' if entry.is_reference else "<tr>"
        yield "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
    yield "</tbody></table>"
