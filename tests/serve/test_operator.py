"""The operator, against a registry and a Serve that are dictionaries."""

import asyncio
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import ray.serve._private.replica as ray_replica
from ray.serve.schema import ApplicationStatus

from gdl_ray import registry
from gdl_ray.registry import Registered
from serve import keys, operator, replica
from serve.directory import Directory
from serve.operator import Operator, Own

RUNNING = SimpleNamespace(status=ApplicationStatus.RUNNING)


class World:
    """What the registry has, and Serve's applications."""

    def __init__(self) -> None:
        self.models: dict[str, Registered] = {}
        self.applications = {replica.APPLICATION: RUNNING, "somebody-elses": RUNNING}
        self.deployed: list[tuple[str, Own]] = []
        self.broken: set[str] = set()
        self.away = False

    def register(self, name: str, version: int | None, **tags: str) -> None:
        aliases = {} if version is None else {"champion": version}
        self.models[name] = Registered(
            aliases=aliases, tags={f"serve.{tag}": text for tag, text in tags.items()}
        )

    def registered(self) -> dict[str, Registered]:
        if self.away:
            raise registry.RegistryUnavailable("MLflow does not answer")
        return dict(self.models)

    def deploy(self, name: str, own: Own, settings: replica.Settings) -> None:
        if name in self.broken:
            raise RuntimeError("no room")
        self.deployed.append((name, own))
        self.applications[operator.PREFIX + name] = RUNNING

    def describe(self, name: str, version: int) -> dict[str, Any]:
        return {"metrics": {"bpd": 2.0}}


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> World:
    world = World()
    monkeypatch.setenv("GDL_RAY_HOME", str(tmp_path))
    monkeypatch.setattr(operator, "_deploy", world.deploy)
    monkeypatch.setattr(replica, "listen_on_node_address", lambda: None)
    monkeypatch.setattr(operator, "PERIOD_S", 0.01)
    monkeypatch.setattr(operator, "PATIENCE_S", 0.3)
    monkeypatch.setattr(registry, "describe", world.describe)
    monkeypatch.setattr(registry, "registered", world.registered)
    monkeypatch.setattr(registry, "hook", lambda url, secret: False)
    monkeypatch.setattr(ray.serve, "status", lambda: SimpleNamespace(applications=world.applications))
    monkeypatch.setattr(ray.serve, "delete", lambda name, _blocking: world.applications.pop(name))
    return world


async def told(watched: Operator, condition: Any, report: operator.Report | None = None) -> Directory:
    """Ask as a replica does, until the directory is as it should be."""
    serial = 0
    for _ in range(100):
        directory = await watched.watch("replica-1", "", report or {}, serial)
        serial = directory.serial
        if condition(directory):
            return directory
    raise AssertionError(directory)


def play(scenario: Any) -> None:
    async def run() -> None:
        watched = Operator(replica.Settings())
        try:
            await scenario(watched)
        finally:
            watched._task.cancel()

    asyncio.run(run())


def test_replicas_are_told_what_the_registry_has(world: World) -> None:
    async def scenario(watched: Operator) -> None:
        world.register("digits-vae", 1)
        directory = await told(watched, lambda known: known.entries)
        entry = directory.entries["digits-vae"]
        assert (entry.champion, entry.description, entry.own) == (1, {"metrics": {"bpd": 2.0}}, False)
        world.register("digits-vae", 2)
        world.register("digits-gan", None)
        directory = await told(watched, lambda known: len(known.entries) == 2)
        assert directory.entries["digits-vae"].champion == 2
        assert directory.entries["digits-gan"].champion is None
        del world.models["digits-vae"]
        assert (await told(watched, lambda known: len(known.entries) == 1)).failure is None
        assert world.deployed == []

    play(scenario)


def test_news_is_told_at_once_and_the_same_is_not_told_twice(world: World) -> None:
    async def scenario(watched: Operator) -> None:
        world.register("digits-vae", 1)
        directory = await told(watched, lambda known: known.entries)
        directory = await told(watched, lambda known: known.serial >= directory.serial)
        loop = asyncio.get_running_loop()
        begin = loop.time()
        same = await watched.watch("replica-1", "", {}, directory.serial)
        assert loop.time() - begin >= 0.25
        assert same.serial == directory.serial

    play(scenario)


def test_the_catalog_says_who_holds_what(world: World) -> None:
    async def scenario(watched: Operator) -> None:
        world.register("digits-vae", 2)
        await told(watched, lambda known: known.entries)
        report: operator.Report = {"digits-vae": ([1], "it could not be loaded: it is damaged")}
        directory = await told(watched, lambda known: known.entries["digits-vae"].failure, report)
        entry = directory.entries["digits-vae"]
        assert (entry.served, entry.failure) == ({1: 1}, "it could not be loaded: it is damaged")
        assert directory.replicas == 1

    play(scenario)


def test_without_the_registry_all_stays_as_it_is(world: World) -> None:
    async def scenario(watched: Operator) -> None:
        world.register("digits-vae", 1, replicas="2")
        await told(watched, lambda known: known.entries and known.entries["digits-vae"].own)
        world.away = True
        directory = await told(watched, lambda known: known.failure)
        assert directory.failure == "MLflow does not answer"
        assert "digits-vae" in directory.entries
        assert "model-digits-vae" in world.applications

    play(scenario)


def test_before_the_registry_has_answered_nothing_is_known(world: World) -> None:
    async def scenario(watched: Operator) -> None:
        world.away = True
        directory = await told(watched, lambda known: known.failure == "MLflow does not answer")
        assert directory.serial == 0

    play(scenario)


def test_tags_ask_for_an_application_of_its_own(world: World) -> None:
    async def scenario(watched: Operator) -> None:
        world.register("digits-vae", 1, replicas="0:4", gpus="0.25")
        await told(watched, lambda known: known.entries and known.entries["digits-vae"].own)
        assert world.deployed == [("digits-vae", Own((0, 4), 0.25))]
        world.register("digits-vae", 1, replicas="2")
        await told(watched, lambda _: len(world.deployed) == 2)
        assert world.deployed[1] == ("digits-vae", Own((2, 2), 0.0))
        world.register("digits-vae", 1)
        await told(watched, lambda _: "model-digits-vae" not in world.applications)
        assert set(world.applications) == {replica.APPLICATION, "somebody-elses"}

    play(scenario)


@pytest.mark.parametrize(
    ("name", "tags", "why"),
    [
        ("a", {"replicas": "many"}, "tag serve.replicas='many' must be a number, such as 2"),
        ("a", {"gpus": "-1"}, "tag serve.gpus='-1' must be a share of one GPU"),
        ("a", {"gpus": "1.5"}, "tag serve.gpus='1.5' must be a share of one GPU"),
        ("name with spaces", {"replicas": "1"}, "cannot be part of an address"),
    ],
)
def test_tags_that_cannot_be_are_told(world: World, name: str, tags: dict[str, str], why: str) -> None:
    async def scenario(watched: Operator) -> None:
        world.register(name, 1, **tags)
        world.register("good", 1, replicas="1")
        directory = await told(watched, lambda known: known.entries and known.entries[name].failure)
        assert why in (directory.entries[name].failure or "")
        await told(watched, lambda _: world.deployed)
        assert [deployed for deployed, _ in world.deployed] == ["good"]

    play(scenario)


def test_one_models_failure_is_its_own(world: World) -> None:
    async def scenario(watched: Operator) -> None:
        world.register("bad", 1, replicas="1")
        world.register("good", 1, replicas="1")
        world.broken = {"bad"}
        await told(watched, lambda _: "model-good" in world.applications)
        directory = await told(watched, lambda known: known.entries["bad"].failure)
        assert "no room" in (directory.entries["bad"].failure or "")

    play(scenario)


def test_an_application_that_serve_gave_up_is_tried_again_after_a_while(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(watched: Operator) -> None:
        world.register("digits-vae", 1, replicas="1")
        await told(watched, lambda _: world.deployed)
        world.applications["model-digits-vae"] = SimpleNamespace(status=ApplicationStatus.DEPLOY_FAILED)
        directory = await told(watched, lambda known: known.entries["digits-vae"].failure)
        assert "could not start it" in (directory.entries["digits-vae"].failure or "")
        assert len(world.deployed) == 1
        monkeypatch.setattr(operator, "RETRY_S", 0.0)
        await told(watched, lambda _: len(world.deployed) == 2)

    play(scenario)


def test_keys_reach_the_replicas_without_a_restart(world: World) -> None:
    async def scenario(watched: Operator) -> None:
        world.register("digits-vae", 1)
        await told(watched, lambda known: known.entries)
        _, key = keys.add(keys.keys_file(), "ada")
        directory = await told(watched, lambda known: known.keys)
        assert [record["id"] for record in directory.keys] == [key.id]
        keys.keys_file().write_text("{ torn")
        await asyncio.sleep(0.1)
        directory = await told(watched, lambda known: known.serial)
        assert [record["id"] for record in directory.keys] == [key.id]

    play(scenario)


@pytest.mark.parametrize("listens", [True, False])
def test_a_ray_that_binds_in_another_way_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, listens: bool
) -> None:
    bound: list[str] = []
    node: Any = ray.util
    private: Any = ray_replica
    monkeypatch.setattr(private, "add_port_to_grpc_server", lambda server, to: bound.append(to))
    monkeypatch.setattr(replica, "LISTEN_S", 0.02)

    async def start() -> None:
        replica.listen_on_node_address()
        if listens:
            private.add_port_to_grpc_server(None, "[::]:0")
        await asyncio.sleep(0.05)

    with caplog.at_level(logging.ERROR):
        asyncio.run(start())
    assert bound == ([f"{node.get_node_ip_address()}:0"] if listens else [])
    assert ("every interface" in caplog.text) is not listens
