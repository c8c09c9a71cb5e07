"""The sections of a model card."""

import re

import pytest

from gdl_ray.data import Dataset
from gdl_ray.evaluate.metrics import METRICS, standard_error
from gdl_ray.families import FAMILIES, build, preset
from gdl_ray.family import Likelihood
from gdl_ray.registry import card
from gdl_ray.tracking import RunFacts

RECORD = {
    "protocol": {"split": "test", "samples": {"count": 360}},
    "protocol_digest": "0123456789ab",
    "metrics": {
        "samples/novelty": 3.5,
        "samples/recall": 0.25,
        "test/bits_per_dim_lower_bound": 1.84213,
        "test/bits_per_dim_lower_bound_standard_error": 0.00512,
        "efficiency/parameters": 123456.0,
    },
}


def test_numbers_stand_in_the_order_of_the_table_with_errors_and_units() -> None:
    lines = card.evaluated(RECORD).splitlines()
    assert [line for line in lines if line.startswith("| ")][1:] == [
        "| test/bits_per_dim_lower_bound | 1.8421 ± 0.0051 bits/dim | lower |",
        "| samples/recall | 0.25 | higher |",
        "| efficiency/parameters | 123,456 | lower |",
        "| samples/novelty | 3.5 |  |",
    ]
    assert "samples.count=360, split=test" in card.evaluated(RECORD)


def test_values_are_written_to_two_digits_of_their_error() -> None:
    assert card.spelled(1.5, 0.0321) == "1.500 ± 0.032"
    assert card.spelled(1234.5, 45.0) == "1,234 ± 45"
    assert card.spelled(1.5, 0.0) == "1.5"
    assert card.spelled(float("nan"), 0.1) == "nan"


def test_new_numbers_leave_what_people_wrote() -> None:
    written = "# Mine\n\nabout\n\n## Numbers\n\nold\n\n## Limits\n\nnone\n"
    section = "## Numbers\n\n\\1 new\n"
    assert card.with_numbers(written, section) == written.replace("old", "\\1 new")
    last = card.with_numbers("# Mine\n", section)
    assert last == "# Mine\n\n## Numbers\n\n\\1 new\n"
    assert card.with_numbers(last, section) == last
    assert card.with_numbers("", section) == section


@pytest.mark.parametrize("family", FAMILIES)
def test_the_card_of_every_family_tells_what_it_cannot_and_fits_into_the_registry(
    family: str, digits: Dataset
) -> None:
    model = build(family, preset(family, "digits").model, digits.spec)
    splits = {name: len(split) for name, split in digits.splits.items()}
    run = RunFacts("f" * 32, "a run", {}, {"git_commit": "c" * 40}, {}, digits.digest[:16], splits)
    text = card.written(f"digits-{family}", 3, model, run, {"validation/bits_per_dim": 1.9})
    kind = model.likelihood_kind if isinstance(model, Likelihood) else "none"
    told = {
        "exact": "are exact",
        "lower_bound": "are lower",
        "estimate": "are estimates",
        "none": "has no likelihood",
    }
    assert [each for each, words in told.items() if words in text] == [kind]
    assert f"{splits['train']:,} train, {splits['validation']:,} validation, 360 test examples" in text
    assert "commit `cccccccccccc`" in text
    assert f"v1/models/digits-{family}@3/sample" in text
    assert not re.search(r"[{]\w*[}]", text)
    everything = {
        "protocol": {f"field-{i}": i for i in range(200)},
        "protocol_digest": "a" * 12,
        "metrics": dict.fromkeys(METRICS, 123.456) | {standard_error(name): 0.12 for name in METRICS},
    }
    assert len(card.with_numbers(text, card.evaluated(everything))) < card.LIMIT
