"""What a user decides about a platform: where the registry is kept, and whether clients need credentials."""

import argparse
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from urllib.parse import parse_qsl, urlencode, urlsplit

SQLITE = "sqlite"
"""The database that needs no server: a file in the platform's home."""

ENDPOINT_FIELDS = ("endpoint_override", "scheme", "region")
"""What may follow a bucket's address, after a question mark: those of pyarrow, as for `--storage` of jobs."""


class SettingsError(ValueError):
    """A setting cannot be; the message names it, its value and the cure."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of a platform, which its home remembers.

    Raises:
        SettingsError: One cannot be.
    """

    database: str = SQLITE
    """Of MLflow: `sqlite`, or postgresql://USER@HOST:PORT/NAME. It carries no password, because lists of
    processes and records would show it: clients of Postgres read ~/.pgpass, or PGPASSWORD."""
    artifacts: str = ""
    """Where MLflow keeps models and pictures: a folder, or s3://BUCKET/FOLDER, with
    ?endpoint_override=HOST:PORT&scheme=http for servers other than Amazon's. Empty for the home's folder."""
    auth: bool = False
    """Whether Ray asks for a token, and MLflow for a name and a password."""

    def __post_init__(self) -> None:
        _check_database(self.database)
        _check_artifacts(self.artifacts)

    def __str__(self) -> str:
        """Write them as the options of a command."""
        artifacts = f"--artifacts {self.artifacts}" if self.artifacts else "artifacts in its home"
        return f"--database {self.database}, {artifacts}, {'--auth' if self.auth else '--no-auth'}"


def _check_database(database: str) -> None:
    if database == SQLITE:
        return
    url = urlsplit(database)
    queries = parse_qsl(url.query, keep_blank_values=True)
    if url.password is not None or "password" in dict(queries):
        user, at, host = url.netloc.rpartition("@")
        query = urlencode([(name, value) for name, value in queries if name != "password"])
        without = url._replace(netloc=f"{user.partition(':')[0]}{at}{host}", query=query).geturl()
        raise SettingsError(
            "--database must not carry a password, which lists of processes would show: "
            f"put it into ~/.pgpass, and name the database {without}"
        )
    if url.scheme != "postgresql" or not url.hostname or not url.path.strip("/"):
        raise SettingsError(
            f"--database {database} must be {SQLITE}, or postgresql://USER@HOST:PORT/NAME, "
            "such as postgresql://mlflow@localhost:5432/mlflow"
        )


def _check_artifacts(artifacts: str) -> None:
    if "://" not in artifacts:
        return
    url = urlsplit(artifacts)
    if url.scheme != "s3" or not url.netloc:
        raise SettingsError(
            f"--artifacts {artifacts} must be a folder, or s3://BUCKET/FOLDER, such as s3://models/mlflow"
        )
    for name, _ in parse_qsl(url.query, keep_blank_values=True):
        if name not in ENDPOINT_FIELDS:
            raise SettingsError(
                f"--artifacts {artifacts}: {name} means nothing here; after the question mark may stand "
                f"{', '.join(ENDPOINT_FIELDS)}"
            )


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options by which a command is told the settings."""
    parser.add_argument(
        "--database", help=f"of MLflow: postgresql://USER@HOST:PORT/NAME, or {SQLITE} (what it is at first)"
    )
    parser.add_argument("--artifacts", help="of MLflow: s3://BUCKET/FOLDER, or a folder")
    parser.add_argument(
        "--auth", action=argparse.BooleanOptionalAction, help="Ray asks for a token, MLflow for a password"
    )


def chosen(arguments: argparse.Namespace, before: Settings) -> Settings:
    """Read the settings that a command was told; what it was not told stays as before.

    Raises:
        SettingsError: One cannot be.
    """
    told = {name: getattr(arguments, name) for name in asdict(before)}
    given = {name: value for name, value in told.items() if value is not None}
    if "://" not in given.get("artifacts", "://"):
        given["artifacts"] = str(Path(given["artifacts"]).expanduser().absolute())
    return replace(before, **given)
