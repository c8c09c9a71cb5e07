"""The operator and the replica's swap, against a registry and a Serve that are dictionaries."""

import asyncio
import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import ray.serve._private.replica as ray_replica
import torch
from ray.serve.schema import ApplicationStatus

from gdl_ray import registry
from gdl_ray.engine import Engine, seeds_of
from serve import operator, replica
from serve.catalog import Catalog
from serve.model import Model

RUNNING = SimpleNamespace(status=ApplicationStatus.RUNNING)


class World:
    """The registry's champions and Serve's applications."""

    def __init__(self) -> None:
        self.champions: dict[str, int] = {}
        self.applications = {replica.CATALOG: RUNNING, "somebody-elses": RUNNING}
        self.broken: set[str] = set()

    def deploy(self, name: str) -> None:
        if name in self.broken:
            raise RuntimeError("no room")
        self.applications[operator.PREFIX + name] = RUNNING

    def describe(self, name: str, version: int) -> dict[str, Any]:
        return {"metrics": {"bpd": 2.0}}


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    world = World()
    monkeypatch.setattr(operator, "_deploy", world.deploy)
    monkeypatch.setattr(registry, "describe", world.describe)
    monkeypatch.setattr(ray.serve, "status", lambda: SimpleNamespace(applications=world.applications))
    monkeypatch.setattr(ray.serve, "delete", lambda name, _blocking: world.applications.pop(name))
    return world


def reconcile(world: World, catalog: Catalog) -> None:
    asyncio.run(operator.Operator(catalog)._reconcile(world.champions))


def test_applications_follow_the_champions(world: World) -> None:
    catalog = Catalog()
    world.champions = {"digits-vae": 1, "digits-flow": 4}
    reconcile(world, catalog)
    assert set(world.applications) > {"model-digits-vae", "model-digits-flow"}
    assert catalog.entries["digits-flow"].version == 4
    assert catalog.entries["digits-flow"].description == {"metrics": {"bpd": 2.0}}
    world.champions = {"digits-vae": 2}
    reconcile(world, catalog)
    assert set(world.applications) == {replica.CATALOG, "somebody-elses", "model-digits-vae"}
    assert {name: entry.version for name, entry in catalog.entries.items()} == {"digits-vae": 2}


def test_one_models_failure_is_its_own(world: World) -> None:
    catalog = Catalog()
    world.champions = {"bad": 1, "name with spaces": 1, "good": 1}
    world.broken = {"bad"}
    reconcile(world, catalog)
    assert "model-good" in world.applications
    assert catalog.entries["good"].failure is None
    assert "no room" in (catalog.entries["bad"].failure or "")
    assert "cannot be part of an address" in (catalog.entries["name with spaces"].failure or "")
    assert not any("spaces" in name for name in world.applications)


def test_a_model_that_cannot_be_described_answers_all_the_same(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(name: str, version: int) -> dict[str, Any]:
        raise KeyError("its run was deleted")

    catalog = Catalog()
    world.champions = {"digits-vae": 1}
    with monkeypatch.context() as patch:
        patch.setattr(registry, "describe", away)
        reconcile(world, catalog)
    assert "model-digits-vae" in world.applications
    assert catalog.entries["digits-vae"].failure is None
    reconcile(world, catalog)
    assert catalog.entries["digits-vae"].description == {"metrics": {"bpd": 2.0}}


def test_an_application_that_serve_gave_up_is_tried_again_after_a_while(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def passes() -> None:
        watching = operator.Operator(catalog)
        await watching._reconcile(world.champions)
        world.applications["model-digits-vae"] = given_up
        await watching._reconcile(world.champions)
        assert world.applications["model-digits-vae"] is given_up
        assert "could not start it" in (catalog.entries["digits-vae"].failure or "")
        monkeypatch.setattr(operator, "RETRY_S", 0.0)
        await watching._reconcile(world.champions)
        assert world.applications["model-digits-vae"] is RUNNING

    catalog, given_up = Catalog(), SimpleNamespace(status=ApplicationStatus.DEPLOY_FAILED)
    world.champions = {"digits-vae": 1}
    asyncio.run(passes())


def test_without_the_registry_all_stays_as_it_is(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    catalog = Catalog()
    world.champions = {"digits-vae": 1}
    reconcile(world, catalog)

    def away() -> dict[str, int]:
        raise registry.RegistryUnavailable("MLflow does not answer")

    monkeypatch.setattr(registry, "champions", away)

    async def run_once() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(operator.Operator(catalog).run(), 0.5)

    asyncio.run(run_once())
    assert catalog.registry_failure == "MLflow does not answer"
    assert "model-digits-vae" in world.applications
    assert "digits-vae" in catalog.entries


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch, explicit: Any) -> Iterator[list[Model]]:
    """Versions that replicas have loaded; version 9 is damaged."""
    models: list[Model] = []

    def load(name: str, version: int) -> Model:
        if version == 9:
            raise ValueError("it is damaged")
        models.append(Model(name, version, explicit, Engine(explicit, slots=8)))
        return models[-1]

    monkeypatch.setattr(replica, "load", load)
    monkeypatch.setattr(replica, "PERIOD_S", 1000.0)  # it asks no catalog
    monkeypatch.setattr(replica, "RETRY_S", 1000.0)
    monkeypatch.setattr(registry, "champions", lambda: {"toy": 1, "damaged": 9})
    yield models
    for model in models:
        model.engine.close(drain=False)


def test_a_new_version_takes_over_and_the_old_one_finishes(loaded: list[Model]) -> None:
    async def swap() -> None:
        served = replica.ModelReplica("toy")
        app = served.__serve_build_asgi_app__()
        old = loaded[0].engine.submit(seeds_of(7, 20), torch.full((20,), -1))
        await served._swap(2)
        assert old.future.done()
        assert not old.future.cancelled()
        assert app.model is loaded[1]
        await served._swap(9)
        assert app.model is loaded[1]
        assert app.failure == "version 9 could not be loaded: it is damaged"
        await served._swap(3)
        assert app.model is loaded[2]

    asyncio.run(swap())


def test_a_champion_that_cannot_be_loaded_does_not_stop_the_replica(loaded: list[Model]) -> None:
    async def start() -> None:
        app = replica.ModelReplica("damaged").__serve_build_asgi_app__()
        assert app.model is None
        assert app.failure == "its champion could not be loaded: it is damaged"

    asyncio.run(start())


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
