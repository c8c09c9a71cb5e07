"""Settings of a platform: what can be asked for, what is kept, and what is said of the rest."""

import argparse
from pathlib import Path

import pytest

from infra.settings import Settings, SettingsError, add_options, chosen

DATABASE = "postgresql://mlflow@db.example:5433/mlflow"


def read(*arguments: str, before: Settings | None = None) -> Settings:
    parser = argparse.ArgumentParser()
    add_options(parser)
    return chosen(parser.parse_args(arguments), before or Settings())


def test_what_is_not_told_stays_as_before() -> None:
    before = Settings(database=DATABASE, artifacts="s3://models/mlflow", auth=True)
    assert read(before=before) == before
    assert read("--database", "sqlite", before=before) == Settings(artifacts="s3://models/mlflow", auth=True)
    assert read("--no-auth", before=before) == Settings(database=DATABASE, artifacts="s3://models/mlflow")
    assert read() == Settings(database="sqlite", artifacts="", auth=False)


def test_a_folder_is_the_same_wherever_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert read("--artifacts", "files") == Settings(artifacts=f"{tmp_path}/files")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--database", "mysql://a@b/c"], "--database mysql://a@b/c must be sqlite, or postgresql://USER@"),
        (["--database", "postgresql://db.example"], "must be sqlite, or postgresql://USER@HOST:PORT/NAME"),
        (["--database", "postgresql:///mlflow"], "must be sqlite, or postgresql://USER@HOST:PORT/NAME"),
        (["--artifacts", "gs://models"], "--artifacts gs://models must be a folder, or s3://BUCKET/FOLDER"),
        (["--artifacts", "s3:///mlflow"], "must be a folder, or s3://BUCKET/FOLDER"),
        (["--artifacts", "s3://models?endpoint=a:1"], "endpoint means nothing here; after the question mark"),
    ],
)
def test_what_cannot_be_is_refused_with_its_cure(arguments: list[str], told: str) -> None:
    with pytest.raises(SettingsError) as caught:
        read(*arguments)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    "database", [DATABASE.replace("mlflow@", "mlflow:hunter2@"), f"{DATABASE}?password=hunter2"]
)
def test_a_password_in_an_address_is_refused_and_not_repeated(database: str) -> None:
    with pytest.raises(SettingsError, match=r"put it into ~/\.pgpass") as caught:
        Settings(database=database)
    assert str(caught.value).endswith(f" name the database {DATABASE}")
    assert "hunter2" not in str(caught.value)
