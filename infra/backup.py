"""Backup and restore of a platform's registry: MLflow's database, the files of its models, and its keys.

    DIR/SHA256SUMS        a line for each of the others; `sha256sum --check SHA256SUMS` reads it too
    DIR/mlflow.db         the database: a copy of SQLite's file, or `mlflow.dump`, as pg_dump writes it
    DIR/artifacts/        the files of models and runs, by their path in MLflow
    DIR/keys/             what the platform keeps secret: whoever reads a backup has it

A backup may be made while the platform works. The database is copied first, as of one moment, and the files
after it: MLflow writes the files of a version before the version, and changes none of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import gdl_ray.home
from gdl_ray.home import file_sha256
from infra import auth, local
from infra.artifacts import Files
from infra.database import database_of
from infra.errors import PlatformError
from infra.mlflow_server import WEBHOOKS_KEY_FILE
from infra.settings import Settings

SUMS_FILE = "SHA256SUMS"
_ARTIFACTS, _KEYS = "artifacts/", "keys/"
KEY_FILES = (WEBHOOKS_KEY_FILE, auth.PASSWORD_FILE, "keys.json")
"""Files of the home that go with the registry: MLflow's key and password, and the keys of serving."""


@dataclass(frozen=True)
class Contents:
    """What a backup holds."""

    files: int
    size_bytes: int

    def __str__(self) -> str:
        """Say how much it is."""
        return f"{self.files:,} file{'s' if self.files > 1 else ''}, {self.size_bytes / 1e6:,.1f} MB"


def backup(home: Path, folder: Path) -> Contents:
    """Copy the registry of a home's platform, which may be running, into a new folder.

    Raises:
        PlatformError: The folder is there already, or something cannot be read. There is no folder then.
    """
    if folder.exists():
        raise PlatformError(f"{folder} is there already; name a new folder, and the old backup stays whole")
    settings = local.Platform.load(home).settings
    database = database_of(settings, home)
    if database.is_empty():
        raise PlatformError(f"there is nothing to back up: {database.uri} is empty")
    with gdl_ray.home.made_whole(folder) as new:
        new.chmod(0o700)
        database.dump(new / database.dump_name)
        artifacts = new / _ARTIFACTS
        artifacts.mkdir()
        files = _files(settings, home)
        try:
            copied = files.copy(files.names(), Files(str(artifacts)))
        except OSError as error:
            raise PlatformError(f"{files.address} cannot be copied: {error}") from error
        sums = {f"{_ARTIFACTS}{name}": sha256 for name, sha256 in copied.items()}
        sums[database.dump_name] = file_sha256(new / database.dump_name)
        sums |= _copy_keys(home, new / _KEYS)
        _write_sums(new / SUMS_FILE, sums)
        return _contents(new, sums)


def restore(home: Path, folder: Path, settings: Settings) -> Contents:
    """Fill the empty registry of a platform that is down with a backup.

    Args:
        home: of the platform. It remembers the settings.
        folder: that `backup` has made.
        settings: where database and files go. Files may go from a folder to a bucket, or back.

    Raises:
        PlatformError: The backup is damaged, something is there that would be overwritten, or the platform
            runs; nothing was changed. Or a place cannot be written to.
    """
    sums = _checked_sums(folder)
    home.mkdir(parents=True, exist_ok=True)
    with local.locked(home):
        _refuse_to_overwrite(home, folder, settings, sums)
        files = _files(settings, home)
        try:
            Files(str(folder / _ARTIFACTS)).copy(list(_within(sums, _ARTIFACTS)), files)
        except OSError as error:
            raise PlatformError(f"{files.address} cannot be written to: {error}") from error
        for name in _within(sums, _KEYS):
            auth.write_private(home / name, (folder / _KEYS / name).read_text())
        database = database_of(settings, home)
        database.load(folder / database.dump_name)  # after the files: what it names is there
        local.remember(home, settings)
    return _contents(folder, sums)


def _files(settings: Settings, home: Path) -> Files:
    return Files(settings.artifacts or str(home / "artifacts"))


def _copy_keys(home: Path, target: Path) -> dict[str, str]:
    target.mkdir(mode=0o700)
    kept = [name for name in KEY_FILES if (home / name).exists()]
    for name in kept:
        auth.write_private(target / name, (home / name).read_text())
    return {f"{_KEYS}{name}": file_sha256(target / name) for name in kept}


def _contents(folder: Path, sums: Mapping[str, str]) -> Contents:
    return Contents(len(sums), sum((folder / name).stat().st_size for name in sums))


def _write_sums(file: Path, sums: Mapping[str, str]) -> None:
    if odd := [name for name in sums if "\n" in name or "\\" in name]:
        raise PlatformError(f"the name {odd[0]!r} cannot be written in a list of sums; rename the file")
    file.write_text("".join(f"{sha256}  {name}\n" for name, sha256 in sorted(sums.items())))


def _checked_sums(folder: Path) -> dict[str, str]:
    """Read the sums of a backup, and compare them with its files."""
    try:
        lines = (folder / SUMS_FILE).read_text().splitlines()
    except OSError as error:
        raise PlatformError(f"{folder} is no backup: it has no {SUMS_FILE}") from error
    sums = {name: sha256 for sha256, _, name in (line.partition("  ") for line in lines)}
    for name, sha256 in sums.items():
        if not (folder / name).is_file():
            raise PlatformError(f"{folder} is damaged: it has no {name}")
        if file_sha256(folder / name) != sha256:
            raise PlatformError(f"{folder} is damaged: {name} is not what was written")
    return sums


def _refuse_to_overwrite(home: Path, folder: Path, settings: Settings, sums: Mapping[str, str]) -> None:
    database = database_of(settings, home)
    if local.Platform.load(home).is_running("mlflow"):
        raise PlatformError("the platform runs; end it first, with `python -m infra down`")
    if database.dump_name not in sums:
        raise PlatformError(
            f"{folder} holds no {database.dump_name}: it is of the other kind of database, "
            "between which MLflow cannot move; set --database to the kind that it was"
        )
    if not database.is_empty():
        raise PlatformError(f"{database.uri} is not empty, and is not overwritten; name an empty database")
    files = _files(settings, home)
    artifacts = _within(sums, _ARTIFACTS)
    for name in files.names():  # what an interrupted restore has left is right, and may stay
        if artifacts.get(name) != files.sha256(name):
            raise PlatformError(f"{files.address} is not empty, and is not overwritten: it has {name}")
    for name, sha256 in _within(sums, _KEYS).items():
        if (home / name).exists() and file_sha256(home / name) != sha256:
            raise PlatformError(f"{home / name} is another than that of the backup; move it away first")


def _within(sums: Mapping[str, str], prefix: str) -> dict[str, str]:
    """Choose the sums of the files of one folder, by their names there."""
    return {name.removeprefix(prefix): sha256 for name, sha256 in sums.items() if name.startswith(prefix)}
