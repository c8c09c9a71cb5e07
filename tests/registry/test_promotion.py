"""Moves of aliases on a real MLflow server, and comparisons of evaluations."""

import math
from typing import Any

import pytest
from mlflow import MlflowClient

from gdl_ray import registry
from gdl_ray.registry import promotion
from gdl_ray.registry.promotion import PromotionError, compare, history, last_to_undo, move

BITS = "test/bits_per_dim_exact"


def with_versions(client: MlflowClient, name: str, count: int = 3) -> str:
    client.create_registered_model(name)
    for _ in range(count):
        client.create_model_version(name, "s3://nobody/model")
    return name


def champion(client: MlflowClient, name: str) -> int:
    return int(client.get_registered_model(name).aliases["champion"])


def undo(name: str) -> None:
    last = last_to_undo(name, "champion")
    move(name, "champion", last.before, "undone", undoes=last.key)


@pytest.mark.slow
def test_moves_are_written_down_and_undone_one_after_the_other(mlflow_client: MlflowClient) -> None:
    name = with_versions(mlflow_client, "moved")
    for version in (1, 2, 3):
        move(name, "champion", version, f"reason {version}", BITS, (2.0, 1.9))
    assert move(name, "champion", 3, "again") is None
    move(name, "next", 1, "another alias")
    made = history(name)
    assert [(each.alias, each.before, each.to, each.why, each.state) for each in made] == [
        ("champion", 0, 1, "reason 1", "made"),
        ("champion", 1, 2, "reason 2", "made"),
        ("champion", 2, 3, "reason 3", "made"),
        ("next", 0, 1, "another alias", "made"),
    ]
    assert (made[2].metric, made[2].values) == (BITS, (2.0, 1.9))
    tag = mlflow_client.get_model_version(name, "3").tags["gdl_ray.promoted.champion"]
    assert tag == f"{made[2].at} by {made[2].by}, from 2: reason 3"
    undo(name)
    assert champion(mlflow_client, name) == 2
    move(name, "champion", 3, "after all")
    undo(name)
    undo(name)
    assert champion(mlflow_client, name) == 1
    with pytest.raises(PromotionError, match="version 1 is the first champion of moved, and"):
        undo(name)
    assert registry.registered()[name].tags == {}  # the service is told of none of it
    assert registry.describe(name, 3)["tags"] == {}


@pytest.mark.slow
def test_a_killed_move_is_told_from_a_made_one(
    mlflow_client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = with_versions(mlflow_client, "killed")
    move(name, "champion", 1, "first")

    def killed(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "set_registered_model_alias", killed)
        with pytest.raises(KeyboardInterrupt):
            move(name, "champion", 2, "before the alias")
    assert champion(mlflow_client, name) == 1
    assert [each.state for each in history(name)] == ["made", "dropped"]
    with monkeypatch.context() as patch:
        patch.setattr(promotion, "_settle", lambda name, each, now: each if now == 1 else killed())
        with pytest.raises(KeyboardInterrupt):
            move(name, "champion", 3, "after the alias")
    assert champion(mlflow_client, name) == 3
    assert [(each.to, each.state) for each in history(name)] == [(1, "made"), (2, "dropped"), (3, "made")]
    assert "after the alias" in mlflow_client.get_model_version(name, "3").tags["gdl_ray.promoted.champion"]
    undo(name)
    assert champion(mlflow_client, name) == 1


@pytest.mark.slow
def test_an_alias_that_was_moved_by_others_is_not_rolled_back(mlflow_client: MlflowClient) -> None:
    name = with_versions(mlflow_client, "elsewhere")
    with pytest.raises(PromotionError, match="no move of elsewhere's champion is left"):
        undo(name)
    move(name, "champion", 1, "first")
    move(name, "champion", 2, "second")
    mlflow_client.set_registered_model_alias(name, "champion", "3")
    with pytest.raises(
        PromotionError, match="champion is version 3, and the last recorded move took it to 2"
    ):
        undo(name)
    with pytest.raises(registry.VersionNotFound, match="elsewhere has no version 9"):
        move(name, "champion", 9, "nowhere")
    with pytest.raises(PromotionError, match=r"--to latest: .*reserved"):
        move(name, "latest", 2, "a name that MLflow keeps")
    assert history(name)[-1].state == "dropped"


def record(value: float, error: float = 0.0, metric: str = BITS, **protocol: Any) -> dict[str, Any]:
    fields = {"split": "test", "samples": {"count": 10, "seed": 0}} | protocol
    metrics = {metric: value, f"{metric}_standard_error": error} if error else {metric: value}
    return {"protocol": fields, "protocol_digest": str(fields), "metrics": metrics}


@pytest.mark.parametrize(
    ("metric", "gain"),
    [(BITS, -1), ("samples/recall", 1), ("test/nats_exact", 1), ("samples/frechet_distance", -1)],
)
def test_better_is_by_more_than_the_margin_in_the_metrics_own_direction(metric: str, gain: float) -> None:
    """Errors 3 and 4 of a value make 5 of the difference."""
    current = record(100, 3, metric)
    for margin, difference, expected in ((2, 10.1, True), (2, 9.9, False), (2, -50, False), (0, 0.1, True)):
        candidate = record(100 + gain * difference, 4, metric)
        is_better, why, values = compare(metric, margin, current, candidate)
        assert is_better == expected, why
        assert values == (100, 100 + gain * difference)


def test_without_errors_any_gain_will_do_and_nothing_is_better_than_itself() -> None:
    assert compare(BITS, 2, record(2), record(1.999))[0]
    assert not compare(BITS, 0, record(2), record(2))[0]
    assert not compare(BITS, 2, record(2), record(math.nan))[0]
    assert "neither has a standard error" in compare(BITS, 2, record(2), record(1.999))[1]


def test_why_is_said_in_words() -> None:
    why = compare(BITS, 2, record(2.0, 0.03), record(1.9, 0.04))[1]
    values = f"{BITS} 1.900 ± 0.040 against 2.000 ± 0.030 (lower is better)"
    need = "it must be by more than 2 standard errors of the difference, 0.1"
    assert why == f"{values}: better by 0.1, and {need}"


def test_results_of_different_protocols_are_not_compared() -> None:
    other = record(1, samples={"count": 20, "seed": 0}, extractor="digits-classifier@2")
    with pytest.raises(PromotionError) as refused:
        compare(BITS, 2, record(2), other)
    told = "(extractor: -, then digits-classifier@2; samples.count: 10, then 20)"
    assert f"different protocols do not compare {told}: evaluate both" in str(refused.value)


def test_what_cannot_be_compared_is_named() -> None:
    with pytest.raises(PromotionError, match="samples/copying_z is not known to be better one way"):
        compare("samples/copying_z", 2, record(1), record(1))
    with pytest.raises(PromotionError, match=f"samples/recall: the current version has {BITS}"):
        compare("samples/recall", 2, record(1), record(1))
