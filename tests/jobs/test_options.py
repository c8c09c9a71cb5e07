"""The command line of the training job: what it refuses, and in which words."""

import subprocess
import sys
from pathlib import Path

import pytest

from gdl_ray.families.vae import VAEConfig
from gdl_ray.train.plan import Budget
from jobs import options
from jobs.options import parse
from jobs.train import main

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GDL_RAY_HOME", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def test_defaults_are_the_preset_of_family_and_dataset() -> None:
    assert parse(["vae"]).model == VAEConfig()
    assert parse(["vae", "--data", "mnist"]).model.latent == 32
    assert parse(["--data=mnist", "vae"]).optimization.batch_size == 128
    given = parse(["vae", "--model.latent", "3", "--optimization.learning-rate", "0.1"])
    assert (given.model.latent, given.optimization.learning_rate) == (3, 0.1)


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
    assert options._plan(parse(["vae", *arguments])).budget == budget


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["vea"], "unknown family 'vea': choose from autoregressive, flow, vae"),
        (["vae", "--data", "digit"], "unknown dataset --data digit: choose from digits, mnist, cifar10"),
        (["vae", "--size", "0"], "--size 0: write a factor above 0, at most 16, such as 0.5 or 2"),
        (["vae", "--size", "big"], "--size big: write a factor"),
        (
            ["vae", "--workers", "65"],
            "--workers 65 share batches of --optimization.batch-size 64: ",
        ),
        (["vae", "--workers", "0"], "--workers 0: write a number from 1 on, or two as 1:4"),
        (["vae", "--workers", "4:1"], "--workers 4:1: write a number from 1 on"),
        (["vae", "--workers", "many"], "--workers many: write a number from 1 on"),
        (["vae", "--keep", "0"], "--keep 0 must be at least 1"),
        (["vae", "--timeout", "5"], "--timeout '5': write a time as 60s, 10min or 2h"),
        (["vae", "--storage", "ftp://x"], "--storage ftp://x/: "),
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


def test_workers_are_one_number_or_a_range() -> None:
    assert parse(["vae", "--workers", "4"]).workers_range == (4, 4)
    assert parse(["vae", "--workers", "1:4"]).workers_range == (1, 4)


def test_only_what_decides_the_result_must_stay_the_same() -> None:
    first = parse(["vae", "--name", "x", "--workers", "2", "--keep", "3"])
    again = parse(["vae", "--name", "x", "--workers", "1:4", "--timeout", "1h", "--promote"])
    assert first.decisive() == again.decisive()
    assert {"seed", "model.latent", "optimization.batch_size"} <= first.decisive().keys()
    assert parse(["vae", "--seed", "1"]).decisive() != first.decisive()


def test_a_cluster_may_say_where_runs_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GDL_RAY_STORAGE", f"{tmp_path}/bucket/runs")
    assert parse(["vae"]).store("run").address == f"{tmp_path}/bucket/runs/run"
    assert parse(["vae", "--storage", f"{tmp_path}/there"]).store("run").address == f"{tmp_path}/there/run"


def test_a_store_is_a_folder_or_an_address(tmp_path: Path) -> None:
    assert parse(["vae"]).store("run").address == f"{tmp_path}/runs/run"
    assert parse(["vae", "--storage", f"{tmp_path}/there"]).store("run").address == f"{tmp_path}/there/run"
    assert parse(["vae", "--storage", "s3://b/c?scheme=http&region=x"]).store("run").address == (
        "s3://b/c/run?scheme=http&region=x"
    )


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
    for text in ("--data STR", "--workers STR", "--budget STR", "--model.latent INT", "(default: 1000)"):
        assert text in shown
