"""Which versions a replica holds, as the registry changes under it."""

import asyncio
import threading
import time
from typing import Any

import pytest
import torch

from gdl_ray.engine import Engine
from gdl_ray.registry import RegistryUnavailable, VersionNotFound
from serve import shelf as shelf_module
from serve.directory import Directory, Entry
from serve.metrics import Meter
from serve.model import Model
from serve.problems import Problem
from serve.shelf import Shelf
from tests.serve.conftest import followed


class Registry:
    """Versions that can be loaded: 9 is damaged, 404 is none."""

    def __init__(self, family: Any) -> None:
        self.family = family
        self.loaded: list[tuple[str, int]] = []
        self.closed: list[tuple[str, int]] = []
        self.gone: set[int] = set()
        self.away = False
        self.gate = threading.Event()
        self.gate.set()

    def load(self, name: str, version: int) -> Model:
        assert self.gate.wait(timeout=10)
        if version == 9:
            raise ValueError("it is damaged")
        if version == 404:
            raise VersionNotFound(f"{name} has no version 404")
        self.loaded.append((name, version))
        model = Model(name, version, self.family, Engine(self.family, slots=8))
        close = model.close

        def closing(drain: bool = True) -> None:
            close(drain)
            self.closed.append((name, version))

        model.close = closing  # type: ignore[method-assign]
        return model

    def exists(self, name: str, version: int) -> bool:
        if self.away:
            raise RegistryUnavailable("MLflow does not answer")
        return version not in self.gone


@pytest.fixture
def registry(explicit: Any) -> Registry:
    return Registry(explicit)


def shelf_of(registry: Registry, capacity: int = 4) -> Shelf:
    return Shelf(capacity, registry.load, registry.exists, Meter())


def directory(**champions: int) -> Directory:
    entries = {name: Entry(aliases={"champion": version}) for name, version in champions.items()}
    return Directory(entries=entries, failure=None, serial=1)


async def version_of(shelf: Shelf, name: str, reference: str = "") -> int:
    model = await shelf.take(name, reference)
    assert model.engine.submit(torch.tensor([1]), torch.tensor([-1])).future.result(10) is not None
    shelf.release(model)
    return model.version


async def settled(condition: Any) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


def test_a_model_is_loaded_when_it_is_asked_for_and_once(registry: Registry) -> None:
    async def play() -> None:
        shelf = shelf_of(registry)
        await followed(shelf, directory(a=1), set())
        assert registry.loaded == []
        assert await asyncio.gather(*(version_of(shelf, "a") for _ in range(20))) == [1] * 20
        assert registry.loaded == [("a", 1)]
        shelf.close()

    asyncio.run(play())


def test_champions_are_loaded_unasked_where_there_is_room(registry: Registry) -> None:
    async def play() -> None:
        shelf = shelf_of(registry, capacity=2)
        await followed(shelf, directory(a=1, b=1, c=1, d=1), {"b", "c", "d"})
        assert registry.loaded == [("b", 1), ("c", 1)]
        shelf.close()

    asyncio.run(play())


def test_a_new_champion_takes_over_when_it_is_ready(registry: Registry) -> None:
    async def play() -> None:
        shelf = shelf_of(registry)
        await followed(shelf, directory(a=1), {"a"})
        registry.gate.clear()
        following = asyncio.create_task(followed(shelf, directory(a=2), {"a"}))
        await asyncio.sleep(0.05)
        assert await version_of(shelf, "a") == 1  # while 2 is loading
        held = await shelf.take("a")
        registry.gate.set()
        await following
        assert await version_of(shelf, "a") == 2
        await asyncio.sleep(0.05)
        assert registry.closed == []  # it is in use
        assert held.engine.submit(torch.tensor([1]), torch.tensor([-1])).future.result(10) is not None
        shelf.release(held)
        await settled(lambda: registry.closed == [("a", 1)])
        shelf.close()

    asyncio.run(play())


def test_a_damaged_champion_leaves_the_old_one_in_its_place(registry: Registry) -> None:
    async def play() -> None:
        shelf = shelf_of(registry)
        await followed(shelf, directory(a=1), {"a"})
        await followed(shelf, directory(a=9), {"a"})
        assert await version_of(shelf, "a") == 1
        assert shelf.report()["a"] == ([1], "Version 9 of a could not be loaded: it is damaged.")
        await followed(shelf, directory(a=2), {"a"})
        assert await version_of(shelf, "a") == 2
        assert shelf.report()["a"] == ([2], None)
        shelf.close()

    asyncio.run(play())


def test_the_least_recently_used_goes_first(registry: Registry) -> None:
    async def play() -> None:
        shelf = shelf_of(registry, capacity=2)
        await followed(shelf, directory(a=1, b=1, c=1), set())
        for name in ("a", "b", "a", "c"):
            assert await version_of(shelf, name) == 1
        await settled(lambda: registry.closed == [("b", 1)])
        assert [model.name for model in shelf.models] == ["a", "c"]
        assert await version_of(shelf, "b") == 1
        assert registry.loaded == [("a", 1), ("b", 1), ("c", 1), ("b", 1)]
        shelf.close()

    asyncio.run(play())


def test_many_more_models_than_room_all_answer(registry: Registry) -> None:
    async def play() -> None:
        shelf = shelf_of(registry, capacity=2)
        names = [f"m{i}" for i in range(12)]
        await followed(shelf, directory(**dict.fromkeys(names, 1)), set())
        assert await asyncio.gather(*(version_of(shelf, name) for name in names * 3)) == [1] * 36
        await settled(lambda: len(registry.loaded) - len(registry.closed) == 2)
        shelf.close()

    asyncio.run(play())


def test_what_the_registry_has_no_more_goes(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelf_module, "RECHECK_S", 0.0)

    async def play() -> None:
        shelf = shelf_of(registry)
        both = directory(a=1, b=1)
        await followed(shelf, both, {"a", "b"})
        assert await version_of(shelf, "a", "2") == 2  # named by its number alone
        registry.gone, registry.away = {2}, True
        await followed(shelf, both, set())
        assert len(shelf.models) == 3  # the registry did not say
        registry.away = False
        await followed(shelf, both, set())
        assert [(model.name, model.version) for model in shelf.models] == [("a", 1), ("b", 1)]
        await followed(shelf, directory(a=1), set())
        assert [model.name for model in shelf.models] == ["a"]
        with pytest.raises(Problem, match="no model 'b'"):
            await version_of(shelf, "b")
        shelf.close()

    asyncio.run(play())


def test_what_cannot_be_is_told(registry: Registry) -> None:
    async def play() -> None:
        shelf = shelf_of(registry)
        none = Directory(entries={"a": Entry(aliases={})}, failure=None, serial=1)
        await followed(shelf, none, {"a"})
        with pytest.raises(Problem, match="a has no champion"):
            await version_of(shelf, "a")
        assert await version_of(shelf, "a", "1") == 1
        with pytest.raises(Problem, match="a has no version 404") as told:
            await version_of(shelf, "a", "404")
        assert told.value.document.status == 404
        shelf.close()

    asyncio.run(play())


def test_the_first_requests_wait_for_the_registry(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def play() -> None:
        shelf = shelf_of(registry)
        asking = asyncio.create_task(shelf.known())
        await asyncio.sleep(0.05)
        assert not asking.done()
        await followed(shelf, directory(a=1), set())
        await asking
        monkeypatch.setattr(shelf_module, "FIRST_S", 0.05)
        late = shelf_of(registry)
        await late.known()
        with pytest.raises(Problem, match="not known yet: the registry has not answered"):
            await version_of(late, "a")
        shelf.close()

    asyncio.run(play())


def test_what_is_unregistered_while_it_is_loaded_is_not_served(registry: Registry) -> None:
    async def play() -> None:
        shelf = shelf_of(registry)
        await followed(shelf, directory(a=1, b=1))
        registry.gate.clear()
        asking = asyncio.create_task(version_of(shelf, "a"))
        await asyncio.sleep(0.05)
        shelf.follow(directory(b=1), set())
        registry.gate.set()
        with pytest.raises(Problem, match="no model 'a'"):
            await asking
        assert shelf.models == []
        await settled(lambda: registry.closed == [("a", 1)])

    asyncio.run(play())


def test_a_load_that_hangs_holds_up_no_other_model(registry: Registry) -> None:
    async def play() -> None:
        shelf = shelf_of(registry)
        await followed(shelf, directory(a=1), {"a"})
        registry.gate.clear()
        shelf.follow(directory(a=2), {"a"})  # returns at once
        assert await version_of(shelf, "a") == 1
        registry.gate.set()
        await settled(lambda: [model.version for model in shelf.models] == [2])
        shelf.close()

    asyncio.run(play())


def test_engines_that_draw_long_when_they_go_hold_up_nothing(registry: Registry, explicit: Any) -> None:
    async def play() -> None:
        shelf = shelf_of(registry, capacity=1)
        names = [f"m{i}" for i in range(12)]
        await followed(shelf, directory(**dict.fromkeys(names, 1)))
        await shelf.take("m0")
        explicit.gate.clear()
        jobs = []
        for name in names[1:]:  # each displaces the one before, which has work that does not end
            model = await asyncio.wait_for(shelf.take(name), 5)
            jobs.append(model.engine.submit(torch.tensor([1]), torch.tensor([-1])))
            shelf.release(model)
        await asyncio.wait_for(asyncio.to_thread(lambda: None), 5)
        explicit.gate.set()
        await settled(lambda: all(job.future.done() for job in jobs))
        shelf.close()

    asyncio.run(play())
