"""The command line of a comparison, and how it is made fair; tests/test_end_to_end.py runs one."""

from pathlib import Path

import pytest
import torch

from gdl_ray import tracking
from gdl_ray.data import Dataset, training_batch
from gdl_ray.evaluate.efficiency import step_flops
from gdl_ray.families import FAMILIES, build, preset
from jobs import options
from jobs.compare import alike, common_quality, main, parse


@pytest.fixture(autouse=True)
def _home(digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GDL_RAY_HOME", str(tmp_path))
    monkeypatch.setattr(tracking, "check", lambda: None)
    monkeypatch.setattr(options, "load", lambda name, root: digits)


def test_every_family_gets_the_same_budget_and_each_its_own_preset() -> None:
    comparison = parse(
        ["--data", "digits", "--budget", "60s", "--seeds", "2", "--name", "x", "--workers", "2"]
    )
    assert [run.family for run in comparison.runs] == [*FAMILIES, *FAMILIES]
    assert comparison.runs[-1].name == "x-gan-1"
    for run, each in zip(comparison.runs, comparison.options, strict=True):
        assert (each.family, str(each.seed), each.budget, each.workers) == (run.family, run.seed, "60s", "2")
        assert each.optimization == preset(run.family, "digits").optimization
        assert options.parse(run.arguments) == each


def test_flops_are_shared_out_as_steps(digits: Dataset) -> None:
    budget = 3e12
    comparison = parse(["--families", "vae", "gan", "--flops", f"{budget:g}"])
    for each in comparison.options:
        model = build(each.family, each.model, digits.spec)
        batch = training_batch(
            digits.splits["train"], seed=1, step=5, batch_size=each.optimization.batch_size
        )
        spent = each.steps * step_flops(model, batch, model.phases)
        assert spent == pytest.approx(budget, rel=0.05)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--families", "vae", "vea"], "--families vea: choose from autoregressive"),
        (["--families", "vae"], "--families vae: name at least two"),
        (["--seeds", "0"], "--seeds 0 must be 1 or more"),
        (["--data", "dgits"], "unknown dataset --data dgits"),
        (["--budget", "60"], "--budget '60': write a time"),
        (["--flops", "1e12", "--budget", "60s"], "--flops 1e+12 and --budget"),
        (["--quality", "-1"], "--quality -1.0 must be 0 or more"),
        (["--name", "a b"], "--name"),
        (["--flops", "nan"], "--flops nan must be 0 or more"),
        (["--seed", "5"], "--seed is for one run: a comparison takes --seeds"),
    ],
)
def test_what_cannot_be_done_is_refused_in_a_line(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("jobs.compare: ")
    assert told in error
    assert error.count("\n") == 1


def test_the_quality_is_the_best_that_all_reach() -> None:
    assert common_quality([[(1.0, 3.0), (2.0, 2.0), (3.0, 2.5)], [(1.0, 2.4), (9.0, 2.2)], []]) == 2.2
    assert common_quality([[], []]) == 0


def test_training_images_are_chosen_with_the_labels_of_the_samples_and_none_twice(digits: Dataset) -> None:
    y, asked = (torch.tensor(digits.splits[split].y) for split in ("train", "test"))
    rows = alike(y, asked)
    assert torch.equal(y[rows], asked)
    assert len(set(rows.tolist())) == len(asked)
