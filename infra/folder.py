"""What this machine keeps of a stack: key, token, passwords, code and cluster file, all of it private."""

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from gdl_ray.home import file_sha256
from infra.auth import fernet_key, write_private
from infra.local import PROJECT, home_dir
from infra.plan import Refused
from infra.stack import Stack


@dataclass(frozen=True)
class Folder:
    """The folder of a stack in the platform's home; readable by its owner alone."""

    path: Path

    @property
    def key(self) -> Path:
        """The private key for ssh."""
        return self.path / "key.pem"

    @property
    def token(self) -> Path:
        """Ray's token, without which the cluster answers nobody."""
        return self.path / "ray" / "auth_token"

    @property
    def secrets(self) -> Path:
        """Passwords of MLflow, as lines of NAME=VALUE that the services of nodes read."""
        return self.path / "private" / "mlflow"

    @property
    def code(self) -> Path:
        """Folder with the wheel of this project that the nodes install."""
        return self.path / "code"

    @property
    def cluster(self) -> Path:
        """The cluster file, an ordinary one for `ray up`, `ray down` and `ray exec`."""
        return self.path / "cluster.yaml"

    def make(self) -> None:
        """Make what is not there yet: the folder, the token, the passwords."""
        self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        # A folder each, because Ray warns of single files that it is to send.
        for file in (self.token, self.secrets):
            file.parent.mkdir(exist_ok=True, mode=0o700)
        if not self.token.exists():
            write_private(self.token, secrets.token_hex(32))
        if not self.secrets.exists():
            password = secrets.token_urlsafe(24)
            given = {
                "MLFLOW_TRACKING_USERNAME": "admin",
                "MLFLOW_TRACKING_PASSWORD": password,
                "MLFLOW_AUTH_ADMIN_PASSWORD": password,
                "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_urlsafe(32),
                "MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY": fernet_key(),
            }
            write_private(self.secrets, "".join(f"{name}={value}\n" for name, value in given.items()))

    def pack(self) -> str:
        """Build the wheel of this checkout as it is now, the same bytes from the same files.

        Returns:
            The start of its sha256 sum, by which nodes know whether they have it.
        """
        with tempfile.TemporaryDirectory(dir=self.path) as scratch:
            source, built = Path(scratch, "source"), Path(scratch, "built")
            _copy_project(source)
            command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
            env = os.environ | {"SOURCE_DATE_EPOCH": "315532800"}  # the first day that zip files know
            subprocess.run(  # noqa: S603
                [*command, "--wheel-dir", str(built), str(source)],
                check=True,
                env=env,
                stdin=subprocess.DEVNULL,
            )
            (wheel,) = built.glob("*.whl")
            digest = file_sha256(wheel)[:12]
            shutil.copy(PROJECT / "constraints.txt", built)
            shutil.rmtree(self.code, ignore_errors=True)
            shutil.copytree(built, self.code)
        return digest

    def write(self, cluster: dict[str, Any]) -> Path:
        """Write the cluster file; returns where."""
        write_private(self.cluster, dump(cluster))
        return self.cluster


def folder_of(stack: Stack) -> Folder:
    """Name the folder of a stack: by all that tells it from others of its name, in other places."""
    place = (stack.cloud, stack.project, stack.region, stack.stack)
    return Folder(home_dir() / "stacks" / "-".join(word for word in place if word))


def dump(cluster: dict[str, Any]) -> str:
    """Write a cluster as YAML that people can read: scripts as they are, nothing said by reference."""
    return yaml.dump(cluster, Dumper=_Dumper, sort_keys=False, width=110)


class _Dumper(yaml.SafeDumper):
    """YAML's safe dumper, which repeats what is there twice."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def _copy_project(target: Path) -> None:
    """Copy what a wheel is made of: a build leaves things behind, and takes up what others left."""
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc")
    for name in ("gdl_ray", "jobs", "serve", "infra"):
        shutil.copytree(PROJECT / name, target / name, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(PROJECT / name, target)


def make_key(file: Path, comment: str) -> None:
    """Make a private key that this user alone can read: whole, or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".key-") as scratch:
        new = Path(scratch) / "key"
        _ssh_keygen("-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", str(new))
        new.chmod(0o600)
        new.replace(file)


def public_key(file: Path) -> str:
    """Compute the public half of a private key, as ssh writes it."""
    return _ssh_keygen("-y", "-f", str(file)).strip()


def _ssh_keygen(*arguments: str) -> str:
    try:
        done = subprocess.run(["ssh-keygen", *arguments], capture_output=True, text=True, check=False)  # noqa: S603, S607
    except FileNotFoundError:
        raise Refused("ssh-keygen is not on this machine: install OpenSSH's client") from None
    if done.returncode:
        raise Refused(f"{arguments[-1]}: ssh-keygen cannot use it: {done.stderr.strip()}")
    return done.stdout
