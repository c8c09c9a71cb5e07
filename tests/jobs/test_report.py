"""Tables of a comparison: their order, their digits, and that each form of them says the same."""

import statistics
from collections.abc import Mapping
from html.parser import HTMLParser

import pytest

from gdl_ray.evaluate.metrics import METRICS
from jobs.report import SECTIONS, Entry, cells, figure, leaders, markdown, ordered, page, picks, text, written

EXPRESSIVE, _, SAMPLING, INTERPRETABLE = SECTIONS
KERNEL, MEMORISED = "samples/kernel_distance", "samples/memorised"


def entry(name: str, *figures: Mapping[str, float], is_reference: bool = False) -> Entry:
    return Entry(name=name, figures=figures or ({},), is_reference=is_reference)


COPIES = entry("copies", {KERNEL: 0.01, MEMORISED: 1.0})
GOOD = entry(
    "good", {KERNEL: 0.02, f"{KERNEL}_standard_error": 0.003, MEMORISED: 0.0}, {KERNEL: 0.04, MEMORISED: 0.0}
)
POOR = entry("poor", {KERNEL: 0.5, "test/bayes_accuracy": 0.9, "test/bits_per_dim_exact": 2.0})
REAL = entry("training images", {KERNEL: 0.001, MEMORISED: 1.0}, is_reference=True)
ALL = [REAL, POOR, COPIES, GOOD]


def test_the_best_come_first_copies_behind_and_references_last() -> None:
    assert [each.name for each in ordered(SAMPLING, ALL)] == ["good", "poor", "copies", "training images"]


def test_what_has_not_the_first_column_stands_behind_and_a_reference_without_any_is_left_out() -> None:
    names = [each.name for each in ordered(INTERPRETABLE, ALL)]
    assert names[0] == "poor"
    assert sorted(names) == ["copies", "good", "poor"]


def test_seeds_give_mean_and_deviation_and_one_seed_its_standard_error() -> None:
    mean, deviation = statistics.fmean([0.02, 0.04]), statistics.stdev([0.02, 0.04])
    assert figure(GOOD, KERNEL) == f"{mean:.3f} ± {deviation:.3f}"
    one = entry("one", GOOD.figures[0])
    assert figure(one, KERNEL) == "0.0200 ± 0.0030"


def test_a_metric_that_a_seed_lacks_is_not_averaged_over_the_others() -> None:
    assert figure(entry("half", {KERNEL: 0.1}, {}), KERNEL) == "-"


@pytest.mark.parametrize(
    ("value", "spread", "shown"),
    [
        (1.73712, 0.00123, "1.7371 ± 0.0012"),
        (1234.5, 67.8, "1,234 ± 68"),
        (0.98611, None, "0.986"),
        (123456.0, None, "123,456"),
        (0.5, 0.0, "0.5"),
        (float("nan"), None, "nan"),
    ],
)
def test_values_are_written_to_the_digits_that_are_certain(
    value: float, spread: float | None, shown: str
) -> None:
    assert written(value, spread) == shown


def test_columns_that_nobody_has_are_left_out_and_those_of_one_are_dashes_for_the_rest() -> None:
    head, *rows = cells(EXPRESSIVE, ALL)
    assert head == ["", "bits/dim exact ↓"]
    assert {row[0].split(" (")[0]: row[1] for row in rows} == {"poor": "2", "good": "-", "copies": "-"}


def test_every_form_names_who_leads_and_which_samples_are_copies() -> None:
    facts = {"Data": "digits <b>"}
    for said in (text(ALL), markdown("title", facts, ALL), page("title", facts, ALL, b"png")):
        assert "copies (copies)" in said
        sampling = said[said.index(SAMPLING.asks) :]
        assert sampling.index("good") < sampling.index("poor")
    assert "Good to sample from: good (kernel 0.030 ± 0.014)" in picks(ALL)


def test_copies_lead_no_table_of_samples() -> None:
    copies = entry("copies", {"samples/coverage": 0.99, MEMORISED: 1.0})
    honest = entry("honest", {"samples/coverage": 0.5})
    assert [each.name for each in ordered(EXPRESSIVE, [copies, honest])] == ["honest", "copies"]


def test_seeds_tell_families_apart_by_the_error_of_their_mean() -> None:
    a = entry("a", *({KERNEL: value} for value in (0.10, 0.12, 0.14)))
    b = entry("b", *({KERNEL: value} for value in (0.15, 0.17, 0.19)))
    assert [each.name for each in leaders(SAMPLING, [a, b])] == ["a"]  # by 3.1 standard errors
    near = entry("near", *({KERNEL: value} for value in (0.11, 0.13, 0.15)))
    assert [each.name for each in leaders(SAMPLING, [a, near])] == ["a", "near"]


class Cells(HTMLParser):
    """Reads a page, and whether each element that is opened is closed again."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def test_the_page_is_whole_and_has_the_cells_of_all_tables() -> None:
    reader = Cells()
    reader.feed(page("a < b", {"Data": "<script>"}, ALL, b"png"))
    assert not reader.open
    assert reader.rows == [row for section in SECTIONS for row in cells(section, ALL)]


def test_every_column_is_a_known_metric_and_explained() -> None:
    legend = markdown("title", {}, ALL)
    for section in SECTIONS:
        for metric in section.columns:
            assert METRICS[metric].meaning in legend
