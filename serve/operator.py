"""The operator: it reads the registry and makes Ray Serve follow.

It tells every replica which models there are and which version is champion; they load and swap by themselves.
A model answers from the pool that all share, unless tags in the registry ask for an application of its own:

    serve.replicas = 2 or 0:4     replicas of its own, scaled by the samples that wait, to zero if asked
    serve.gpus = 0.25             a share of a GPU for each of them

While the registry does not answer, everything stays as it is.
"""

import asyncio
import logging
import re
import secrets
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ray import serve
from ray.serve.schema import ApplicationStatus

from gdl_ray import registry
from serve import keys, replica
from serve.directory import Directory, Entry
from serve.scaling import parse_replicas

PERIOD_S = 2.0
"""Seconds between looks at the registry, where it does not tell of its events."""
HOOK_S = 300.0
"""Seconds between requests to the registry to tell of its events."""
PATIENCE_S = 1.0
"""Longest that a replica's question waits for news."""
GONE_S = 5.0
"""A replica that has not asked for so long is gone."""
RETRY_S = 60.0
"""Seconds until an application that Serve gave up is deployed again; each try costs several processes."""
PREFIX = "model-"
"""Beginning of the names of the applications of single models."""

# The name becomes part of an address, and of a line in HAProxy's configuration.
_SERVABLE = re.compile(r"[a-z0-9][a-z0-9_.-]*")

Report = dict[str, tuple[list[int], str | None]]
"""Which versions of a model a replica holds, and why the champion is not among them, by name."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Own:
    """What a model's application of its own is to be."""

    replicas: tuple[int, int]
    gpus: float

    @classmethod
    def of(cls, tags: Mapping[str, str]) -> "Own | None":
        """Read the tags of a model; None if it asks for no application of its own.

        Raises:
            ValueError: a tag does not say what it must.
        """
        if not {"serve.replicas", "serve.gpus"} & tags.keys():
            return None
        try:
            gpus = float(tags.get("serve.gpus", "0"))
        except ValueError:
            gpus = -1.0
        if not (0 <= gpus < 1 or gpus in range(1, 17)):
            raise ValueError(
                f"tag serve.gpus={tags['serve.gpus']!r} must be a share of one GPU or a whole number of them"
            )
        try:
            return cls(parse_replicas(tags.get("serve.replicas", "1")), gpus)
        except ValueError as error:
            raise ValueError(f"tag serve.{error}") from None


class Operator:
    """Reconciles the registry with Ray Serve, and answers the questions of the replicas.

    Args:
        settings: of the service.
    """

    def __init__(self, settings: replica.Settings) -> None:
        replica.log_json_lines()
        self._settings = settings
        self._directory = Directory()
        self._reports: dict[str, tuple[float, str, Report]] = {}
        self._own: dict[str, Own] = {}
        self._deployed_at: dict[str, float] = {}
        self._failures: dict[str, str] = {}
        self._descriptions: dict[tuple[str, int], Mapping[str, Any]] = {}
        self._secret = secrets.token_hex(32)
        self._hook_at = 0.0
        self._news = asyncio.Condition()
        self._wake = asyncio.Event()
        # Serve constructs a replica on the event loop that later runs its requests.
        self._task = asyncio.get_running_loop().create_task(self._run())
        replica.listen_on_node_address()

    async def watch(self, name: str, own: str, report: Report, serial: int) -> Directory:
        """Take note of what a replica holds; returns the directory when it changes, or after a second.

        Args:
            name: of the replica.
            own: the model that it is for; empty for those of the pool.
            report: what it holds.
            serial: of the directory that it knows.
        """
        self._reports[name] = (time.monotonic(), own, report)
        async with self._news:
            try:
                async with asyncio.timeout(PATIENCE_S):
                    await self._news.wait_for(lambda: self._directory.serial not in (0, serial))
            except TimeoutError:
                pass
        replicas = sum(of == own for _, of, _ in self._alive())
        return replace(self._directory, replicas=max(1, replicas))

    async def refresh(self) -> None:
        """Look at the registry now, and at its descriptions again."""
        self._descriptions.clear()
        self._wake.set()

    async def _run(self) -> None:
        """Reconcile for ever; what goes wrong is told by the list of models, and tried again."""
        while True:
            self._wake.clear()
            await self._publish(await self._look())
            await self._reconcile()
            try:
                async with asyncio.timeout(PERIOD_S):
                    await self._wake.wait()
            except TimeoutError:
                pass

    async def _look(self) -> Directory:
        """Read the registry and the keys."""
        known = self._directory
        try:
            found = await asyncio.to_thread(registry.registered)
            await self._hook()
            described = {name: await self._described(name, model) for name, model in found.items()}
            known = replace(known, entries=described, failure=None)
        except registry.RegistryUnavailable as error:
            known = replace(known, entries=self._reported(known.entries), failure=str(error))
        except Exception as error:  # the operator must outlive whatever the registry answers
            log.exception("reading the registry failed")
            known = replace(known, failure=f"reading the registry failed: {error}")
        try:
            records = await asyncio.to_thread(keys.read_records, keys.keys_file())
            known = replace(known, keys=tuple(records))
        except (ValueError, OSError) as error:
            log.error("the keys stay as they were: %s", error)
        return known

    async def _hook(self) -> None:
        """Ask the registry from time to time to tell of its events; read again what it does not tell."""
        if time.monotonic() < self._hook_at:
            return
        self._descriptions.clear()
        url = f"{self._settings.url}/hooks/registry"
        await asyncio.to_thread(registry.hook, url, self._secret)
        self._hook_at = time.monotonic() + HOOK_S

    async def _described(self, name: str, model: registry.Registered) -> Entry:
        """Complete what the registry lists by what the champion was measured to be, and who holds it."""
        entry = Entry(aliases=model.aliases, tags=model.tags, own=name in self._own)
        key = (name, entry.champion or 0)
        if entry.champion and key not in self._descriptions:
            try:
                self._descriptions[key] = await asyncio.to_thread(registry.describe, *key)
            except Exception as error:  # it answers all the same
                log.warning("version %d of %s could not be described: %s", entry.champion, name, error)
        entry = replace(entry, description=self._descriptions.get(key, {}))
        return self._reported({name: entry})[name]

    def _reported(self, entries: Mapping[str, Entry]) -> dict[str, Entry]:
        """Bring up to date which replicas hold what."""
        told: dict[str, Entry] = {}
        reports = self._alive()
        for name, entry in entries.items():
            held = [report[name] for _, _, report in reports if name in report]
            counts = Counter(version for versions, _ in held for version in versions)
            failure = self._failures.get(name) or next((why for _, why in held if why), None)
            told[name] = replace(entry, served=dict(counts), failure=failure)
        return told

    def _alive(self) -> list[tuple[float, str, Report]]:
        now = time.monotonic()
        self._reports = {name: report for name, report in self._reports.items() if now - report[0] < GONE_S}
        return list(self._reports.values())

    async def _publish(self, directory: Directory) -> None:
        """Tell the replicas that wait, if there is news."""
        directory = replace(directory, hook_secret=self._secret)
        if directory == self._directory:
            return
        async with self._news:
            if directory.serial or not directory.failure:
                # Counted from the time, so that a new operator's is not taken for an old one's.
                directory = replace(directory, serial=1 + (directory.serial or time.time_ns()))
            self._directory = directory
            self._news.notify_all()

    async def _reconcile(self) -> None:
        """Give models that ask for it an application of their own, and withdraw those that none asks for."""
        if not self._directory.serial:
            return
        try:
            applications = (await asyncio.to_thread(serve.status)).applications
            for name, entry in self._directory.entries.items():
                application = applications.get(PREFIX + name)
                try:
                    await self._bring_up(name, entry, application.status if application else None)
                except Exception as error:  # one model's failure is its own
                    log.exception("%s could not be brought up", name)
                    self._failures[name] = f"it could not be brought up: {error}"
            for name in self._own.keys() - self._directory.entries.keys():
                del self._own[name]
            # What stands although its tags are wrong now goes on as it is.
            wanted = {PREFIX + name for name in self._own.keys() | self._failures.keys()}
            for gone in {name for name in applications if name.startswith(PREFIX)} - wanted:
                log.info("withdrawing %s", gone)
                await asyncio.to_thread(serve.delete, gone, _blocking=False)
        except Exception:  # nor by whatever Serve answers
            log.exception("reconciling failed")

    async def _bring_up(self, name: str, entry: Entry, status: ApplicationStatus | None) -> None:
        """Bring a model's application of its own to what its tags ask for; the status is None without one."""
        try:
            own = Own.of(entry.tags) if entry.champion else None
            if own and not _SERVABLE.fullmatch(name):
                raise ValueError("its name cannot be part of an address; use a-z, 0-9, '-', '_' and '.'")
        except ValueError as error:
            self._failures[name] = f"it has no application of its own: {error}"
            return
        self._failures.pop(name, None)
        if own is None:
            self._own.pop(name, None)
            return
        given_up = status == ApplicationStatus.DEPLOY_FAILED  # Serve itself does not try again
        if given_up:
            self._failures[name] = "Ray Serve could not start it; the log of its replica says why"
        if status is not None and not given_up and name not in self._deployed_at:
            self._own[name] = own  # an operator before this one has deployed it
        waited_s = time.monotonic() - self._deployed_at.get(name, -RETRY_S)
        if self._own.get(name) != own or ((status is None or given_up) and waited_s >= RETRY_S):
            log.info("serving %s by itself: %s", name, own)
            self._own[name] = own
            self._deployed_at[name] = time.monotonic()
            await asyncio.to_thread(_deploy, name, own, self._settings)


def _deploy(name: str, own: Own, settings: replica.Settings) -> None:
    """Create or change an application without waiting for it."""
    target = serve.RunTarget(
        target=replica.own_application(name, own.replicas, own.gpus, settings),
        name=PREFIX + name,
        route_prefix=f"/v1/models/{name}",
    )
    serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)


def application(settings: replica.Settings) -> serve.Application:
    """Describe the application that all models share: the pool, and the operator beside it."""
    deployment = serve.deployment(
        name=replica.OPERATOR,
        num_replicas=1,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=10_000,
        logging_config={"enable_access_log": False},
    )(Operator)
    return replica.pool(deployment.bind(settings), settings)
