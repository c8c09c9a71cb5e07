"""Moves of aliases on a real MLflow server, and comparisons of evaluations."""

import math
from typing import Any

import pytest
from mlflow import MlflowClient

from gdl_ray import registry
from gdl_ray.evaluate.metrics import standard_error
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
    assert [each.state for each in history(name)] == ["made", "planned"]  # to read settles nothing
    with pytest.raises(PromotionError, match=r"a move of champion from 1 to 2 began at .* in a minute"):
        undo(name)
    with monkeypatch.context() as patch:
        patch.setattr(promotion, "_settle", killed)
        with pytest.raises(KeyboardInterrupt):
            move(name, "champion", 3, "after the alias")
    assert champion(mlflow_client, name) == 3
    assert [each.state for each in history(name)] == ["made", "planned", "planned"]
    move(name, "next", 1, "others may be under way")
    assert [each.state for each in history(name)] == ["made", "planned", "planned", "made"]
    monkeypatch.setattr(promotion, "UNDER_WAY_S", 0.0)  # time goes by
    move(name, "champion", 2, "another")
    assert "after the alias" in mlflow_client.get_model_version(name, "3").tags["gdl_ray.promoted.champion"]
    undo(name)
    made = [(each.to, each.state) for each in history(name) if each.alias == "champion"]
    assert made == [(1, "made"), (2, "dropped"), (3, "made"), (2, "made"), (3, "made")]
    undo(name)
    assert champion(mlflow_client, name) == 1


@pytest.mark.slow
def test_a_killed_move_is_told_by_where_the_next_one_began(
    mlflow_client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next one was made within the minute, and the alias is no longer where the killed one took it."""
    name = with_versions(mlflow_client, "followed")
    move(name, "champion", 1, "first")

    def killed(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(promotion, "_settle", killed)
        with pytest.raises(KeyboardInterrupt):
            move(name, "champion", 2, "killed after the alias")
    move(name, "champion", 3, "the next")
    monkeypatch.setattr(promotion, "UNDER_WAY_S", 0.0)
    for back in (2, 1):
        undo(name)
        assert champion(mlflow_client, name) == back


@pytest.mark.slow
def test_what_was_decided_for_another_champion_is_not_done(mlflow_client: MlflowClient) -> None:
    name = with_versions(mlflow_client, "decided")
    assert move(name, "champion", 1, "the first", expected=0)
    mlflow_client.set_registered_model_alias(name, "champion", "3")
    for expected, told in ((1, "was version 1"), (0, "was version none")):
        with pytest.raises(PromotionError, match=f"decided's champion {told} when .*, and is 3 now"):
            move(name, "champion", 2, "better than that", expected=expected)
    assert champion(mlflow_client, name) == 3
    assert len(history(name)) == 1
    assert move(name, "champion", 2, "better than 3", expected=3)
    assert champion(mlflow_client, name) == 2


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
    [(BITS, -1), ("test/bayes_accuracy", 1), ("test/nats_exact", 1), ("samples/kernel_distance", -1)],
)
def test_better_is_by_more_than_the_margin_in_the_metrics_own_direction(metric: str, gain: float) -> None:
    """Errors 3 and 4 of a value make 5 of the difference."""
    current = record(100, 3, metric)
    for margin, difference, expected in ((2, 10.1, True), (2, 9.9, False), (2, -50, False), (0, 0.1, True)):
        candidate = record(100 + gain * difference, 4, metric)
        is_better, why, values = compare(metric, margin, current, candidate)
        assert is_better == expected, why
        assert values == (100, 100 + gain * difference)


def test_nothing_is_better_than_itself_or_for_not_being_a_number() -> None:
    assert not compare(BITS, 0, record(2, 0.1), record(2, 0.1))[0]
    assert not compare(BITS, 2, record(2, 0.1), record(math.nan, 0.1))[0]
    assert not compare(BITS, 2, record(2, 0.1), record(1, math.nan))[0]


@pytest.mark.parametrize("metric", ["samples/frechet_distance", "efficiency/samples_per_s_batch_1"])
def test_a_metric_without_a_standard_error_decides_nothing(metric: str) -> None:
    with_errors = {
        "samples/kernel_distance": 0.1,
        BITS: 2.0,
        "samples/copying_z": 0.0,
        "latent/smoothness": 1.0,
    }
    errors = {standard_error(name): 0.01 for name in with_errors if name != "latent/smoothness"}

    def measured(value: float) -> dict[str, Any]:
        return {**record(1), "metrics": {metric: value, **with_errors, **errors}}

    told = f"--if-better {metric}: the new version has only its value, and no standard error to judge by; "
    for current in (measured(5), None):
        with pytest.raises(PromotionError) as refused:
            compare(metric, 2, current, measured(500))
        assert str(refused.value) == f"{told}choose from {BITS}, samples/kernel_distance"
    with pytest.raises(PromotionError, match="the current version has only its value"):
        compare(BITS, 2, record(2), record(1, 0.1))


@pytest.mark.parametrize("metric", [BITS, "samples/frechet_distance", "samples/recall"])
@pytest.mark.parametrize("current", [record(2, 0.01), None])
def test_copies_of_training_images_are_never_better(metric: str, current: dict[str, Any] | None) -> None:
    candidate = record(1, 0.01)
    candidate["metrics"]["samples/memorised"] = 1.0
    told = "its samples are copies of training images (samples/memorised is 1)"
    assert compare(metric, 2, current, candidate) == (False, told, ())
    candidate["metrics"]["samples/memorised"] = 0.0
    assert compare(BITS, 2, current, candidate)[0]


def test_a_first_version_needs_no_other_to_be_better_than() -> None:
    expected = (True, f"there was none to compare it with by {BITS}", ())
    assert compare(BITS, 2, None, record(1, 0.1)) == expected


def test_why_is_said_in_words() -> None:
    why = compare(BITS, 2, record(2.0, 0.03), record(1.9, 0.04))[1]
    values = f"{BITS} 1.900 ± 0.040 against 2.000 ± 0.030 (lower is better)"
    need = "it must be by more than 2 standard errors of the difference, 0.1"
    assert why == f"{values}: better by 0.1, and {need}"


def test_results_of_different_protocols_are_not_compared() -> None:
    other = record(1, 0.1, samples={"count": 20, "seed": 0}, extractor="digits-classifier@2")
    with pytest.raises(PromotionError) as refused:
        compare(BITS, 2, record(2, 0.1), other)
    told = "(extractor: -, then digits-classifier@2; samples.count: 10, then 20)"
    assert f"different protocols do not compare {told}: evaluate both" in str(refused.value)


def test_what_cannot_be_compared_is_named() -> None:
    for metric in ("samples/copying_z", "test/log_z_gap_nats"):
        with pytest.raises(PromotionError, match=f"{metric} is not known to be better one way"):
            compare(metric, 2, record(1, 0.1, metric), record(0.5, 0.1, metric))
    recall = "samples/recall: the {} version has no value of it; choose from " + BITS
    with pytest.raises(PromotionError, match=recall.format("new")):
        compare("samples/recall", 2, record(1), record(1, 0.1))
    with pytest.raises(PromotionError, match=recall.format("current")):
        compare("samples/recall", 2, record(1, 0.1), record(1, 0.1, "samples/recall"))
    with pytest.raises(PromotionError, match="choose from nothing, as none of its metrics has a standard"):
        compare("samples/recall", 2, record(1), record(1))
