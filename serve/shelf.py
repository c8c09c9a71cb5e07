"""The models that a replica holds: loaded when asked for, followed by alias, let go when others are needed.

A new champion is loaded beside the old one and takes over when it is ready, so no request is lost or kept
waiting, and each is answered by one version. A version that cannot be loaded leaves the old one in its place.
"""

import asyncio
import logging
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http import HTTPStatus
from typing import Any

from gdl_ray.registry import CHAMPION, RegistryUnavailable, VersionNotFound
from serve.directory import Directory
from serve.metrics import Meter
from serve.model import Model
from serve.problems import Problem, not_loaded

RETRY_S = 5.0
"""Seconds until a version that could not be loaded is tried again."""
FIRST_S = 20.0
"""Longest that requests wait, after the start, until it is known what models there are."""
RECHECK_S = 30.0
"""Seconds between looks whether a version that was named by its number still exists."""

Key = tuple[str, int]

log = logging.getLogger(__name__)


class Shelf:
    """Holds up to `capacity` versions; the least recently used one goes first.

    Args:
        capacity: how many.
        load: fetches a version and makes it ready; blocks.
        exists: asks the registry whether a version exists; blocks.
        meter: is told of what is loaded.
    """

    def __init__(
        self,
        capacity: int,
        load: Callable[[str, int], Model],
        exists: Callable[[str, int], bool],
        meter: Meter,
    ) -> None:
        self.capacity = capacity
        self.directory = Directory()
        self._load, self._exists, self._meter = load, exists, meter
        self._models: OrderedDict[Key, Model] = OrderedDict()  # the most recently used last
        self._champions: dict[str, int] = {}  # the versions that answer where none is named
        self._loading: dict[Key, asyncio.Task[Model]] = {}
        self._failures: dict[Key, tuple[float, Problem]] = {}
        self._users: Counter[Model] = Counter()
        self._checked: dict[Key, float] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        # Threads of their own: the usual ones must not wait for a registry.
        self._loaders = ThreadPoolExecutor(2, "loader")
        self._known = asyncio.Event()

    @property
    def models(self) -> list[Model]:
        """All that are held."""
        return list(self._models.values())

    def report(self) -> dict[str, tuple[list[int], str | None]]:
        """Tell which versions are held, and why a champion is not, by name."""
        told: dict[str, tuple[list[int], str | None]] = {}
        for name, entry in self.directory.entries.items():
            held = sorted(version for known, version in self._models if known == name)
            failure = self._failures.get((name, entry.champion or 0))
            told[name] = (held, str(failure[1]) if failure else None)
        return told

    async def take(self, name: str, reference: str = "") -> Model:
        """Hold a version for a request; it is not ended before it is given back with `release`.

        Args:
            name: of a registered model.
            reference: a version's number or alias; the champion if empty.

        Raises:
            Problem: 404, there is none; 503, it cannot be loaded.
        """
        key = await self._settle(name, reference)
        while key not in self._models:  # it went again before we came to take it
            key = await self._settle(name, reference)
        model = self._models[key]
        self._models.move_to_end(key)
        self._users[model] += 1
        return model

    def release(self, model: Model) -> None:
        """Give back what was taken; if it was to go meanwhile, the last user lets it."""
        self._users[model] -= 1
        if not self._users[model]:
            del self._users[model]
            if self._models.get((model.name, model.version)) is not model:
                _end(model)

    async def known(self) -> None:
        """Wait until it is known what models there are, but not for ever."""
        if not self._known.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(FIRST_S):
                    await self._known.wait()

    def follow(self, directory: Directory, warm: Collection[str]) -> None:
        """Take note of what the registry has, load new champions and let go of what is no more.

        Args:
            directory: what the registry has.
            warm: the models whose champions are loaded unasked, as far as there is room.
        """
        self.directory = directory
        self._known.set()
        for key in list(self._models):
            if key[0] not in directory.entries:
                self._drop(key)
        for name, entry in directory.entries.items():
            if entry.champion is None:
                self._champions.pop(name, None)
            elif self._wants(name, entry.champion, name in warm):
                self._load_soon((name, entry.champion))
                self._spawn(self._promote(name, entry.champion))
        self._spawn(self._recheck())

    def close(self) -> None:
        """Let everything go."""
        for key in list(self._models):
            self._drop(key)

    def _wants(self, name: str, version: int, warm: bool) -> bool:
        """Tell whether a champion should be loaded unasked: if it replaces one, or there is room for it."""
        if self._champions.get(name) == version and (name, version) in self._models:
            return False
        if (name, version) in self._loading or self._recent_failure((name, version)):
            return False
        replaces = (name, self._champions.get(name, 0)) in self._models
        return replaces or (warm and len(self._models) + len(self._loading) < self.capacity)

    async def _promote(self, name: str, version: int) -> None:
        """Load a champion and let it take over."""
        try:
            await self._ready((name, version))
        except Problem:
            return  # the report says why; the one before goes on answering
        replaced = self._champions.get(name)
        self._champions[name] = version
        entry = self.directory.entries.get(name)
        if replaced not in (None, version) and entry and replaced not in entry.aliases.values():
            log.info("version %d of %s takes over from %d", version, name, replaced)
            self._meter.swapped(name)
            self._drop((name, replaced))

    async def _settle(self, name: str, reference: str) -> Key:
        """Decide which version answers, and have it loaded."""
        wanted = self.directory.version(name, reference)
        serving = self._champions.get(name)
        follows = reference in ("", CHAMPION)
        if follows and serving is not None and (name, serving) in self._models:
            return name, serving
        await self._ready((name, wanted))
        if follows:
            self._champions[name] = wanted
        return name, wanted

    async def _ready(self, key: Key) -> Model:
        """Give a version, loading it if need be; those who ask for it meanwhile wait for the same."""
        if key in self._models:
            return self._models[key]
        if problem := self._recent_failure(key):
            raise problem
        return await asyncio.shield(self._load_soon(key))

    def _load_soon(self, key: Key) -> "asyncio.Task[Model]":
        if key not in self._loading:
            self._loading[key] = asyncio.create_task(self._fetch(key))
            self._loading[key].add_done_callback(lambda _: self._loading.pop(key))
        return self._loading[key]

    def _recent_failure(self, key: Key) -> Problem | None:
        since, problem = self._failures.get(key, (0.0, None))
        return problem if time.monotonic() - since < RETRY_S else None

    async def _fetch(self, key: Key) -> Model:
        name, version = key
        try:
            model = await asyncio.get_running_loop().run_in_executor(self._loaders, self._load, name, version)
        except VersionNotFound:
            detail = f"{name} has no version {version}. See /v1/models/{name}."
            raise self._failed(key, Problem(HTTPStatus.NOT_FOUND, "unknown-version", detail)) from None
        except Exception as error:  # whatever is wrong with it, others must go on answering
            if not isinstance(error, RegistryUnavailable):
                log.exception("version %d of %s could not be loaded", version, name)
            detail = f"Version {version} of {name} could not be loaded: {error}."
            raise self._failed(key, not_loaded(detail)) from None
        if name not in self.directory.entries:  # it went meanwhile
            _end(model)
            raise self.directory.unknown(name)
        self._failures.pop(key, None)
        self._models[key] = model
        self._checked[key] = time.monotonic()
        self._meter.loaded(name)
        while len(self._models) > self.capacity:
            self._drop(next(iter(self._models)))
        return model

    def _failed(self, key: Key, problem: Problem) -> Problem:
        """Remember what is wrong with a version for a while, so that not every request tries again."""
        now = time.monotonic()
        self._failures = {old: each for old, each in self._failures.items() if now - each[0] < RETRY_S}
        self._failures[key] = (now, problem)
        return problem

    async def _recheck(self) -> None:
        """Let go of versions that only their number names, and that the registry has no more."""
        for key in list(self._models):
            name, version = key
            entry = self.directory.entries.get(name)
            named = entry is None or version in entry.aliases.values()
            if named or time.monotonic() - self._checked.get(key, 0.0) < RECHECK_S:
                continue
            self._checked[key] = time.monotonic()
            loop = asyncio.get_running_loop()
            try:
                if not await loop.run_in_executor(self._loaders, self._exists, name, version):
                    self._drop(key)
            except RegistryUnavailable:
                pass  # what is held stays held

    def _drop(self, key: Key) -> None:
        """Let a version go: it ends when those who use it are done."""
        model = self._models.pop(key, None)
        self._checked.pop(key, None)
        if model is not None:
            self._meter.unloaded(key[0])
        if self._champions.get(key[0]) == key[1]:
            del self._champions[key[0]]
        if model is not None and model not in self._users:
            _end(model)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Let work go on while requests are answered."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _end(model: Model) -> None:
    """End a model's engines when they have drawn what they hold, however long that takes."""
    threading.Thread(target=model.close, name="closing", daemon=True).start()
