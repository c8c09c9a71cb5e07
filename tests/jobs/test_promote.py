"""The job that moves aliases, on a real MLflow server: what it says, and its exit codes."""

from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest
from mlflow import MlflowClient

from gdl_ray import registry, tracking
from gdl_ray.data import Dataset
from gdl_ray.registry import promotion
from jobs.promote import main

pytestmark = pytest.mark.slow
METRIC = "samples/kernel_distance"


def evaluated(client: MlflowClient, digits: Dataset, name: str, *distances: float) -> None:
    """Make a model with a version for each distance; 0 leaves one unevaluated."""
    client.create_registered_model(name)
    for number, distance in enumerate(distances, 1):
        run_id, _ = tracking.start_run(name, digits, {}, {})
        client.create_model_version(name, "s3://nobody/model", run_id)
        if distance:
            write(name, number, distance)


def write(name: str, version: int, distance: float, protocol: str = "a", memorised: float = 0) -> None:
    """Write an evaluation, under a protocol of that letter."""
    metrics = {METRIC: distance, f"{METRIC}_standard_error": 0.01, "samples/frechet_distance": 100 * distance}
    metrics["samples/memorised"] = memorised
    record = {"protocol": {"letter": protocol}, "protocol_digest": protocol * 12, "metrics": metrics}
    registry.write_evaluation(name, version, record, {})


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


def test_versions_are_compared_by_what_both_were_measured_by(
    mlflow_client: MlflowClient, digits: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    """A quick evaluation, though the newest, takes nothing away."""
    evaluated(mlflow_client, digits, "common", 0.8, 0.5, 0)
    assert main(["common@1"]) == 0
    write("common", 3, 0.1, "q")
    assert main(["common@3", "--if-better", METRIC]) == 2
    assert "different protocols do not compare (letter: a, then q)" in capsys.readouterr().err
    write("common", 2, 0.9, "q")
    assert main(["common@2", "--if-better", METRIC]) == 0
    assert "0.500 ± 0.010 against 0.800 ± 0.010" in capsys.readouterr().out
    write("common", 1, 0.1, "q")  # the candidate's newest comes first
    assert main(["common@1", "--if-better", METRIC]) == 0
    assert "0.100 ± 0.010 against 0.900 ± 0.010" in capsys.readouterr().out


def test_neither_copies_nor_luck_make_a_champion(
    mlflow_client: MlflowClient, digits: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluated(mlflow_client, digits, "copies", 0.8, 0.5)
    write("copies", 2, 0.01, memorised=1)
    told = "its samples are copies of training images (samples/memorised is 1)\n"
    assert main(["copies@2", "--if-better", METRIC]) == 1
    assert capsys.readouterr().out == f"jobs.promote: copies@2 is not champion: {told}"
    assert main(["copies@1", "--if-better", METRIC]) == 0
    capsys.readouterr()
    assert main(["copies@2", "--if-better", METRIC]) == 1
    assert capsys.readouterr().out == f"jobs.promote: copies@1 stays champion, not 2: {told}"
    write("copies", 2, 0.01)
    assert main(["copies@2", "--if-better", "samples/frechet_distance"]) == 2
    assert f"no standard error to judge by; choose from {METRIC}\n" in capsys.readouterr().err
    assert mlflow_client.get_registered_model("copies").aliases == {"champion": "1"}


def test_a_champion_that_others_choose_meanwhile_stays(
    mlflow_client: MlflowClient,
    digits: Dataset,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    evaluated(mlflow_client, digits, "raced", 0.8, 0.5, 0.1)
    assert main(["raced@1"]) == 0
    compare = promotion.compare

    def slow(*args: Any) -> Any:
        mlflow_client.set_registered_model_alias("raced", "champion", "3")
        return compare(*args)

    monkeypatch.setattr(promotion, "compare", slow)
    assert main(["raced@2", "--if-better", METRIC]) == 2
    assert "raced's champion was version 1 when" in capsys.readouterr().err
    assert mlflow_client.get_registered_model("raced").aliases == {"champion": "3"}


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


@contextmanager
def answering(status: int) -> Iterator[str]:
    """Run a server that is healthy and answers all else with an error, in plain text; its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/health" else status)
            self.end_headers()
            self.wfile.write(b"You are not\nwelcome")

        def log_message(self, *_: Any) -> None:
            """Leave the test's output alone."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("status", "told"),
    [
        (401, "MLflow refuses: "),
        (403, "MLflow refuses: "),
        (500, "MLflow at {uri} answers with an error: "),
        (503, "MLflow at {uri} answers with an error: "),
    ],
)
def test_what_the_server_answers_is_told_in_a_line(
    status: int, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with answering(status) as uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        assert main(["digits-vae"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"jobs.promote: {told.format(uri=uri)}")
    assert str(status) in err
    assert err.count("\n") == 1
