"""MLflow's database on real SQLite and Postgres: dumped while others write, loaded whole or not at all."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psycopg
import pytest

from infra.database import Postgres, Sqlite, database_of
from infra.errors import PlatformError
from infra.settings import Settings
from tests.postgres import postgres_server

PASSWORD = "of-the-test"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a server that asks for a password, which clients find in the user's file."""
    file = tmp_path_factory.mktemp("home") / "pgpass"
    file.write_text(f"127.0.0.1:*:*:mlflow:{PASSWORD}\n")
    file.chmod(0o600)
    with pytest.MonkeyPatch.context() as patch, postgres_server(PASSWORD) as url:
        patch.setenv("PGPASSFILE", str(file))
        yield url


def execute(url: str, *statements: str) -> list[tuple[object, ...]]:
    """Run statements on a server, each by itself; what the last one answers."""
    with psycopg.connect(url, autocommit=True) as connection:
        for statement in statements:
            cursor = connection.execute(statement.encode())
        return cursor.fetchall() if cursor.description else []


@pytest.fixture
def two_databases(server: str) -> Iterator[tuple[str, str]]:
    """Addresses of two empty databases."""
    root = server.rpartition("/")[0]
    names = ("first", "second")
    execute(server, *(f"CREATE DATABASE {name}" for name in names))
    yield f"{root}/first", f"{root}/second"
    execute(server, *(f"DROP DATABASE {name} WITH (FORCE)" for name in names))


ROWS = [(1, "a"), (2, "ünï'; --")]


def test_sqlite_is_copied_as_of_one_moment(tmp_path: Path) -> None:
    first, second = Sqlite(tmp_path / "first.db"), Sqlite(tmp_path / "second.db")
    assert first.is_empty()
    with closing(sqlite3.connect(first.path)) as writer:
        writer.execute("CREATE TABLE runs (id INTEGER, name TEXT)")
        writer.executemany("INSERT INTO runs VALUES (?, ?)", ROWS)
        writer.commit()
        writer.execute("INSERT INTO runs VALUES (3, 'not committed')")
        first.dump(tmp_path / "dump")
    assert not first.is_empty()
    second.load(tmp_path / "dump")
    with closing(sqlite3.connect(second.path)) as reader:
        assert reader.execute("SELECT * FROM runs ORDER BY id").fetchall() == ROWS


def test_sqlite_that_is_none_is_told(tmp_path: Path) -> None:
    (tmp_path / "broken.db").write_bytes(b"no database at all" * 100)
    with pytest.raises(PlatformError, match=r"broken\.db cannot be read: file is not a database"):
        Sqlite(tmp_path / "broken.db").dump(tmp_path / "dump")


def test_postgres_is_dumped_as_of_one_moment(two_databases: tuple[str, str], tmp_path: Path) -> None:
    first, second = map(Postgres, two_databases)
    assert first.is_empty()
    execute(first.url, "CREATE TABLE runs (id INTEGER, name TEXT)")
    with psycopg.connect(first.url) as writer:
        for row in ROWS:
            writer.execute("INSERT INTO runs VALUES (%s, %s)", row)
        writer.commit()
        writer.execute("INSERT INTO runs VALUES (3, 'not committed')")
        first.dump(tmp_path / "dump")
    assert not first.is_empty()
    second.load(tmp_path / "dump")
    assert execute(second.url, "SELECT * FROM runs ORDER BY id") == ROWS


def test_postgres_is_loaded_whole_or_not_at_all(two_databases: tuple[str, str], tmp_path: Path) -> None:
    first, second = map(Postgres, two_databases)
    execute(first.url, "CREATE TABLE a (id INTEGER)", "CREATE TABLE b (id INTEGER)")
    first.dump(tmp_path / "dump")
    execute(second.url, "CREATE TABLE b (id INTEGER)")
    with pytest.raises(PlatformError, match=r'pg_restore failed: .*relation "b" already exists'):
        second.load(tmp_path / "dump")
    assert execute(second.url, "SELECT tablename FROM pg_tables WHERE schemaname = 'public'") == [("b",)]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("/mlflow", "/nope"), 'database "nope" does not exist'),
        (("mlflow@", "stranger@"), "no password supplied"),
        (("127.0.0.1:", "127.0.0.1:1"), "port 1[0-9]* failed|invalid port number"),
    ],
)
def test_a_postgres_that_cannot_be_used_is_told_in_a_line(
    server: str, change: tuple[str, str], told: str
) -> None:
    url = change[1].join(server.rsplit(change[0], 1))
    with pytest.raises(PlatformError, match=told) as caught:
        Postgres(url).check()
    assert str(caught.value).startswith(f"--database {url} cannot be used: ")
    assert "\n" not in str(caught.value)
    Postgres(server).check()


def test_without_its_programs_postgres_says_what_to_install(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PlatformError, match="pg_dump is not on the PATH: install"):
        Postgres(server).dump(tmp_path / "dump")


def test_mlflow_is_told_which_driver(tmp_path: Path) -> None:
    url = "postgresql://mlflow@db.example:5433/mlflow?sslmode=require"
    uri = "postgresql+psycopg://mlflow@db.example:5433/mlflow?sslmode=require"
    assert database_of(Settings(database=url), tmp_path).uri == uri
    assert database_of(Settings(), tmp_path).uri == f"sqlite:///{tmp_path}/mlflow.db"
