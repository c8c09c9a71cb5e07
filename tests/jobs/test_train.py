"""The command line of the training job: what it refuses, and in which words."""

import subprocess
import sys
from pathlib import Path

import pytest

from gdl_ray.families.vae import VAEConfig
from gdl_ray.train.loop import Budget
from jobs import train
from jobs.train import UsageError, check, main, parse

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GDL_RAY_HOME", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def test_defaults_are_the_preset_of_family_and_dataset() -> None:
    assert parse(["vae"]).model == VAEConfig()
    assert parse(["vae", "--data", "mnist"]).model.latent == 32
    assert parse(["--data=mnist", "vae"]).optimization.batch_size == 128
    options = parse(["vae", "--model.latent", "3", "--optimization.learning-rate", "0.1"])
    assert (options.model.latent, options.optimization.learning_rate) == (3, 0.1)


@pytest.mark.parametrize(
    ("arguments", "budget"),
    [
        ([], Budget(steps=1000)),
        (["--steps", "7"], Budget(steps=7)),
        (["--examples", "640"], Budget(steps=10)),
        (["--budget", "90s"], Budget(seconds=90)),
        (["--budget", "1.5min"], Budget(seconds=90)),
        (["--budget", "2h"], Budget(seconds=7200)),
    ],
)
def test_budgets_are_steps_examples_or_time(arguments: list[str], budget: Budget) -> None:
    assert train._plan(parse(["vae", *arguments])).budget == budget


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["vea"], "unknown family 'vea': choose from autoregressive, flow, vae"),
        (["vae", "--data", "digit"], "unknown dataset --data digit: choose from digits, mnist, cifar10"),
        (["vae", "--size", "0"], "--size 0: write a factor above 0, at most 16, such as 0.5 or 2"),
        (["vae", "--size", "big"], "--size big: write a factor"),
        (["vae", "--workers", "3"], "--workers 3 does not divide --optimization.batch-size 64"),
        (["vae", "--workers", "0"], "--workers 0 must be at least 1"),
        (["vae", "--cpus", "0"], "--cpus 0 must be at least 1"),
        (["vae", "--max-failures", "-1"], "--max-failures -1 must be at least 0"),
        (["vae", "--checkpoint-every", "0"], "checkpoint_every=0 must be at least 1"),
        (["vae", "--patience", "0"], "patience=0 must be at least 1"),
        (["vae", "--budget", "60"], "--budget '60': write a time as 60s, 10min or 2h"),
        (["vae", "--budget", "60s", "--examples", "9"], "--budget and --examples both"),
        (["vae", "--steps", "-1"], "--steps -1, --examples 0: write numbers above 0"),
        (["vae", "--checkpoint-every", "60"], "checkpoint_every=60 must be a multiple of report_every=50"),
        (["vae", "--name", "a/b"], "--name 'a/b': use letters"),
        (["vae"], "MLFLOW_TRACKING_URI is not set"),
    ],
)
def test_bad_input_ends_with_one_line_that_says_what_to_do(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"jobs.train: {told}")


def test_a_size_multiplies_the_preset_and_what_is_given_stays() -> None:
    small, large = parse(["vae", "--size", "0.5"]), parse(["vae", "--size=2", "--model.hidden", "100"])
    assert (small.model.width, small.model.hidden, small.model.latent) == (8, 128, 16)
    assert (large.model.width, large.model.hidden) == (32, 100)
    assert large.size == 2


def test_a_name_is_used_once(tmp_path: Path) -> None:
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    with pytest.raises(UsageError, match="--name mine: a run of that name exists"):
        check(parse(["vae", "--name", "mine"]))


@pytest.mark.parametrize(
    "arguments",
    [
        ["vae", "--model.latent", "0"],
        ["vae", "--modle.latent", "3"],
        ["vae", "--steps", "x"],
        ["vae", "--optimization.betas", "0.9", "1"],
        ["vae", "--optimization.weight-decay", "-1"],
    ],
)
def test_the_parser_ends_with_the_same_exit_code(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2


@pytest.mark.slow
def test_help_shows_every_option_with_its_default() -> None:
    command = [sys.executable, "-m", "jobs.train", "vae", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    for text in ("--data STR", "--workers INT", "--budget STR", "--model.latent INT", "(default: 1000)"):
        assert text in shown
