"""Holding a run: what may go on with it."""

import pytest

from jobs.options import UsageError
from jobs.train import _check_same


def test_a_run_goes_on_with_the_same_options_alone() -> None:
    before = {"seed": "0", "steps": "100"}
    _check_same("mine", before, dict(before))
    with pytest.raises(UsageError, match="--name mine: that run was started with seed=0, not 1: ask"):
        _check_same("mine", before, before | {"seed": "1"})
