"""The MLflow server: its command line and its environment, on SQLite or Postgres, a folder or a bucket."""

import os
import secrets
import sys
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from infra import auth
from infra.database import database_of
from infra.settings import Settings

WEBHOOKS_KEY_FILE = "mlflow-webhooks.key"
"""In the home: the key of what signs MLflow's events. The database without it is worth less."""

# The auth app's tables lie beside MLflow's, so that one database is the whole of the registry. A password is
# checked, which is slow on purpose, once a minute; there is one process, so none believes an old one.
AUTH_CONFIG = """\
[mlflow]
default_permission = READ
database_uri = {uri}
admin_username = {admin}
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
auth_cache_ttl_seconds = 60
"""


def command(home: Path, settings: Settings, port: int) -> tuple[list[str], dict[str, str]]:
    """Make the command line of the server and its environment.

    Args:
        home: folder of its keys, and of what it keeps unless the settings name another place.
        settings: where it keeps the registry, and whether it asks for a password.
        port: on loopback.
    """
    uri = database_of(settings, home).uri
    destination, environment = artifacts_destination(settings.artifacts or str(home / "artifacts"))
    options = {
        "host": "127.0.0.1",
        "port": port,
        "workers": 1,
        "backend-store-uri": uri,
        "artifacts-destination": destination,
    }
    environment |= base_environment(home)
    if settings.auth:
        options["app-name"] = "basic-auth"
        environment |= _auth_environment(home, uri)
    inherited = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    line = [str(Path(sys.executable).with_name("mlflow")), "server"]
    return [*line, *(f"--{name}={value}" for name, value in options.items())], inherited | environment


def base_environment(home: Path) -> dict[str, str]:
    """Make the environment of a server that tells its events to others on loopback."""
    return {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        # The server's own job queue (for judging language models) would be nine more processes.
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        # Serve listens on loopback, and speaks plain HTTP there.
        "MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "http,https",
        "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS": "true",
        # Another key would make what is in the database unreadable, and MLflow fail on it.
        "MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY": auth.kept(home / WEBHOOKS_KEY_FILE, auth.fernet_key),
        # A hook is heeded from the first event on, not a minute later.
        "MLFLOW_WEBHOOK_CACHE_TTL": "0",
        "MLFLOW_WEBHOOK_REQUEST_TIMEOUT": "5",
    }


def _auth_environment(home: Path, uri: str) -> dict[str, str]:
    config = home / "mlflow-auth.ini"
    # In such a file, a percent sign is written twice.
    config.write_text(AUTH_CONFIG.format(uri=uri.replace("%", "%%"), admin=auth.ADMIN))
    return {
        "MLFLOW_AUTH_CONFIG_PATH": str(config),
        "MLFLOW_AUTH_ADMIN_USERNAME": auth.ADMIN,
        "MLFLOW_AUTH_ADMIN_PASSWORD": auth.mlflow_environment(home)["MLFLOW_TRACKING_PASSWORD"],
        # Signs the forms of pages that are open in a browser; a page from before a restart is loaded again.
        "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(32),
    }


def artifacts_destination(artifacts: str) -> tuple[str, dict[str, str]]:
    """Say where artifacts go in MLflow's words: an address, and what its environment adds to it."""
    if "://" not in artifacts:
        return artifacts, {}
    url = urlsplit(artifacts)
    asked = {name: values[-1] for name, values in parse_qs(url.query).items()}
    environment = {}
    if endpoint := asked.get("endpoint_override"):
        environment["MLFLOW_S3_ENDPOINT_URL"] = f"{asked.get('scheme', 'https')}://{endpoint}"
    if region := asked.get("region"):
        environment["AWS_DEFAULT_REGION"] = region
    return url._replace(query="").geturl(), environment
