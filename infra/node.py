"""What a service of a cluster's node runs in: `python -m infra.node NAME COMMAND...` becomes that command.

The head of a cluster is what the local platform is, with workers on other machines: Ray, MLflow and Serve, in
the same environment, but for passwords. `infra/scripts/service.sh` makes services of it.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from infra import haproxy, local, mlflow_server

USER = "ubuntu"
HOME = Path(f"/home/{USER}")
HERE = HOME / "gdl_ray"
"""Where nodes keep what they are sent."""
CONFIG = HOME / "ray_bootstrap_config.yaml"
"""Where `ray up` puts the cluster file for the head's autoscaler, as JSON; jobs read it too."""
PORTS = {"haproxy_stats": 20201, "haproxy_metrics": 20202, "serve_fallback": 20203}
"""Ports that the ingress uses besides its own; below those that the system and Ray's workers take."""
MLFLOW_PORT, SERVE_PORT, GCS_PORT, DASHBOARD_PORT = 5000, 8000, 6379, 8265


def main(arguments: Sequence[str]) -> None:
    """Become the command, in the environment of the service."""
    name, *command = arguments
    env = environment(name, os.environ, Path.home())
    os.chdir(env["GDL_RAY_HOME"])
    os.execvpe(command[0], command, env)  # noqa: S606  (the service's own command line)


def environment(name: str, given: Mapping[str, str], home: Path) -> dict[str, str]:
    """Make the environment of a service: `head`, `worker`, `mlflow` or `serve`.

    Args:
        name: the service.
        given: the environment so far; RAY_HEAD_IP is there on a worker, GDL_RAY_BUCKET on all.
        home: of the user who runs it, where `gdl_ray/private` is.
    """
    own = home / ".gdl_ray"
    own.mkdir(exist_ok=True)
    env = {
        **given,
        "GDL_RAY_HOME": str(own),
        "GDL_RAY_STORAGE": f"{given['GDL_RAY_BUCKET']}/runs",
        "MLFLOW_TRACKING_URI": f"http://{given.get('RAY_HEAD_IP', '127.0.0.1')}:{MLFLOW_PORT}",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{given.get('PATH', os.defpath)}",
        "PYTHONUNBUFFERED": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    if name == "mlflow":
        env |= mlflow_server.base_environment(own)
        del env["MLFLOW_TRACKING_URI"]
    if name in ("head", "serve"):
        env |= {"RAY_ADDRESS": f"127.0.0.1:{GCS_PORT}"} | _ingress(own)
    if name == "head":
        env["GDL_RAY_CLUSTER_FILE"] = str(CONFIG)
    return env | _secrets(home / HERE.name / "private" / "mlflow")


def _ingress(own: Path) -> dict[str, str]:
    temp = local._temp_dir(own)
    temp.mkdir(mode=0o700, exist_ok=True)
    return haproxy.environment(temp, PORTS)


def _secrets(file: Path) -> dict[str, str]:
    lines = file.read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line)


if __name__ == "__main__":
    main(sys.argv[1:])
