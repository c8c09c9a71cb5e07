"""The images and the composition, read by the schema of compose, hadolint and the commands that they start.

No engine runs them here: checked is what can be wrong in the files, and that each such fault is found.
"""

import http.server
import os
import re
import shlex
import socketserver
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import jsonschema  # type: ignore[import-untyped]
import mlflow.environment_variables
import pytest
import ray.scripts.scripts
import ray.serve.scripts
import yaml
from check_jsonschema.builtin_schemas import get_builtin_schema  # type: ignore[import-untyped]
from cryptography.fernet import Fernet
from mlflow.cli import cli as mlflow_cli
from ray.serve._private import constants
from ray.serve.schema import ServeDeploySchema

from infra import docker, haproxy

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "infra" / "docker"
COMPOSE = (FOLDER / "compose.yaml").read_text()
IMAGES = ("Dockerfile", "mlflow.Dockerfile")
COMMANDS: dict[str, click.Command] = {
    "ray start": ray.scripts.scripts.start,
    "serve deploy": ray.serve.scripts.deploy,
    "mlflow server": mlflow_cli.commands["server"],
}
_SPECIFICATION = get_builtin_schema("vendor.compose-spec")
COMPOSE_SCHEMA = jsonschema.validators.validator_for(_SPECIFICATION)(_SPECIFICATION)

Compose = dict[str, Any]


def variables(text: str) -> dict[str, str]:
    """The variables that a composition takes, and their defaults."""
    return dict(re.findall(r"(?<!\$)\$\{([A-Z0-9_]+):-([^}]*)\}", text))


def read(text: str) -> Compose:
    """A composition with its defaults."""
    plain = re.sub(r"(?<!\$)\$\{[A-Z0-9_]+:-([^}]*)\}", r"\1", text).replace("$$", "$")
    loaded: Compose = yaml.safe_load(plain)
    return loaded


def problems_with_command(words: list[str]) -> Iterator[str]:
    """What the command line of a container has wrong, asked of the command itself."""
    if words[:2] == ["python", "-m"] and find_spec(words[2]) is None:
        yield f"there is no module {words[2]}"
    command = COMMANDS.get(" ".join(words[:2]))
    if command:
        try:
            command.make_context(words[1], words[2:])
        except click.ClickException as error:
            yield f"{shlex.join(words)}: {error.format_message()}"


def schema(compose: Compose) -> Iterator[str]:
    yield from (error.message for error in COMPOSE_SCHEMA.iter_errors(compose))


def ports_are_on_loopback(compose: Compose) -> Iterator[str]:
    for name, service in compose["services"].items():
        for port in service.get("ports", []):
            if not re.fullmatch(r"127\.0\.0\.1:\d+:\d+", str(port)):
                yield f"{name} publishes {port}"


def commands_are_understood(compose: Compose) -> Iterator[str]:
    for name, service in compose["services"].items():
        words = service.get("command", [])
        if words and words[0] in ("ray", "serve", "mlflow", "python"):
            yield from (f"{name}: {problem}" for problem in problems_with_command(words))
        for line in [*words, *service.get("healthcheck", {}).get("test", [])]:
            if line.startswith("import "):
                compile(line, name, "exec")
            for declared in re.findall(r"serve deploy [^;]*", line):
                yield from (f"{name}: {problem}" for problem in problems_with_command(declared.split()))
            for module in re.findall(r"python -m (\S+)", line):
                if find_spec(module) is None:
                    yield f"{name}: there is no module {module}"


def references_lead_somewhere(compose: Compose) -> Iterator[str]:
    """Secrets, networks, volumes, configs and services that are named are there."""
    for name, service in compose["services"].items():
        for kind in ("secrets", "networks"):
            for target in set(service.get(kind, [])) - compose[kind].keys():
                yield f"{name}: {kind} has no {target}"
        for volume in service.get("volumes", []):
            if volume.split(":")[0] not in compose["volumes"]:
                yield f"{name}: there is no volume {volume}"
        for config in service.get("configs", []):
            if config["source"] not in compose["configs"]:
                yield f"{name}: there is no config {config}"
        for target in service.get("depends_on", {}):
            if target not in compose["services"]:
                yield f"{name} depends on {target}"
    for config in compose["configs"].values():
        if not (FOLDER / config["file"]).is_file():
            yield f"there is no {config['file']}"


def hosts_are_services(compose: Compose) -> Iterator[str]:
    """Every address inside is a service's, at a port that it listens on, on a network that both are on."""
    ports = {"postgres": 5432, "object-store": 8333, "mlflow": 5000}
    listening = {*ports.items(), ("ray-head", 6379), ("ray-head", 8265), ("ray-head", 8000)}
    for name, service in compose["services"].items():
        text = yaml.safe_dump([service.get("environment", {}), service.get("command", [])])
        for host, port in re.findall(r"(?:http://|@|address=)([a-z][a-z-]*):(\d+)", text):
            if (host, int(port)) not in listening:
                yield f"{name}: nobody listens at {host}:{port}"
            elif not set(compose["services"][host]["networks"]) & set(service["networks"]):
                yield f"{name} shares no network with {host}"


def secrets_are_files(compose: Compose) -> Iterator[str]:
    """Secrets are those that `init` makes, a service has what it names, and no value is one itself."""
    for name, secret in compose["secrets"].items():
        if secret != {"file": f"./.secrets/{name}"} or name not in docker.SECRETS:
            yield f"`init` does not make {name}: {secret}"
    for name, service in compose["services"].items():
        text = yaml.safe_dump(service)
        named = set(re.findall(r"/run/secrets/([a-z0-9-]+)", text))
        for missing in named ^ set(service.get("secrets", [])):
            yield f"{name}: secret {missing} is named and not given, or given and not named"
        for variable in service.get("environment", {}):
            if re.search("PASSWORD|TOKEN|SECRET|ACCESS_KEY", variable) and not variable.endswith("_FILE"):
                yield f"{name}: {variable} is not read from a file"


def mlflow_answers_to_its_name(compose: Compose) -> Iterator[str]:
    allowed = [word for word in compose["services"]["mlflow"]["command"] if "--allowed-hosts" in word]
    hosts = allowed[0].partition("=")[2].split(",") if allowed else []
    for host in ("mlflow:5000", "127.0.0.1:5000", "localhost:15000"):
        if not any(fnmatch(host, pattern) for pattern in hosts):
            yield f"MLflow refuses {host}"
    address = compose["services"]["ray-head"]["environment"]["MLFLOW_TRACKING_URI"]
    if address != "http://mlflow:5000":
        yield f"MLflow is not at {address}"


def variables_are_known(compose: Compose) -> Iterator[str]:
    """Variables that a container is given mean something to what runs there, by the name of its code."""
    known = set(mlflow.environment_variables.__dict__) | {"PGPASSWORD", "S3_BUCKET", "RAY_AUTH_TOKEN"}
    for name, service in compose["services"].items():
        for variable in service.get("environment", {}):
            plain = variable.removesuffix("_FILE")
            if plain.startswith(("MLFLOW", "RAY")) and plain not in known | {"RAY_ADDRESS"}:
                yield f"{name}: nobody reads {variable}"


def ray_has_shared_memory(compose: Compose) -> Iterator[str]:
    for name in ("ray-head", "ray-worker", "ray-worker-gpu"):
        if not compose["services"][name].get("shm_size"):
            yield f"{name} has 64 MB of shared memory"


RULES = (
    schema,
    ports_are_on_loopback,
    commands_are_understood,
    references_lead_somewhere,
    hosts_are_services,
    secrets_are_files,
    mlflow_answers_to_its_name,
    variables_are_known,
    ray_has_shared_memory,
)


def problems(text: str) -> list[str]:
    compose = read(text)
    return [f"{rule.__name__}: {problem}" for rule in RULES for problem in rule(compose)]


def test_the_composition_is_right() -> None:
    assert problems(COMPOSE) == []


@pytest.mark.parametrize(
    ("right", "wrong", "rule"),
    [
        ("shm_size: ${SHM", "shm_sise: ${SHM", "schema"),
        ("condition: service_healthy", "condition: healthy", "schema"),
        ("capabilities: [gpu]", "capability: [gpu]", "schema"),
        ("shm_size: ${SHM_SIZE:-2gb}", "", "ray_has_shared_memory"),
        ('"127.0.0.1:${SERVE_PORT', '"${SERVE_PORT', "ports_are_on_loopback"),
        ('"127.0.0.1:${DASHBOARD_PORT', '"0.0.0.0:${DASHBOARD_PORT', "ports_are_on_loopback"),
        ("--num-cpus=0", "--num-cpu=0", "commands_are_understood"),
        ("--num-cpus=0", "--num-cpus=none", "commands_are_understood"),
        ("--app-name=basic-auth", "--app-name=basic", "commands_are_understood"),
        ("--artifacts-destination", "--artifact-destination", "commands_are_understood"),
        ("serve deploy --address", "serve deploy --adress", "commands_are_understood"),
        ("python -m infra.doctor", "python -m infra.docter", "commands_are_understood"),
        ("--allowed-hosts=mlflow:*,", "--allowed-hosts=", "mlflow_answers_to_its_name"),
        ("file: ./serve.yaml", "file: ./served.yaml", "references_lead_somewhere"),
        ("networks: [platform]\n  restart", "networks: [plattform]\n  restart", "references_lead_somewhere"),
        ('"home:/var', '"hom:/var', "references_lead_somewhere"),
        ("postgres: {condition", "postgress: {condition", "references_lead_somewhere"),
        ("AWS_ENDPOINT_URL: http://object-store:8333", "AWS_ENDPOINT_URL: http://minio:9000", "hosts_are"),
        ("--address=ray-head:6379", "--address=ray-head:6739", "hosts_are_services"),
        (
            "networks: [registry, platform]\n    depends_on",
            "networks: [registry]\n    depends_on",
            "hosts_are",
        ),
        ("/run/secrets/ray-token", "/run/secrets/ray-tokens", "secrets_are_files"),
        ("PGPASSWORD_FILE: /run/secrets/postgres-password", "PGPASSWORD: hunter2", "secrets_are_files"),
        ("./.secrets/ray-token", "./ray-token", "secrets_are_files"),
        ("MLFLOW_FLASK_SERVER_SECRET_KEY_FILE", "MLFLOW_FLASK_SECRET_KEY_FILE", "variables_are_known"),
        ("RAY_AUTH_TOKEN_FILE", "RAY_TOKEN_FILE", "variables_are_known"),
    ],
)
def test_each_planted_fault_is_found(right: str, wrong: str, rule: str) -> None:
    assert right in COMPOSE
    found = problems(COMPOSE.replace(right, wrong, 1))
    assert any(problem.startswith(rule) for problem in found), found


def test_the_example_of_settings_has_all_of_them_with_their_defaults() -> None:
    lines = (FOLDER / ".env.example").read_text().splitlines()
    example = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    assert example == variables(COMPOSE)


def test_the_service_is_one_that_serve_takes() -> None:
    config = ServeDeploySchema.model_validate(yaml.safe_load((FOLDER / "serve.yaml").read_text()))
    assert config.http_options.port == 8000
    service = read(COMPOSE)["services"]["serve"]
    (declared,) = re.findall(r"serve deploy [^;]*", service["command"][-1])
    assert declared.split()[-1] == service["configs"][0]["target"]


@pytest.mark.parametrize(("answers", "told"), [(True, []), (False, ["serve", "sleep 240"])])
def test_the_service_is_declared_whenever_it_does_not_answer(
    answers: bool, told: list[str], tmp_path: Path
) -> None:
    """Run the loop in a real shell, against a real server; `sleep 30` ends it."""
    said = tmp_path / "said"
    for name, does in {
        "serve": f"echo serve >>{said}",
        "sleep": f'[ "$1" = 30 ] && kill $PPID; echo "sleep $1" >>{said}',
        "python": f'exec {sys.executable} "$@"',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o755)
    service = read(COMPOSE)["services"]["serve"]
    assert service["restart"] == "unless-stopped"
    with socketserver.TCPServer(("127.0.0.1", 0), Healthy if answers else Absent) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        here = f"127.0.0.1:{server.server_address[1]}"
        command = [word.replace("ray-head:8000", here) for word in service["command"]]
        path = f"{tmp_path}{os.pathsep}{os.defpath}"
        subprocess.run(command, env={"PATH": path}, check=False, timeout=30)
        server.shutdown()
    assert said.read_text().splitlines()[: len(told) + 1] == [*told, "sleep 30"]


class Absent(http.server.BaseHTTPRequestHandler):
    """Knows no address, as Serve's ingress before anything is declared."""

    status = 404

    def do_GET(self) -> None:
        self.send_response(self.status if self.path == "/healthz" else 404)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


class Healthy(Absent):
    """Lives."""

    status = 200


def hadolint(text: str) -> str:
    command = [str(Path(sys.executable).with_name("hadolint")), "--no-color", "-"]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=False).stdout


@pytest.mark.parametrize("name", IMAGES)
def test_hadolint_has_nothing_to_say(name: str) -> None:
    text = (FOLDER / name).read_text()
    assert hadolint(text) == ""
    for right, wrong, sign in [
        ("pip install --no-cache-dir", "pip install", "DL3042"),
        (":${PYTHON}-slim-bookworm", "", "DL3006"),
        ("WORKDIR /home/app", "WORKDIR home", "DL3000"),
        ("COPY", "ADD", "DL3020"),
    ]:
        assert right in text
        assert sign in hadolint(text.replace(right, wrong)), sign


def copied(dockerfile: str) -> list[str]:
    found = re.findall(r"^COPY (?:--\S+ )*(.+) \S+$", dockerfile, re.MULTILINE)
    return [source for sources in found for source in sources.split()]


@pytest.mark.parametrize("name", IMAGES)
def test_what_is_copied_is_there_and_let_into_the_image(name: str) -> None:
    let_in = re.findall("^!(.+)$", (FOLDER / f"{name}.dockerignore").read_text(), re.MULTILINE)
    sources = copied((FOLDER / name).read_text())
    assert sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert any(source == each or source.startswith(f"{each}/") for each in let_in), source
    assert all(any(each == source or source.startswith(f"{each}/") for source in sources) for each in let_in)


def pins(text: str) -> dict[str, str]:
    return dict(re.findall(r"^'?([\w-]+)(?:\[\w+\])?==([\w.]+)", re.sub(r"\s+", "\n", text), re.MULTILINE))


def test_versions_are_those_that_are_tested() -> None:
    tested = pins((ROOT / "constraints.txt").read_text())
    image = pins((FOLDER / "mlflow.Dockerfile").read_text())
    assert image.keys() == {"mlflow", "boto3", "psycopg"}
    assert image == {name: tested[name] for name in image}
    for name in IMAGES:
        text = (FOLDER / name).read_text()
        for install in re.findall(r"pip install (?:.|\\\n)*", text):
            assert "-c " in install or "--no-deps" in install, f"without constraints: {install}"
        python = re.search(r"^ARG PYTHON=(.*)$", text, re.MULTILINE)
        assert python
        assert python[1] >= "3.11"


def environment(name: str) -> dict[str, str]:
    """What an image's ENV sets."""
    lines = (FOLDER / name).read_text().partition("\nENV ")[2].splitlines()
    lines = [line for line in lines if not line.strip().startswith("#")]
    end = next(number for number, line in enumerate(lines) if not line.endswith("\\"))
    words = shlex.split(" ".join(line.rstrip("\\") for line in lines[: end + 1]))
    return dict(word.split("=", 1) for word in words)


def test_the_image_of_ray_sets_what_the_local_platform_sets(tmp_path: Path) -> None:
    image = environment("Dockerfile")
    local = haproxy.environment(tmp_path, dict.fromkeys(haproxy.PORTS, 1))
    assert {name: image[name] for name in local if name in image} == {
        **{name: local[name] for name in local if name in image},
        "RAY_SERVE_HAPROXY_BINARY_PATH": "/opt/haproxy/haproxy",
    }
    left_out = local.keys() - image.keys()  # folders and ports of which a container has its own
    assert all(re.search("PORT$|LOC$|PATH$|BASE$|FILE$", name) for name in left_out), left_out
    source = Path(constants.__file__).read_text()
    for name in image:
        if name.startswith("RAY_SERVE_"):
            assert f'"{name}"' in source, f"Ray Serve does not read {name}"


def test_the_image_shows_gpus_and_asks_for_a_token() -> None:
    image = environment("Dockerfile")
    assert image["NVIDIA_VISIBLE_DEVICES"] == "all"
    assert set(image["NVIDIA_DRIVER_CAPABILITIES"].split(",")) == {"compute", "utility"}
    assert image["RAY_AUTH_MODE"] == "token"


def test_the_image_of_mlflow_sets_what_mlflow_reads() -> None:
    source = Path(mlflow.environment_variables.__file__).read_text()
    for name in environment("mlflow.Dockerfile"):
        if name.startswith("MLFLOW_"):
            assert f'"{name}"' in source, f"MLflow does not read {name}"


def test_secrets_are_made_once_for_their_owner_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "secrets"
    assert docker.main(["init", str(folder)]) == 0
    made = {file.name: file.read_text() for file in folder.iterdir()}
    assert made.keys() == docker.SECRETS.keys()
    assert len(set(made.values())) == len(made)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {0o600}
    Fernet(made["mlflow-webhooks-key"])  # raises if it is none
    (folder / "ray-token").unlink()
    assert docker.main(["init", str(folder)]) == 0
    told = capsys.readouterr().out
    assert all(secret not in told for secret in made.values())
    again = {file.name: file.read_text() for file in folder.iterdir()}
    assert {name for name in made if made[name] != again[name]} == {"ray-token"}


@pytest.mark.parametrize("name", ["docker/README.md", "k8s/README.md"])
def test_what_readers_are_told_to_type_exists(name: str) -> None:
    text = (ROOT / "infra" / name).read_text()
    modules = re.findall(r"python -m ([a-z_.]+[a-z_])", text)
    files = re.findall(r"(?:-f |-k |`)((?:infra|tests|overlays|base)/[\w/.-]+)", text)
    assert modules
    assert files
    assert all(find_spec(module) for module in modules)
    assert all((ROOT / file).exists() or (ROOT / "infra/k8s" / file).exists() for file in files), files


def run_entrypoint(folder: Path, user: str, *command: str) -> "subprocess.CompletedProcess[str]":
    """Run the images' entry point, for a user of this number; what becomes of root is told, not done."""
    stubs = folder / "bin"
    stubs.mkdir()
    for name, script in {"id": f"echo {user}", "setpriv": 'echo "setpriv $*"'}.items():
        (stubs / name).write_text(f"#!/bin/sh\n{script}\n")
        (stubs / name).chmod(0o755)
    (folder / "password").write_text("it's $HOME\n")
    env = {
        "PATH": f"{stubs}{os.pathsep}{os.defpath}",
        "SECRETS_FOLDER": str(folder),
        "PGPASSWORD_FILE": f"{folder}/password",
        "OTHER_FILE": "/etc/hostname",
    }
    command = ("sh", str(FOLDER / "entrypoint.sh"), *command)
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def test_secrets_reach_the_command_by_its_environment(tmp_path: Path) -> None:
    done = run_entrypoint(tmp_path, "1000", "env")
    found = dict(line.split("=", 1) for line in done.stdout.splitlines())
    assert found["PGPASSWORD"] == "it's $HOME"
    assert "PGPASSWORD_FILE" not in found
    assert found["OTHER_FILE"] == "/etc/hostname"


def test_root_becomes_another_user(tmp_path: Path) -> None:
    done = run_entrypoint(tmp_path, "0", "ray", "start")
    assert done.stdout == "setpriv --reuid=app --regid=app --init-groups ray start\n"


def test_a_secret_that_is_missing_is_told(tmp_path: Path) -> None:
    env = {"PATH": os.defpath, "SECRETS_FOLDER": str(tmp_path), "RAY_AUTH_TOKEN_FILE": f"{tmp_path}/token"}
    command = ("sh", str(FOLDER / "entrypoint.sh"), "env")
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "the secret for RAY_AUTH_TOKEN, is missing" in done.stderr


def test_the_ingress_is_made_for_every_user_to_run(tmp_path: Path) -> None:
    assert docker.main(["haproxy", str(tmp_path)]) == 0
    version = subprocess.run([tmp_path / "haproxy", "-v"], capture_output=True, text=True, check=True)
    assert version.stdout.startswith("HAProxy version")
    assert stat.S_IMODE((tmp_path / "haproxy").stat().st_mode) == 0o755
