"""The job that moves aliases, on a real MLflow server: what it says, and its exit codes."""

import pytest
from mlflow import MlflowClient

from gdl_ray import registry, tracking
from gdl_ray.data import Dataset
from jobs.promote import main

pytestmark = pytest.mark.slow
METRIC = "samples/frechet_distance"


def evaluated(client: MlflowClient, digits: Dataset, name: str, *distances: float) -> None:
    """Make a model with a version for each distance; 0 leaves one unevaluated."""
    client.create_registered_model(name)
    for number, distance in enumerate(distances, 1):
        run_id, _ = tracking.start_run(name, digits, {}, {})
        client.create_model_version(name, "s3://nobody/model", run_id)
        if distance:
            metrics = {METRIC: distance, f"{METRIC}_standard_error": 0.01}
            record = {"protocol": {"split": "test"}, "protocol_digest": "a" * 12, "metrics": metrics}
            registry.write_evaluation(name, number, record, {})


def test_the_better_version_is_promoted_and_the_other_is_not(
    mlflow_client: MlflowClient, digits: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluated(mlflow_client, digits, "better", 0.8, 0.5, 0.49, 0)
    champions = []
    for reference, code, told in (
        ("better@1", 0, "better@1 is champion, after none: there was none to compare it with"),
        ("better@2", 0, f"better@2 is champion, after 1: {METRIC} 0.500 ± 0.010 against 0.800 ± 0.010"),
        ("better@3", 1, f"better@2 stays champion, not 3: {METRIC} 0.490 ± 0.010 against 0.500 ± 0.010"),
        ("better@champion", 0, "better@2 is champion already"),
        ("better", 2, "better@4 was never evaluated; do it first: python -m jobs.evaluate better@4"),
    ):
        assert main([reference, "--if-better", METRIC]) == code
        out, err = capsys.readouterr()
        assert (out + err).startswith(f"jobs.promote: {told}")
        champions.append(mlflow_client.get_registered_model("better").aliases.get("champion"))
    assert champions == ["1", "2", "2", "2", "2"]
    assert main(["better@3", "--if-better", METRIC, "--margin", "0.5"]) == 0
    assert main(["better", "--to", "champion"]) == 0  # by hand, and the newest
    assert capsys.readouterr().out.endswith("better@4 is champion, after 3: by hand\n")
    for back in ("3", "2", "1"):
        assert main(["better", "--rollback"]) == 0
        assert f"better@{back} is champion again" in capsys.readouterr().out
    assert main(["better", "--rollback"]) == 2
    capsys.readouterr()
    assert main(["better", "--history"]) == 0
    lines = capsys.readouterr().out.splitlines()
    moves = [line.split("  ")[2] for line in lines]
    assert moves == ["none -> 1", "1 -> 2", "2 -> 3", "3 -> 4", "4 -> 3", "3 -> 2", "2 -> 1"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nobody"], "no model 'nobody' is registered"),
        (["nobody@3"], "no model 'nobody' is registered"),
        (["nobody@next"], "no model 'nobody' is registered"),
        (["refused@7"], "refused has no version 7; the newest is 1"),
        (["refused@next"], "refused has no alias 'next'; its newest version is 1"),
        (
            ["refused@1", "--rollback"],
            "refused@1: --rollback and --history take a model's name alone, refused",
        ),
        (["refused", "--rollback", "--history"], "give one of them"),
        (["refused", "--if-better", METRIC, "--margin", "-1"], "--margin -1 must be 0 or more"),
        (["refused", "--if-better", "samples/recal"], "--if-better samples/recal is not known to be better"),
        (["refused", "--if-better", METRIC], "refused@1 was never evaluated"),
        (["refused", "--to", "latest"], "--to latest: "),
    ],
)
def test_what_cannot_be_done_is_refused_in_a_line(
    arguments: list[str],
    told: str,
    mlflow_client: MlflowClient,
    digits: Dataset,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if "refused" not in registry.registered():
        evaluated(mlflow_client, digits, "refused", 0)
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert told in err
    assert err.startswith("jobs.promote: ")
    assert err.count("\n") == 1


def test_a_server_that_is_away_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert main(["digits-vae"]) == 2
    assert "no MLflow server answers at MLFLOW_TRACKING_URI=http://127.0.0.1:9" in capsys.readouterr().err
