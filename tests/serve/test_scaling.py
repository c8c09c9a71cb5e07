"""The number of replicas, by the samples that they hold."""

from types import SimpleNamespace

import pytest

from serve.scaling import SAMPLES, SAMPLES_PER_REPLICA, autoscaling, by_samples, parse_replicas


@pytest.mark.parametrize(
    ("held", "requests", "wanted"),
    [
        ({}, 0, 0),
        ({}, 1, 1),  # a request whose body has not arrived
        ({"a": 0.0}, 1, 1),
        ({"a": 64.0}, 5, 1),
        ({"a": 64.0, "b": 128.0}, 5, 3),
    ],
)
def test_a_replica_for_each_slotful(held: dict[str, float], requests: int, wanted: float) -> None:
    context = SimpleNamespace(aggregated_metrics={SAMPLES: held} if held else {}, total_num_requests=requests)
    assert by_samples(context) == (wanted, {})


def test_the_policy_is_ours_as_the_controller_gets_it() -> None:
    config = autoscaling(0, 4)
    assert (config.min_replicas, config.max_replicas) == (0, 4)
    context = SimpleNamespace(
        aggregated_metrics={SAMPLES: {"a": 3.0 * SAMPLES_PER_REPLICA}}, total_num_requests=1
    )
    assert config.policy.get_policy()(context) == (3.0, {})


@pytest.mark.parametrize(("text", "bounds"), [("1", (1, 1)), ("2:2", (2, 2)), ("0:4", (0, 4))])
def test_replicas_are_a_number_or_two(text: str, bounds: tuple[int, int]) -> None:
    assert parse_replicas(text) == bounds


@pytest.mark.parametrize("text", ["", "0", "4:1", "-1:2", "a", "1:b", "0:0"])
def test_other_replicas_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must be a number, such as 2"):
        parse_replicas(text)
