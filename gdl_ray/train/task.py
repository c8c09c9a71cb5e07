"""What a training job asks of its workers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gdl_ray.train.plan import Plan

RUN_FILE = "run.json"
"""What the driver writes into the store before any worker starts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What the workers of a job train."""

    family: str
    """A key of FAMILIES."""
    model: Any
    """The family's Config."""
    data: str
    """A key of DATASETS."""
    data_root: Path
    """Folder of prepared datasets, on every node."""
    plan: Plan
    storage: str
    """Address of the run's store."""
    keep: int
    """How many of the last checkpoints to keep."""
    validate_apart: bool = False
    """Whether checkpoints are validated by tasks beside the workers."""
    gpu: bool = False
    """Whether such a task gets a GPU, as workers do."""
