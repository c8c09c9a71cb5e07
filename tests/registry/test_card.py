"""The sections of a model card."""

from gdl_ray.registry import card

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
    lines = card.numbers(RECORD).splitlines()
    assert [line for line in lines if line.startswith("| ")][1:] == [
        "| test/bits_per_dim_lower_bound | 1.8421 ± 0.0051 bits/dim | lower |",
        "| samples/recall | 0.25 | higher |",
        "| efficiency/parameters | 123,456 | lower |",
        "| samples/novelty | 3.5 |  |",
    ]
    assert "samples.count=360, split=test" in card.numbers(RECORD)


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
