"""The Ray Serve application of one registered model.

The ingress replica itself holds the model and its engine: a request takes one hop. It asks the catalog which
version is wanted, loads a new one beside the old one and swaps, so no request is lost or kept waiting. (A
changed `user_config` would do it too, but Serve takes a replica out of the ingress while it is reconfigured,
which reloads HAProxy twice and sends requests the long way round until the version is loaded.)
"""

import asyncio
import logging
import sys
import threading
from typing import Any

import ray
import ray.serve._private.replica as ray_replica
import torch
from ray import serve

from gdl_ray import registry
from gdl_ray.engine import Engine
from gdl_ray.family import UNLABELLED
from gdl_ray.train.checkpoint import load_family
from serve.model import Model, ModelApp

CATALOG = "catalog"
"""Name of the catalog's application."""
PERIOD_S = 1.0
"""Seconds between a replica's questions to the catalog."""
RETRY_S = 5.0
"""Seconds until a version that could not be loaded is tried again."""
LISTEN_S = 60.0
"""Seconds after its construction in which a replica surely has begun to listen."""

log = logging.getLogger(__name__)


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


def load(name: str, version: int) -> Model:
    """Fetch a version from the registry and make it ready to answer; blocks.

    Raises:
        registry.RegistryUnavailable: the registry does not answer.
    """
    family = load_family(registry.fetch(name, version))
    engine = Engine(family)
    try:
        # The first sample is slower than all others: better ours than a user's.
        engine.submit(torch.tensor([0]), torch.tensor([UNLABELLED])).future.result()
    except Exception:
        engine.close(drain=False)
        raise
    return Model(name, version, family, engine)


class ModelReplica:
    """Holds the champion of one registered model."""

    def __init__(self, name: str) -> None:
        torch.set_num_threads(1)  # the cores belong to training; replicas scale by number
        # The engine's thread gives the interpreter away at every torch operation, and by default waits up to
        # 5 ms for a busy event loop to give it back.
        sys.setswitchinterval(0.0002)
        self._http = ModelApp(name)
        try:
            # Blocks: Serve holds requests back until a replica is constructed.
            self._http.model = load(name, registry.champions()[name])
        except Exception as error:  # told to those who ask, and tried again
            log.exception("the champion of %s could not be loaded", name)
            self._http.failure = f"its champion could not be loaded: {error}"
        # Serve constructs a replica on the event loop that later runs its requests.
        self._following = asyncio.get_running_loop().create_task(self._follow())
        listen_on_node_address()

    def __serve_build_asgi_app__(self) -> ModelApp:
        """Tell Serve the application that answers this replica's requests."""
        return self._http

    async def _follow(self) -> None:
        """Ask the catalog for ever which version is wanted, and serve it."""
        while True:
            await asyncio.sleep(RETRY_S if self._http.failure else PERIOD_S)
            served = self._http.model.version if self._http.model else None
            question = (self._http.name, served, self._http.failure)
            try:
                wanted: int | None = await serve.get_app_handle(CATALOG).follow.remote(*question)
            except Exception:  # while the catalog restarts, all stays as it is
                log.warning("the catalog does not answer", exc_info=True)
                continue
            if wanted == served:
                self._http.failure = None
            elif wanted is not None:
                await self._swap(wanted)

    async def _swap(self, version: int) -> None:
        """Load a version beside the one that answers, then let it take over."""
        try:
            model = await asyncio.to_thread(load, self._http.name, version)
        except Exception as error:  # whatever is wrong with it, the one before must go on answering
            log.exception("version %d of %s could not be loaded", version, self._http.name)
            self._http.failure = f"version {version} could not be loaded: {error}"
            return
        replaced, self._http.model, self._http.failure = self._http.model, model, None
        log.info("version %d of %s answers", version, self._http.name)
        if replaced is not None:
            await asyncio.to_thread(replaced.engine.close, drain=True)


def application(name: str) -> serve.Application:
    """Describe the application that serves a model."""
    return ingress(ModelReplica).bind(name)


def ingress(replica: type) -> serve.Deployment:
    """Describe the deployment of a class that answers HTTP itself."""
    deployment: serve.Deployment = serve.deployment(
        # Serving must fit beside training, which asks for every core.
        ray_actor_options={"num_cpus": 0},
        # The engine bounds the queue, in samples.
        max_ongoing_requests=10_000,
        logging_config={"enable_access_log": False},
    )(serve.ingress()(replica))
    return deployment
