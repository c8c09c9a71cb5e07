"""Waiting for room on a cluster, on one that says how much is free."""

import pytest
from ray._private.state import state

from jobs import cluster
from jobs.cluster import TimeoutExpired, wait_for_room
from jobs.options import parse


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, float]]:
    """What a node has free at each look, the last from then on; what another has free is about to go."""
    answers: list[dict[str, float]] = []

    def available() -> dict[str, dict[str, float]]:
        return {"here": answers.pop(0) if len(answers) > 1 else answers[0], "leaving": {"CPU": 9.0}}

    monkeypatch.setattr(state, "available_resources_per_node", available)
    monkeypatch.setattr(state, "get_draining_nodes", lambda: {"leaving": 0})
    monkeypatch.setattr(cluster, "_LOOK_S", 0.01)
    return answers


def test_room_is_waited_for_and_named(
    free: list[dict[str, float]], capsys: pytest.CaptureFixture[str]
) -> None:
    free += [{"CPU": 1.0}, {"CPU": 2.0}, {"CPU": 4.0}]
    wait_for_room(parse(["vae", "--workers", "3"]))
    assert capsys.readouterr().out == (
        "jobs.train: waiting: --workers 3 need 1 CPU each, and there is room for 1 of 3\n"
    )


def test_an_elastic_job_starts_with_the_least(free: list[dict[str, float]]) -> None:
    free += [{"CPU": 1.0}]
    wait_for_room(parse(["vae", "--workers", "1:4"]))


def test_waiting_ends_with_what_is_missing(free: list[dict[str, float]]) -> None:
    free += [{"CPU": 8.0}]
    with pytest.raises(
        TimeoutExpired, match=r"need 1 CPU and 1 GPU each, and there is room for 0 of 2 after --timeout"
    ):
        wait_for_room(parse(["vae", "--workers", "2", "--gpu", "--timeout", "0.1s"]))
