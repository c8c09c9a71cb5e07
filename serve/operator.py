"""The catalog's replica, and the operator in it that makes Ray Serve follow the registry.

Every two seconds: a model with a champion and no application gets one, and an application whose model has no
champion any more is deleted. The replicas of the models ask here which version is wanted, and so follow a
moved alias by themselves. While the registry does not answer, everything stays as it is.
"""

import asyncio
import logging
import re
import time

from fastapi import FastAPI
from ray import serve
from ray.serve.schema import ApplicationStatus

from gdl_ray import registry
from serve import replica
from serve.catalog import Catalog, Entry, build_app

PERIOD_S = 2.0
RETRY_S = 60.0
"""Seconds until an application that Serve gave up is deployed again; each try costs several processes."""
PREFIX = "model-"
"""Beginning of the names of the models' applications."""

# The name becomes part of an address, and of a line in HAProxy's configuration.
_SERVABLE = re.compile(r"[a-z0-9][a-z0-9_.-]*")

log = logging.getLogger(__name__)


class Operator:
    """Reconciles the registry's champions with the applications of Ray Serve."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._deployed_at: dict[str, float] = {}

    async def run(self) -> None:
        """Reconcile for ever; what goes wrong is told by the catalog and tried again."""
        while True:
            try:
                await self._reconcile(await asyncio.to_thread(registry.champions))
                self._catalog.registry_failure = None
            except registry.RegistryUnavailable as error:
                self._catalog.registry_failure = str(error)
            except Exception as error:  # the operator must outlive whatever Serve or the registry answer
                log.exception("reconciling failed")
                self._catalog.registry_failure = f"reconciling failed: {error}"
            await asyncio.sleep(PERIOD_S)

    async def _reconcile(self, champions: dict[str, int]) -> None:
        applications = (await asyncio.to_thread(serve.status)).applications
        for name, version in champions.items():
            entry = self._enter(name, version)
            try:
                application = applications.get(PREFIX + name)
                await self._bring_up(entry, application.status if application else None)
            except Exception as error:  # one model's failure is its own
                log.exception("%s could not be brought up", name)
                entry.failure = f"it could not be brought up: {error}"
        for name in set(self._catalog.entries) - set(champions):
            del self._catalog.entries[name]
        ours = {name for name in applications if name.startswith(PREFIX)}
        for gone in ours - {PREFIX + name for name in champions}:
            log.info("withdrawing %s", gone)
            await asyncio.to_thread(serve.delete, gone, _blocking=False)

    def _enter(self, name: str, version: int) -> Entry:
        """Bring a model's entry in the catalog up to date."""
        entry = self._catalog.entries.get(name)
        if entry is None or entry.version != version:
            served = entry.served if entry else None
            entry = Entry(name=name, version=version, served=served, path=f"/v1/models/{name}")
            self._catalog.entries[name] = entry
        return entry

    async def _bring_up(self, entry: Entry, status: ApplicationStatus | None) -> None:
        """Give a model its application and its description, where it has none; the status is None without."""
        if not _SERVABLE.fullmatch(entry.name):
            raise ValueError("its name cannot be part of an address; use a-z, 0-9, '-', '_' and '.'")
        given_up = status == ApplicationStatus.DEPLOY_FAILED  # Serve itself does not try again
        if given_up:
            entry.failure = "Ray Serve could not start it; the log of its replica says why"
        waited_s = time.monotonic() - self._deployed_at.get(entry.name, -RETRY_S)
        if status is None or (given_up and waited_s >= RETRY_S):
            log.info("serving %s", entry.name)
            self._deployed_at[entry.name] = time.monotonic()
            await asyncio.to_thread(_deploy, entry.name)
        if not entry.description:
            try:
                entry.description = await asyncio.to_thread(registry.describe, entry.name, entry.version)
            except Exception as error:  # it answers all the same
                log.warning("version %d of %s could not be described: %s", entry.version, entry.name, error)


def _deploy(name: str) -> None:
    """Create an application without waiting for it."""
    route = f"/v1/models/{name}"
    target = serve.RunTarget(target=replica.application(name), name=PREFIX + name, route_prefix=route)
    serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)


class CatalogReplica:
    """Answers at / and runs the operator."""

    def __init__(self) -> None:
        self._catalog = Catalog()
        # Serve constructs a replica on the event loop that later runs its requests.
        self._operator = asyncio.get_running_loop().create_task(Operator(self._catalog).run())
        replica.listen_on_node_address()

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Tell Serve the application that answers this replica's requests."""
        return build_app(self._catalog)

    async def follow(self, name: str, served: int | None, failure: str | None) -> int | None:
        """Take note of what a model's replica serves; returns the version it should, None if unknown."""
        entry = self._catalog.entries.get(name)
        if entry is None:
            return None
        entry.served, entry.failure = served, failure
        return entry.version


def application() -> serve.Application:
    """Describe the catalog's application."""
    return replica.ingress(CatalogReplica).bind()
