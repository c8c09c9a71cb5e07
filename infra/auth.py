"""Who may use the platform: Ray's token and MLflow's password, each in a file that nobody else can read.

Neither is ever on a command line, where every user of the machine could read it. The servers get them from
files and their environment, and a user's shell from `env.sh` in the platform's home.
"""

import base64
import secrets
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path

ADMIN = "admin"
"""Name of the user whose password is kept, and as whom jobs and replicas speak to MLflow."""

TOKEN_FILE = "ray-token"  # noqa: S105  (a name)
"""In the home: what Ray asks for."""

PASSWORD_FILE = "mlflow-password"  # noqa: S105  (a name)
"""In the home: the admin's password."""


def kept(file: Path, make: Callable[[], str]) -> str:
    """Read a secret from its file, for its owner alone to read; the first time, make it."""
    if not file.exists():
        write_private(file, make())
    return file.read_text()


def write_private(file: Path, content: str) -> None:
    """Write a file that only its owner can read, whole or not at all."""
    new = file.with_name(f"{file.name}.new")
    new.unlink(missing_ok=True)
    new.touch(mode=0o600)
    new.write_text(content)
    new.replace(file)


def fernet_key() -> str:
    """Make a key of the kind with which MLflow encrypts what signs its events."""
    return base64.urlsafe_b64encode(secrets.token_bytes(32)).decode()


def ray_environment(home: Path) -> dict[str, str]:
    """Tell Ray, its clients and its jobs to ask for a token, and where it is."""
    file = home / TOKEN_FILE
    kept(file, lambda: secrets.token_hex(32))
    # RAY_AUTH_TOKEN would go before the file; empty is as good as not set.
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(file), "RAY_AUTH_TOKEN": ""}


def mlflow_environment(home: Path) -> dict[str, str]:
    """Tell clients of MLflow who they are."""
    password = kept(home / PASSWORD_FILE, lambda: secrets.token_urlsafe(24))
    return {"MLFLOW_TRACKING_USERNAME": ADMIN, "MLFLOW_TRACKING_PASSWORD": password}


def write_shell_file(file: Path, environment: Mapping[str, str]) -> None:
    """Write what a user's shell reads by `. FILE`; for its owner alone, because it holds a password."""
    lines = [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    write_private(file, "".join(f"{line}\n" for line in lines))
