"""What the containers need and no image can hold: `python -m infra.docker init` makes the secrets.

python -m infra.docker init                    .secrets/ beside compose.yaml, a file for each
kubectl create secret generic gdl-ray --from-file=infra/docker/.secrets      the same ones for Kubernetes
"""

import argparse
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path

from infra import auth, haproxy

FOLDER = Path(__file__).parent / ".secrets"
"""Where compose.yaml looks for them."""


def _word() -> str:
    return secrets.token_hex(24)  # letters and digits alone: it stands in addresses and headers


SECRETS: dict[str, Callable[[], str]] = {
    "postgres-password": _word,
    "redis-password": _word,
    "mlflow-admin-password": _word,
    # Signs the forms of MLflow's pages.
    "mlflow-forms-key": _word,
    # Encrypts what signs MLflow's events; with another one, MLflow cannot read its database.
    "mlflow-webhooks-key": auth.fernet_key,
    "ray-token": _word,
    "s3-access-key": _word,
    "s3-secret-key": _word,
}
"""The secrets, by the names of their files, and how each is made."""


def init(folder: Path) -> list[str]:
    """Make the secrets that are not there yet, for their owner alone to read; those that are there stay.

    Returns:
        The names of those made now.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    missing = [name for name in SECRETS if not (folder / name).exists()]
    for name in missing:
        new = folder / f".{name}.new"
        new.unlink(missing_ok=True)
        new.touch(mode=0o600)
        new.write_text(SECRETS[name]())  # no newline: Kubernetes takes files as they are
        new.replace(folder / name)
    return missing


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code 0."""
    description, _, _ = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(prog="python -m infra.docker", description=description)
    verbs = parser.add_subparsers(dest="verb", required=True)
    making = verbs.add_parser("init", help="make the secrets that are not there yet")
    making.add_argument("folder", type=Path, nargs="?", default=FOLDER, help=f"by default {FOLDER}")
    building = verbs.add_parser("haproxy", help="while an image is built: make the program that Serve starts")
    building.add_argument("folder", type=Path, help="for it, in the image")
    asked = parser.parse_args(arguments)
    if asked.verb == "haproxy":
        haproxy.environment(asked.folder, dict.fromkeys(haproxy.PORTS, 0))
        (asked.folder / "haproxy").chmod(0o755)
        return 0
    made = init(asked.folder)
    told = f"made {', '.join(made)}" if made else "all secrets are there"
    print(f"{asked.folder}: {told}")
    return 0
