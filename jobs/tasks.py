"""Work that the cluster does in tasks, as many at a time as there is room for, each on a CPU or a GPU."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray

from jobs.cluster import places, whole_nodes
from jobs.options import seconds

MAX_RETRIES = 3
"""How often a task is done again whose worker has died."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tasks:
    """Who does the tasks of a job; what it asks of the cluster, as Demand."""

    job: str
    workers: int = 0
    """Most at a time; 0 for as many as there is room for."""
    gpu: bool = False
    timeout: str = ""
    """As --timeout has it."""

    least_places = 1

    @property
    def asked(self) -> str:
        """Options that ask for workers."""
        return f"--workers {self.workers}" if self.workers else "workers"

    @property
    def resources(self) -> dict[str, float]:
        """What Ray has to give each worker."""
        return {"CPU": 1, "GPU": 1} if self.gpu else {"CPU": 1}

    @property
    def timeout_s(self) -> float | None:
        """Seconds to wait for the first worker; None where no limit is given."""
        return seconds("timeout", self.timeout) if self.timeout else None

    @property
    def device(self) -> str:
        """What a task computes on: cpu or cuda."""
        return "cuda" if self.gpu else "cpu"

    def remote(self, function: Callable[..., Any]) -> Any:
        """Make a Ray task of a function, which is to stand in a module that workers import."""
        settings: Any = {
            "num_cpus": 1,
            "num_gpus": 1 if self.gpu else 0,
            "max_calls": 0,  # Ray would end the process of each GPU task, and with it the model
            "max_retries": MAX_RETRIES,
        }
        return ray.remote(**settings)(function)

    def room(self) -> int:
        """Count how many tasks may be under way: one for each worker, and one that it need not wait for."""
        return self.workers or 2 * max(1, places(self.resources, whole_nodes()))
