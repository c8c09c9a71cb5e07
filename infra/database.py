"""MLflow's database, a file of SQLite or a database of Postgres: asked for, dumped and loaded."""

import shutil
import sqlite3
import subprocess
from abc import ABC, abstractmethod
from contextlib import closing
from pathlib import Path

from infra.errors import PlatformError
from infra.settings import SQLITE, Settings

_CONNECT_S = 10


class Database(ABC):
    """Where MLflow keeps runs, models, versions and aliases."""

    uri: str
    """As MLflow takes it."""
    dump_name: str
    """Name of its file in a backup."""

    @abstractmethod
    def check(self) -> None:
        """Ask whether it can be used.

        Raises:
            PlatformError: It cannot.
        """

    @abstractmethod
    def is_empty(self) -> bool:
        """Tell whether it has no table.

        Raises:
            PlatformError: It cannot be asked.
        """

    @abstractmethod
    def dump(self, file: Path) -> None:
        """Write all of it, as of one moment, to a file, while others use it.

        Raises:
            PlatformError: It cannot be read.
        """

    @abstractmethod
    def load(self, file: Path) -> None:
        """Fill it, while it is empty, with what `dump` has written: all of that or nothing.

        Raises:
            PlatformError: It cannot be.
        """


class Sqlite(Database):
    """A file of SQLite.

    Args:
        path: of the file.
    """

    dump_name = "mlflow.db"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.uri = f"sqlite:///{path}"

    def check(self) -> None:
        """Find nothing to ask: MLflow makes the file."""

    def is_empty(self) -> bool:
        """Tell whether the file is not there."""
        return not self.path.exists()

    def dump(self, file: Path) -> None:
        """Copy it by SQLite's own means, which see no half of a change."""
        try:
            with (
                closing(sqlite3.connect(f"{self.path.as_uri()}?mode=ro", uri=True)) as source,
                closing(sqlite3.connect(file)) as target,
            ):
                source.backup(target)
        except sqlite3.Error as error:
            raise PlatformError(f"{self.path} cannot be read: {error}") from error

    def load(self, file: Path) -> None:
        """Put a copy into its place."""
        new = self.path.with_name(f"{self.path.name}.new")
        shutil.copyfile(file, new)
        new.replace(self.path)


class Postgres(Database):
    """A database of Postgres.

    Args:
        url: postgresql://USER@HOST:PORT/NAME; passwords are found by libpq, in ~/.pgpass for one.
    """

    dump_name = "mlflow.dump"

    def __init__(self, url: str) -> None:
        self.url = url
        self.uri = url.replace("postgresql://", "postgresql+psycopg://", 1)

    def check(self) -> None:
        """Connect to it."""
        self._count_tables()

    def is_empty(self) -> bool:
        """Tell whether it has no table of anybody's."""
        return self._count_tables() == 0

    def _count_tables(self) -> int:
        import psycopg  # here, because few platforms need it

        query = "SELECT count(*) FROM pg_tables WHERE schemaname NOT IN ('pg_catalog', 'information_schema')"
        try:
            with psycopg.connect(self.url, connect_timeout=_CONNECT_S) as connection:
                row = connection.execute(query).fetchone()
        except psycopg.Error as error:
            raise PlatformError(
                f"--database {self.url} cannot be used: {' '.join(str(error).split())}; "
                f"`psql {self.url}` must connect without asking for a password (see infra/production.md)"
            ) from error
        return int(row[0]) if row else 0

    def dump(self, file: Path) -> None:
        """Have pg_dump write it, from one snapshot."""
        _run("pg_dump", "--format=custom", *_SAME_OWNER, f"--file={file}", f"--dbname={self.url}")

    def load(self, file: Path) -> None:
        """Have pg_restore fill it, in one transaction."""
        _run("pg_restore", "--single-transaction", *_SAME_OWNER, f"--dbname={self.url}", str(file))


# What is loaded belongs to the user who loads it, whatever they were called where it was dumped.
_SAME_OWNER = ("--no-owner", "--no-privileges", "--no-password")


def _run(program: str, *arguments: str) -> None:
    found = shutil.which(program)
    if found is None:
        raise PlatformError(
            f"{program} is not on the PATH: install Postgres's client programs, no older than its server "
            "(on Debian and Ubuntu, `apt-get install postgresql-client`)"
        )
    done = subprocess.run([found, *arguments], capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        raise PlatformError(f"{program} failed: {' '.join(done.stderr.split())}")


def database_of(settings: Settings, home: Path) -> Database:
    """Find the database of a platform."""
    if settings.database == SQLITE:
        return Sqlite(home / "mlflow.db")
    return Postgres(settings.database)
