"""How the MLflow server is started: its keys, its addresses, and no secret where all can read it."""

import base64
import configparser
from pathlib import Path

from infra import auth, mlflow_server
from infra.settings import Settings


def test_mlflow_keeps_the_key_of_its_hooks_to_itself(tmp_path: Path) -> None:
    first, again = mlflow_server.base_environment(tmp_path), mlflow_server.base_environment(tmp_path)
    assert first == again  # what a former server has encrypted, a later one can read
    key = first["MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY"]
    assert len(base64.urlsafe_b64decode(key)) == 32
    (tmp_path / "other").mkdir()
    assert mlflow_server.base_environment(tmp_path / "other")["MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY"] != key
    (file,) = (path for path in tmp_path.iterdir() if path.is_file())
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_bucket_is_named_in_the_words_of_mlflow() -> None:
    assert mlflow_server.artifacts_destination("/data/models?x") == ("/data/models?x", {})
    assert mlflow_server.artifacts_destination("s3://models/mlflow") == ("s3://models/mlflow", {})
    elsewhere = "s3://models/mlflow?endpoint_override=127.0.0.1:9000&scheme=http&region=eu-west-1"
    assert mlflow_server.artifacts_destination(elsewhere) == (
        "s3://models/mlflow",
        {"MLFLOW_S3_ENDPOINT_URL": "http://127.0.0.1:9000", "AWS_DEFAULT_REGION": "eu-west-1"},
    )


def test_the_password_is_not_on_the_command_line(tmp_path: Path) -> None:
    command, environment = mlflow_server.command(tmp_path, Settings(auth=True), 5000)
    password = environment["MLFLOW_AUTH_ADMIN_PASSWORD"]
    assert password == (tmp_path / auth.PASSWORD_FILE).read_text()
    assert not any(password in argument for argument in command)
    assert "--app-name=basic-auth" in command


def test_users_are_kept_in_the_database_of_the_registry(tmp_path: Path) -> None:
    url = "postgresql://ml%40flow@db.example/mlflow"
    _, environment = mlflow_server.command(tmp_path, Settings(database=url, auth=True), 5000)
    config = configparser.ConfigParser()
    config.read(environment["MLFLOW_AUTH_CONFIG_PATH"])
    assert config["mlflow"]["database_uri"] == "postgresql+psycopg://ml%40flow@db.example/mlflow"
