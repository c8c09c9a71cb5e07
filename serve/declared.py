"""The service as a file declares it, for KubeRay's RayService and for `serve deploy`.

    applications:
      - name: gdl_ray
        import_path: serve.declared:application
        args: {url: "http://gdl-ray-serve-svc:8000", replicas: "1:4"}

`python -m serve` starts the same one on the machine where it is typed.
"""

from pydantic import BaseModel, ConfigDict, Field, field_validator
from ray import serve

from serve import operator, replica
from serve.scaling import parse_replicas


class Arguments(BaseModel):
    """What the file may say of the service; an unknown name is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: str = Field(pattern=r"^https?://[^/]+$")
    """Where the registry reaches the service, to tell it of its events."""
    require_keys: bool = True
    """Whether each request needs an API key; false only where nobody but its users reaches the service."""
    cors_origins: tuple[str, ...] = ()
    """Origins of pages that browsers may let ask."""
    replicas: tuple[int, int] = (1, 1)
    """Least and most replicas of the pool, written as 2 or "1:4"."""
    gpus: float = Field(default=0.0, ge=0)
    """GPUs of each, or the share of one."""
    models: int = Field(default=32, ge=1)
    """Most versions that a replica holds."""

    @field_validator("replicas", mode="before")
    @classmethod
    def _read_replicas(cls, value: object) -> tuple[int, int]:
        least, most = parse_replicas(str(value))
        if not least:
            raise ValueError(f"replicas={value!r} must keep one at least: the pool answers for all models")
        return least, most


def application(arguments: Arguments) -> serve.Application:
    """Describe the service; Serve calls it with the `args` of the file."""
    return operator.application(replica.Settings(**arguments.model_dump()))
