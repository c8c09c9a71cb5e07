"""Evaluations on a real MLflow server, read back by its own client."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from mlflow import MlflowClient

from gdl_ray import registry, tracking
from gdl_ray.data import Dataset
from gdl_ray.registry import evaluations

pytestmark = pytest.mark.slow
RECORD: dict[str, Any] = {
    "protocol": {"split": "test", "samples": {"count": 360}},
    "protocol_digest": "0123456789ab",
    "metrics": {
        "test/bits_per_dim_exact": 1.75,
        "test/bits_per_dim_exact_standard_error": 0.004,
        "samples/recall": 0.25,
        "efficiency/parameters": 1234.0,
        "efficiency/samples_per_s_batch_1": 17.0,
    },
}
FILES = {"samples.png": b"\x89PNG", "table.csv": b"a,b\n"}

Evaluated = Callable[[str], tuple[str, MlflowClient]]


@pytest.fixture
def evaluated(mlflow_client: MlflowClient, digits: Dataset) -> Evaluated:
    """Makes a model with one version, whose run ended at step 90, and evaluates it."""

    def make(name: str) -> tuple[str, MlflowClient]:
        run_id, _ = tracking.start_run(name, digits, {"seed": "3"}, {"family": "vae"})
        mlflow_client.log_metric(run_id, "train/loss", 3.0, step=40)
        mlflow_client.log_metric(run_id, "train/loss", 2.0, step=90)
        mlflow_client.create_registered_model(name)
        mlflow_client.create_model_version(name, "s3://nobody/model", run_id)
        mlflow_client.set_model_version_tag(name, "1", "validation/bits_per_dim", "1.7")
        registry.write_evaluation(name, 1, RECORD, FILES)
        return run_id, mlflow_client

    return make


def test_an_evaluation_is_where_people_look_for_it(evaluated: Evaluated) -> None:
    run_id, client = evaluated("looked-at")
    assert registry.read_evaluation("looked-at", 1) == RECORD
    for name, value in RECORD["metrics"].items():
        assert [(each.step, each.value) for each in client.get_metric_history(run_id, name)] == [(90, value)]
    paths = {item.path for item in client.list_artifacts(run_id, "evaluation")}
    assert paths == {f"evaluation/{name}" for name in ("evaluation-v1-0123456789ab.json", *FILES)}
    assert client.get_run(run_id).data.tags["protocol_digest"] == "0123456789ab"
    version = client.get_model_version("looked-at", "1")
    assert version.tags == {
        "validation/bits_per_dim": "1.7",
        "test/bits_per_dim_exact": "1.75",
        "test/bits_per_dim_exact_standard_error": "0.004",
        "samples/recall": "0.25",
        "efficiency/parameters": "1234.0",  # but no measured time
        "gdl_ray.protocol": "0123456789ab",
    }
    assert "| test/bits_per_dim_exact | 1.7500 ± 0.0040 bits/dim | lower |" in str(version.description)
    described = registry.describe("looked-at", 1)
    assert described["metrics"]["efficiency/parameters"] == 1234
    assert described["tags"] == {}


def test_the_same_evaluation_again_changes_nothing(evaluated: Evaluated) -> None:
    run_id, client = evaluated("repeated")
    before = client.get_model_version("repeated", "1")
    registry.write_evaluation("repeated", 1, RECORD, FILES)
    after = client.get_model_version("repeated", "1")
    assert (after.tags, after.description) == (before.tags, before.description)
    for name in RECORD["metrics"]:
        assert len(client.get_metric_history(run_id, name)) == 1


def test_another_protocol_leaves_nothing_of_the_former_but_its_record(evaluated: Evaluated) -> None:
    run_id, client = evaluated("renewed")
    other = {"protocol": {"split": "test"}, "protocol_digest": "f" * 12, "metrics": {"samples/recall": 0.5}}
    registry.write_evaluation("renewed", 1, other, {})
    tags = {"validation/bits_per_dim": "1.7", "samples/recall": "0.5", "gdl_ray.protocol": "f" * 12}
    version = client.get_model_version("renewed", "1")
    assert version.tags == tags
    assert "1.7500" not in str(version.description)
    assert client.get_run(run_id).data.tags["protocol_digest"] == "f" * 12
    assert registry.read_evaluation("renewed", 1) == other
    assert registry.read_evaluation("renewed", 1, "f" * 12) == other
    assert registry.read_evaluation("renewed", 1, RECORD["protocol_digest"]) == RECORD
    assert registry.read_evaluation("renewed", 1, "e" * 12) is None
    registry.write_evaluation("renewed", 1, RECORD, {})  # back again: the newest value is the one that counts
    assert [each[2] for each in registry.history(run_id, "samples/recall")] == [0.25, 0.5, 0.25]


def test_versions_are_compared_under_a_protocol_that_both_have(
    mlflow_client: MlflowClient, digits: Dataset
) -> None:
    """Three versions of one run, whose records lie side by side."""
    run_id, _ = tracking.start_run("shared", digits, {}, {})
    mlflow_client.create_registered_model("shared")
    for _ in range(3):
        mlflow_client.create_model_version("shared", "s3://nobody/model", run_id)

    def measured(version: int, *digests: str) -> None:
        for digest in digests:
            record = {"protocol": {}, "protocol_digest": digest, "metrics": {}}
            registry.write_evaluation("shared", version, record, {})

    def common(current: int, candidate: int) -> str:
        return evaluations.common_protocol("shared", current, candidate)

    measured(1, "c", "a", "d")
    assert common(1, 2) == ""
    measured(2, "a", "c", "e")
    assert (common(1, 2), common(2, 1)) == ("a", "a")  # the newest of neither
    measured(1, "c")
    assert (common(1, 2), common(2, 1)) == ("c", "c")
    measured(2, "a")
    assert (common(1, 2), common(2, 1)) == ("a", "c")  # the candidate's newest comes first
    assert common(1, 3) == ""


def test_a_record_is_there_only_when_all_the_rest_is(
    mlflow_client: MlflowClient, digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process ends after each of its calls in turn; the next one completes what it finds."""
    run_id, _ = tracking.start_run("torn", digits, {}, {})
    mlflow_client.create_registered_model("torn")
    mlflow_client.create_model_version("torn", "s3://nobody/model", run_id)
    for lived in range(4):
        left = iter(range(lived))

        def mortal(call: Callable[..., Any], *args: Any, left: Iterator[int] = left) -> Any:
            next(left)
            return call(*args)

        with monkeypatch.context() as patch:
            for step in ("log_files", "log_metrics", "_tag"):
                patch.setattr(evaluations, step, partial(mortal, getattr(evaluations, step)))
            with pytest.raises(StopIteration):
                registry.write_evaluation("torn", 1, RECORD, FILES)
        assert registry.read_evaluation("torn", 1) is None
    assert mlflow_client.get_model_version("torn", "1").tags["samples/recall"] == "0.25"
    registry.write_evaluation("torn", 1, RECORD, FILES)
    assert registry.read_evaluation("torn", 1) == RECORD


def test_the_run_of_a_version_is_told(evaluated: Evaluated, digits: Dataset) -> None:
    run_id, client = evaluated("told")
    run = registry.run_of("told", 1)
    assert (run.id, run.params, run.tags["family"]) == (run_id, {"seed": "3"}, "vae")
    assert run.dataset == digits.digest[:16]
    assert run.splits == {name: len(split) for name, split in digits.splits.items()}
    curve = registry.history(run_id, "train/loss")
    assert [(step, value) for step, _, value in curve] == [(40, 3.0), (90, 2.0)]
    assert registry.history(run_id, "train/nothing") == []
    client.create_model_version("told", "s3://nobody/model")
    with pytest.raises(registry.VersionNotFound, match="told version 2 was registered without a run"):
        registry.run_of("told", 2)
    for ask in (registry.run_of, registry.read_evaluation):
        with pytest.raises(registry.VersionNotFound, match="told has no version 3"):
            ask("told", 3)
