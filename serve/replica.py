"""A replica: it holds models and their engines, and answers HTTP itself, so that a request takes one hop.

It asks the operator which versions are wanted, loads new ones beside the old ones and swaps, so no request is
lost or kept waiting. (A changed `user_config` would do it too, but Serve takes a replica out of the ingress
while it is reconfigured, which reloads HAProxy twice and sends requests the long way round meanwhile.)
"""

import asyncio
import logging
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import ray
import ray.serve._private.replica as ray_replica
import torch
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from gdl_ray import registry
from serve.app import App
from serve.audit import Audit, JsonLines
from serve.directory import Directory
from serve.keys import Keyring
from serve.metrics import Meter
from serve.model import Model, load
from serve.pages import build_pages
from serve.scaling import SAMPLES, autoscaling
from serve.shelf import Shelf

APPLICATION = "gdl_ray"
"""Name of the application that all models share."""
OPERATOR = "Operator"
"""Name of its deployment that knows the registry."""
RETRY_S = 1.0
"""Seconds until an operator that does not answer is asked again."""
DRAIN_S = 120.0
"""Longest that a replica that is ended works on what it holds."""
LISTEN_S = 60.0
"""Seconds after its construction in which a replica surely has begun to listen."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the operator of the platform decides of the service."""

    url: str = ""
    """Where the service listens."""
    require_keys: bool = False
    """Whether a request needs an API key; else one that is given must be valid all the same."""
    cors_origins: tuple[str, ...] = ()
    """Origins of pages that browsers may let ask; none by default."""
    replicas: tuple[int, int] = (1, 1)
    """Least and most replicas of the pool."""
    gpus: float = 0.0
    """GPUs of each, or the share of one."""
    models: int = 32
    """Most versions that a replica holds."""


def listen_on_node_address() -> None:
    """Bind this replica's port for calls between deployments to its node's address alone.

    Ray 2.60 binds it to every interface, and runs what it is sent there. Called at the end of a replica's
    construction, which is before it listens. A Ray that binds in another way fails here or logs an error.
    """
    untyped: Any = ray_replica
    bind = untyped.add_port_to_grpc_server
    address = f"{ray.util.get_node_ip_address()}:0"  # type: ignore[no-untyped-call]
    bound = threading.Event()

    def bind_to_node(server: Any, everywhere: str) -> Any:
        bound.set()
        return bind(server, address)

    def check() -> None:
        if not bound.is_set():
            log.error("Ray %s may listen on every interface: it did not bind as 2.60 does", ray.__version__)

    untyped.add_port_to_grpc_server = bind_to_node
    asyncio.get_running_loop().call_later(LISTEN_S, check)


class Replica:
    """Answers HTTP for the models of a shelf.

    Args:
        own: the model that it is for; empty for those of the pool.
        settings: of the service.
        operator: where it is in the same application.
    """

    def __init__(self, own: str, settings: Settings, operator: "DeploymentHandle[Any] | None" = None) -> None:
        torch.set_num_threads(1)  # the cores belong to training; replicas scale by number
        # The engine's thread gives the interpreter away at every torch operation, and by default waits up to
        # 5 ms for a busy event loop to give it back. Beside one that is busy for 40 % of the time, that costs
        # it 40 % of its samples, and this 10 %.
        sys.setswitchinterval(0.00002)
        log_json_lines()
        self._own = own
        self._operator = operator or serve.get_deployment_handle(OPERATOR, APPLICATION)
        self._meter = Meter()
        self._keyring = Keyring(settings.require_keys)
        self._shelf = Shelf(settings.models, load, registry.exists, self._meter)
        self._service = App(self._shelf, self._keyring, self._meter, Audit(), build_pages(), self._refresh)
        self._app: ASGIApp = self._service
        if settings.cors_origins:
            self._app = CORSMiddleware(
                self._service,
                allow_origins=settings.cors_origins,
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
                expose_headers=["*"],
            )
        self._following = asyncio.get_running_loop().create_task(self._follow())
        listen_on_node_address()

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Tell Serve the application that answers this replica's requests."""
        return self._app

    def __del__(self) -> None:
        """Write down what the audit still holds; Serve calls it when all requests are answered."""
        self._service.close()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Tell Serve how many samples wait or are drawn."""
        loads = [each for model in self._shelf.models for each in model.loads.values()]
        return {SAMPLES: float(sum(each.active + each.waiting for each in loads))}

    async def _refresh(self) -> None:
        await self._operator.refresh.remote()

    async def _follow(self) -> None:
        """Ask the operator for ever what is wanted, and make it so."""
        name = serve.get_replica_context().replica_id.unique_id
        while True:
            serial = self._shelf.directory.serial
            question = (name, self._own, self._shelf.report(), serial)
            try:
                directory: Directory = await self._operator.watch.remote(*question)
                records = [dict(record) for record in directory.keys]
                self._keyring.update(records, share=1 / directory.replicas)
                if directory.serial:
                    self._shelf.follow(directory, self._at_home(directory))
                self._observe()
            except Exception:  # while the operator restarts, all stays as it is
                log.warning("following the operator failed", exc_info=True)
                await asyncio.sleep(RETRY_S)

    def _observe(self) -> None:
        """Show how busy the engines are."""
        for name, models in groupby(sorted(self._shelf.models, key=_name), _name):
            self._meter.observe(name, *(each for model in models for each in model.loads.values()))

    def _at_home(self, directory: Directory) -> set[str]:
        """Name the models that are loaded unasked: all but those that have replicas of their own."""
        if self._own:
            return {self._own}
        return {name for name, entry in directory.entries.items() if not entry.own}


def log_json_lines() -> None:
    """Write what the service has to say as JSON lines, with the request that it is about, to Ray's log."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    for part in ("serve", "gdl_ray"):
        logger = logging.getLogger(part)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO)


def _name(model: Model) -> str:
    return model.name


def own_application(name: str, replicas: Sequence[int], gpus: float, settings: Settings) -> serve.Application:
    """Describe the application that serves one model by itself."""
    return _ingress(replicas, gpus).bind(name, settings)


def pool(operator: serve.Application, settings: Settings) -> serve.Application:
    """Describe the application of the replicas that all models share, and its operator."""
    return _ingress(settings.replicas, settings.gpus).bind("", settings, operator)


def _ingress(replicas: Sequence[int], gpus: float) -> serve.Deployment:
    """Describe a deployment that answers HTTP itself."""
    least, most = replicas
    scale: dict[str, Any] = {"num_replicas": least}
    if least != most:
        scale = {"autoscaling_config": autoscaling(least, most)}
    deployment: serve.Deployment = serve.deployment(
        # On CPUs, serving must fit beside training, which asks for every core.
        ray_actor_options={"num_cpus": 0, "num_gpus": gpus},
        # The engine bounds the queue, in samples.
        max_ongoing_requests=10_000,
        graceful_shutdown_timeout_s=DRAIN_S,
        # How soon a replica that died is missed, and another started.
        health_check_period_s=2.0,
        # Else Ray makes a record of each request, which is shown nowhere.
        logging_config={"enable_access_log": False, "log_level": "WARNING"},
        **scale,
    )(serve.ingress()(Replica))
    return deployment
