"""Registries that MLflow has made: backed up while it writes, restored, refused when damaged, upgraded."""

import itertools
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from mlflow import MlflowClient

from infra import __main__ as command
from infra import auth, local
from infra.artifacts import Files
from infra.backup import SUMS_FILE, backup, restore
from infra.database import Sqlite
from infra.errors import PlatformError
from infra.processes import end, spawn
from infra.settings import Settings

MODEL = "digits-vae"


def client(home: Path) -> MlflowClient:
    """MLflow's own reader of a registry, without a server."""
    return MlflowClient(f"sqlite:///{home}/mlflow.db")


def register(home: Path, version: int) -> None:
    """Register a version as MLflow's clients do: its files first."""
    file = home / "artifacts" / "1" / "models" / f"m-{version}" / "weights.safetensors"
    file.parent.mkdir(parents=True)
    file.write_bytes(f"weights of {version}".encode() * 1000)
    made = client(home).create_model_version(MODEL, f"mlflow-artifacts:/1/models/m-{version}")
    assert int(made.version) == version
    client(home).set_registered_model_alias(MODEL, "champion", str(version))


def champion(home: Path) -> tuple[int, bytes]:
    """Number of the champion of a registry, and its file."""
    version = client(home).get_model_version_by_alias(MODEL, "champion")
    folder = str(version.source).replace("mlflow-artifacts:", f"{home}/artifacts")
    return int(version.version), (Path(folder) / "weights.safetensors").read_bytes()


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Home of a registry with one version."""
    home = tmp_path_factory.mktemp("original")
    client(home).create_registered_model(MODEL)
    register(home, 1)
    auth.write_private(home / "mlflow-webhooks.key", "the key")
    auth.write_private(home / "keys.json", "[]")
    return home


@pytest.fixture
def home(original: Path, tmp_path: Path) -> Path:
    """A copy of it, to do with as a test likes."""
    shutil.copytree(original, tmp_path / "home")
    return tmp_path / "home"


@pytest.fixture
def saved(home: Path, tmp_path: Path) -> Path:
    """A backup of it."""
    backup(home, tmp_path / "backup")
    return tmp_path / "backup"


def test_what_is_restored_is_what_there_was(home: Path, saved: Path, tmp_path: Path) -> None:
    restored = tmp_path / "restored"
    contents = restore(restored, saved, Settings())
    assert (contents.files, contents.size_bytes) == (4, sum(f.stat().st_size for f in saved.rglob("*.*")))
    assert champion(restored) == champion(home) == (1, b"weights of 1" * 1000)
    assert (restored / "mlflow-webhooks.key").read_text() == "the key"
    assert (restored / "keys.json").stat().st_mode & 0o777 == 0o600
    register(restored, 2)  # it goes on from there
    assert (champion(restored)[0], champion(home)[0]) == (2, 1)


def test_a_backup_is_checked_by_the_usual_program_and_is_private(saved: Path) -> None:
    check = ["sha256sum", "--check", "--strict", SUMS_FILE]
    assert subprocess.run(check, cwd=saved, capture_output=True, check=False).returncode == 0
    assert saved.stat().st_mode & 0o777 == 0o700
    listed = {line.partition("  ")[2] for line in (saved / SUMS_FILE).read_text().splitlines()}
    there = {str(file.relative_to(saved)) for file in saved.rglob("*") if file.is_file()}
    assert listed == there - {SUMS_FILE}


def test_files_may_move_to_another_place(home: Path, saved: Path, tmp_path: Path) -> None:
    shutil.rmtree(home)
    restore(home, saved, Settings(artifacts=str(tmp_path / "elsewhere")))
    assert (tmp_path / "elsewhere" / "1" / "models" / "m-1" / "weights.safetensors").exists()
    assert local.Platform.load(home).settings.artifacts == str(tmp_path / "elsewhere")


def test_a_backup_amid_writes_names_no_file_that_it_lacks(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A version is registered after each step of the backup, whichever comes first."""
    versions = itertools.count(2)

    def and_register(kind: type, step: str) -> None:
        before = getattr(kind, step)

        def after(*arguments: object) -> object:
            result = before(*arguments)
            register(home, next(versions))
            return result

        monkeypatch.setattr(kind, step, after)

    and_register(Sqlite, "dump")
    and_register(Files, "names")
    backup(home, tmp_path / "backup")
    monkeypatch.undo()
    restored = tmp_path / "restored"
    restore(restored, tmp_path / "backup", Settings())
    with closing(sqlite3.connect(restored / "mlflow.db")) as database:
        sources = [source for (source,) in database.execute("SELECT source FROM model_versions")]
    assert sources
    for source in sources:
        folder = source.replace("mlflow-artifacts:", f"{restored}/artifacts")
        assert (Path(folder) / "weights.safetensors").exists()
    assert next(versions) == 4


def damage_file(folder: Path) -> str:
    file = next(folder.rglob("weights.safetensors"))
    content = bytearray(file.read_bytes())
    content[5] ^= 1
    file.write_bytes(content)
    return "weights.safetensors is not what was written"


def lose_file(folder: Path) -> str:
    next(folder.rglob("weights.safetensors")).unlink()
    return "it has no artifacts/1/models/m-1/weights.safetensors"


def lose_database(folder: Path) -> str:
    (folder / "mlflow.db").unlink()
    return "it has no mlflow.db"


def lose_sums(folder: Path) -> str:
    (folder / SUMS_FILE).unlink()
    return f"is no backup: it has no {SUMS_FILE}"


@pytest.mark.parametrize("damage", [damage_file, lose_file, lose_database, lose_sums])
def test_a_damaged_backup_is_refused_and_nothing_written(
    saved: Path, tmp_path: Path, damage: Callable[[Path], str]
) -> None:
    told = damage(saved)
    with pytest.raises(PlatformError, match=told):
        restore(tmp_path / "restored", saved, Settings())
    assert not (tmp_path / "restored").exists()


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_nothing_that_is_there_is_overwritten(home: Path, saved: Path, tmp_path: Path) -> None:
    with pytest.raises(PlatformError, match="backup is there already; name a new folder"):
        backup(home, saved)
    (home / "lock").touch()
    before = snapshot(home)
    with pytest.raises(PlatformError, match=r"mlflow\.db is not empty, and is not overwritten"):
        restore(home, saved, Settings())
    assert snapshot(home) == before
    (home / "mlflow.db").unlink()
    (home / "artifacts" / "mine").write_text("mine")
    with pytest.raises(PlatformError, match="artifacts is not empty, and is not overwritten: it has mine"):
        restore(home, saved, Settings())
    (home / "artifacts" / "mine").unlink()
    (home / "mlflow-webhooks.key").write_text("mine")
    with pytest.raises(PlatformError, match=r"mlflow-webhooks\.key is another than that of the backup"):
        restore(home, saved, Settings())
    assert not (home / "mlflow.db").exists()


def test_an_interrupted_restore_may_be_repeated(home: Path, saved: Path, tmp_path: Path) -> None:
    restored = tmp_path / "restored"
    shutil.copytree(home, restored)
    (restored / "mlflow.db").unlink()  # it comes last; files and keys are there
    restore(restored, saved, Settings())
    assert champion(restored) == champion(home)


def test_a_backup_that_fails_leaves_nothing(home: Path, tmp_path: Path) -> None:
    (home / "mlflow.db").write_bytes(b"no database at all" * 100)
    with pytest.raises(PlatformError, match="cannot be read"):
        backup(home, tmp_path / "backup")
    (home / "mlflow.db").unlink()
    with pytest.raises(PlatformError, match="there is nothing to back up"):
        backup(home, tmp_path / "backup")
    assert [each.name for each in tmp_path.iterdir()] == ["home"]


def test_a_platform_that_runs_is_not_restored(saved: Path, tmp_path: Path) -> None:
    home = tmp_path / "restored"
    home.mkdir()
    mlflow = spawn(["sleep", "600"], home / "log", os.environ, home)
    try:
        local.Platform(home, {}, {"mlflow": mlflow}).save()
        with pytest.raises(PlatformError, match="the platform runs; end it first, with `python"):
            restore(home, saved, Settings())
    finally:
        end(mlflow)


def test_a_backup_of_the_other_kind_of_database_is_told(saved: Path, tmp_path: Path) -> None:
    nowhere = Settings(database="postgresql://mlflow@127.0.0.1:1/mlflow")
    with pytest.raises(PlatformError, match=r"holds no mlflow\.dump: it is of the other kind of database"):
        restore(tmp_path / "restored", saved, nowhere)


def test_the_commands_say_what_they_did(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GDL_RAY_HOME", str(home))
    monkeypatch.chdir(tmp_path)
    assert command.main(["backup", "monday"]) == 0
    assert command.main(["backup", "monday"]) == 1
    assert command.main(["restore", "monday"]) == 1
    shutil.rmtree(home)
    assert command.main(["restore", "monday", "--auth"]) == 0
    assert local.Platform.load(home).settings == Settings(auth=True)
    output, errors = capsys.readouterr()
    assert "monday holds 4 files, " in output
    assert "monday is restored: 4 files, " in output
    assert [line.partition(":")[0] for line in errors.splitlines()] == ["error", "error"]
    assert command.main(["restore", "monday", "--database", "mysql://a/b"]) == 2


def test_a_registry_of_an_older_mlflow_is_upgraded_by_the_documented_command(tmp_path: Path) -> None:
    """The database is one that MLflow 3.1.4 has made."""
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
        database.executescript(Path(__file__).with_name("mlflow-3.1.4.sql").read_text())
    backup(tmp_path, tmp_path / "before")
    mlflow = str(Path(sys.executable).with_name("mlflow"))
    upgrade = [mlflow, "db", "upgrade", f"sqlite:///{tmp_path}/mlflow.db"]
    subprocess.run(upgrade, check=True, capture_output=True, timeout=120)
    upgraded = client(tmp_path)
    version = upgraded.get_model_version_by_alias(MODEL, "champion")
    assert (int(version.version), version.tags) == (1, {"test/bits_per_dim": "2.0138"})
    assert version.run_id is not None
    history = upgraded.get_metric_history(version.run_id, "train/loss")
    assert [(each.step, each.value) for each in history] == [(0, 99.5), (10, 87.25), (20, 84.5)]
    assert upgraded.get_run(version.run_id).data.params == {"optimization.batch_size": "64"}
    with closing(sqlite3.connect(tmp_path / "before" / "mlflow.db")) as kept:  # for the way back
        assert kept.execute("SELECT version_num FROM alembic_version").fetchall() == [("bda7b8c39065",)]
