"""Waiting for room on a cluster, on one that says how much is free."""

import json
from pathlib import Path
from typing import Any

import pytest
import ray
from ray._private.state import state

from jobs import cluster
from jobs.cluster import TimeoutExpired, connect, wait_for_room
from jobs.options import UsageError, parse


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


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """The nodes of a cluster that is there, and that may launch three with four CPUs and a GPU each."""
    up: list[dict[str, Any]] = [{"Alive": True, "Resources": {"memory": 1.0}, "Labels": {}}]
    monkeypatch.setattr(ray, "nodes", lambda: up)
    monkeypatch.setattr(ray, "init", lambda **_: None)
    types = {
        "head": {"resources": {"CPU": 0}, "max_workers": 0},
        "spot": {"resources": {"CPU": 4, "GPU": 1}, "max_workers": 2},
        "other": {"resources": {"CPU": 4, "GPU": 1}, "max_workers": 1},
    }
    file = tmp_path / "cluster"
    file.write_text(json.dumps({"head_node_type": "head", "available_node_types": types}))
    monkeypatch.setenv("GDL_RAY_CLUSTER_FILE", str(file))
    return up


def spot(alive: bool = True) -> dict[str, Any]:
    return {"Alive": alive, "Resources": {"CPU": 4.0, "GPU": 1.0}, "Labels": {"ray.io/node-group": "spot"}}


@pytest.mark.parametrize("asked", ["--workers 12", "--workers 3 --gpu --cpus 4", "--workers 1:9 --gpu"])
def test_what_nodes_to_come_will_hold_is_not_refused(asked: str, nodes: list[dict[str, Any]]) -> None:
    connect(parse(["vae", *asked.split()]))
    nodes += [spot(), spot(alive=False)]  # the one that is up is one of the two that may be
    connect(parse(["vae", *asked.split()]))


@pytest.mark.parametrize(
    "asked", ["--workers 13", "--workers 4 --gpu", "--workers 1 --cpus 5", "--workers 13 --timeout 1min"]
)
@pytest.mark.parametrize("up", [[], [spot()], [spot(), spot()]], ids=len)
def test_what_never_fits_is_refused_before_anything_is_launched(
    asked: str, up: list[dict[str, Any]], nodes: list[dict[str, Any]]
) -> None:
    nodes += up
    with pytest.raises(
        UsageError, match=r"when all nodes are up that the cluster may launch: ask for fewer or smaller"
    ):
        connect(parse(["vae", *asked.split()]))


def test_a_cluster_that_launches_nothing_holds_what_it_has(
    nodes: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GDL_RAY_CLUSTER_FILE")
    nodes += [spot()]
    connect(parse(["vae", "--workers", "4"]))
    with pytest.raises(UsageError, match=r"room for 4 of 5 in the whole cluster"):
        connect(parse(["vae", "--workers", "5"]))
    connect(parse(["vae", "--workers", "5", "--timeout", "1min"]))  # others may add nodes
