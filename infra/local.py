"""The platform on one machine: a Ray head, an MLflow server and Ray Serve, all on loopback.

Everything that it keeps lives in one folder, its home: `GDL_RAY_HOME`, else `.gdl_ray/` beside this package.
What runs is written into `platform.json` there the moment it is started, so that a later command finds,
reuses or ends it. So are the settings that it was started with: they hold until others are named.
"""

import fcntl
import hashlib
import json
import os
import random
import shlex
import shutil
import socket
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from http.client import HTTPException
from pathlib import Path

import gdl_ray.home
from infra import auth, haproxy, mlflow_server
from infra.database import database_of
from infra.errors import PlatformError as PlatformError
from infra.processes import Process, end, is_alive, spawn, uninterrupted
from infra.settings import Settings

PROJECT = Path(__file__).resolve().parent.parent
USUAL_PORTS = {"gcs": 6379, "dashboard": 8265, "mlflow": 5000, "serve": 8000}
OTHER_PORTS = ("ray_client", "dashboard_metrics", "autoscaler_metrics", *haproxy.PORTS)
SERVICES = ("ray", "mlflow", "serve")


@dataclass
class Platform:
    """What runs and how, as `platform.json` records it: settings, ports, the processes of services."""

    home: Path
    ports: dict[str, int] = field(default_factory=dict)
    processes: dict[str, Process] = field(default_factory=dict)
    settings: Settings = field(default_factory=Settings)

    @classmethod
    def load(cls, home: Path) -> "Platform":
        """Read the recorded platform of a home; one without ports and processes when nothing is recorded."""
        file = home / "platform.json"
        if not file.exists():
            return cls(home)
        record = json.loads(file.read_text())
        processes = {name: Process(**process) for name, process in record["processes"].items()}
        return cls(home, record["ports"], processes, Settings(**record.get("settings", {})))

    def save(self) -> None:
        """Write the record, whole or not at all."""
        processes = {name: asdict(process) for name, process in self.processes.items()}
        settings = asdict(self.settings)
        record = {"ports": self.ports, "urls": self.urls, "settings": settings, "processes": processes}
        new = self.home / "platform.json.new"
        new.write_text(json.dumps(record, indent=2) + "\n")
        new.replace(self.home / "platform.json")

    @property
    def urls(self) -> dict[str, str]:
        """The address of each service, once ports are chosen."""
        ports = {"ray": "dashboard", "mlflow": "mlflow", "serve": "serve"}
        return {
            name: f"http://127.0.0.1:{self.ports[port]}" for name, port in ports.items() if port in self.ports
        }

    def is_running(self, name: str) -> bool:
        """Tell whether the process of a service runs; Serve's replicas are processes of Ray."""
        process = self.processes.get("ray" if name == "serve" else name)
        return process is not None and is_alive(process)

    def is_healthy(self, name: str) -> bool:
        """Tell whether a service runs and answers."""
        pages = {"ray": "/api/gcs_healthz", "mlflow": "/health", "serve": "/healthz"}
        return self.is_running(name) and answers(self.urls[name] + pages[name])

    def log(self, name: str) -> Path:
        """Name the file where the output of a service goes."""
        return self.home / "logs" / f"{name}.log"

    @property
    def shell_file(self) -> Path | None:
        """Name the file that a user's shell reads to be let in; None where a line to copy says it all."""
        return self.home / "env.sh" if self.settings.auth else None

    @property
    def entrance(self) -> list[str]:
        """Tell, in lines, what a user types to be let in."""
        if self.shell_file is None:
            return [f"For `ray job submit`:  export RAY_ADDRESS={self.urls['ray']}"]
        password, token = self.home / auth.PASSWORD_FILE, self.home / auth.TOKEN_FILE
        return [
            f"For `ray job submit` and MLflow's clients:  . {shlex.quote(str(self.shell_file))}",
            f"In a browser, MLflow asks for: {auth.ADMIN}, and the password in {password}",
            f"Ray's dashboard asks for:      the token in {token}",
        ]

    @property
    def client_environment(self) -> dict[str, str]:
        """What clients of a user, such as `ray job submit`, find the platform by, and are let in by."""
        environment = {"RAY_ADDRESS": self.urls["ray"]}
        if self.settings.auth:
            environment |= auth.ray_environment(self.home)
            environment["MLFLOW_TRACKING_URI"] = self.urls["mlflow"]
            environment |= auth.mlflow_environment(self.home)
        return environment


@dataclass(frozen=True)
class Service:
    """One line of the status: a service, its process (None when down; Serve runs in Ray), where, and how."""

    name: str
    pid: int | None
    url: str
    healthy: bool


def home_dir() -> Path:
    """Find the folder of the platform's state and data: `GDL_RAY_HOME`, else `.gdl_ray/` of this checkout."""
    return gdl_ray.home.home(PROJECT / ".gdl_ray")


def up(home: Path, settings: Settings | None = None) -> Platform:
    """Start what does not run, and return when all of it answers.

    Args:
        home: folder of its state and data.
        settings: how; as before if left out.

    Raises:
        PlatformError: A service did not start, and the others go on, and are recorded. Or what runs was
            started with other settings.
    """
    for folder in ("logs", "artifacts", "runs", "data"):
        (home / folder).mkdir(parents=True, exist_ok=True)
    with locked(home):
        platform = Platform.load(home)
        _settle(platform, settings or platform.settings)
        _choose_ports(platform)
        for name in ("ray", "mlflow"):
            if not platform.is_running(name):
                _start(platform, name)
        for name in ("ray", "mlflow"):
            _wait_until_healthy(platform, name)
        if not platform.is_healthy("serve"):
            _start_serve(platform)
        _wait_until_healthy(platform, "serve")
        if platform.shell_file:
            auth.write_shell_file(platform.shell_file, platform.client_environment)
    return platform


def status(home: Path) -> list[Service]:
    """Tell what of the platform runs where."""
    platform = Platform.load(home)
    return [_service(platform, name) for name in SERVICES]


def down(home: Path) -> dict[str, int]:
    """End the processes that `up` started, and theirs; leave the data.

    Returns:
        How many processes each service had.
    """
    if not home.exists():
        return {}
    with locked(home):
        platform = Platform.load(home)
        ended = {}
        for name in ("serve", "ray", "mlflow"):  # MLflow last: a job that is ended may still have news for it
            if name in platform.processes:
                ended[name] = end(platform.processes[name])
                del platform.processes[name]
                platform.save()
    return {name: count for name, count in ended.items() if count}


def remember(home: Path, settings: Settings) -> None:
    """Have the next `up` of a home use these settings."""
    platform = Platform.load(home)
    platform.settings = settings
    platform.save()


def _settle(platform: Platform, settings: Settings) -> None:
    """Take settings, and see that the registry which they name can be had."""
    running = [name for name in ("ray", "mlflow") if platform.is_running(name)]
    if settings != platform.settings and running:
        raise PlatformError(
            f"what runs was started with {platform.settings}; end it first, with `python -m infra down`"
        )
    if "mlflow" not in running:
        database_of(settings, platform.home).check()
        _check_artifacts(settings.artifacts)
    if settings.auth:
        platform.home.chmod(0o700)  # the database is there, and the files of models
    platform.settings = settings


def _check_artifacts(artifacts: str) -> None:
    if "://" in artifacts:
        from infra.artifacts import Files  # here, because what speaks to buckets takes a while to import

        Files(artifacts)


def _service(platform: Platform, name: str) -> Service:
    running = platform.is_running(name)
    process = platform.processes.get("ray" if name == "serve" else name)
    pid = process.pid if process and running else None
    return Service(name, pid, platform.urls.get(name, ""), platform.is_healthy(name))


def _choose_ports(platform: Platform) -> None:
    """Choose ports for the services that do not run, the usual ones where free.

    MLflow's port stays while Ray runs, because every process of Ray has been told it.
    """
    wanted: list[str] = []
    if not platform.is_running("ray"):
        wanted += ["gcs", "dashboard", "serve", *OTHER_PORTS]
        wanted += [] if platform.is_running("mlflow") else ["mlflow"]
    taken = {port for name, port in platform.ports.items() if name not in wanted}
    for name in wanted:
        platform.ports[name] = _free_port(USUAL_PORTS.get(name), taken)
        taken.add(platform.ports[name])


def _free_port(usual: int | None, taken: set[int]) -> int:
    """Choose the usual port if free, else one below the range that the system gives out by itself."""
    candidates = random.sample(range(20_000, 30_000), 200)
    for port in [usual, *candidates] if usual else candidates:
        if port not in taken and _is_free(port):
            return port
    raise PlatformError("found no free port on 127.0.0.1 between 20000 and 30000")


def _is_free(port: int) -> bool:
    with closing(socket.socket()) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _start(platform: Platform, name: str) -> None:
    """Start a service, and record its process before anything can interrupt."""
    if name in platform.processes:
        end(platform.processes[name])  # its children may have outlived it, and hold its port
    command, env = {"ray": _ray, "mlflow": _mlflow, "serve": _serve}[name](platform)
    platform.log(name).write_bytes(b"")
    with uninterrupted():
        platform.processes[name] = spawn(command, platform.log(name), env, platform.home)
        platform.save()
    print(f"  {name:<7} starting   {platform.urls[name]}", flush=True)


def _start_serve(platform: Platform) -> None:
    """Run the command that deploys the service, unless an interrupted `up` has left it running."""
    deploying = platform.processes.get("serve")
    if deploying is None or not is_alive(deploying):
        _start(platform, "serve")


def _ray(platform: Platform) -> tuple[list[str], dict[str, str]]:
    ports = platform.ports
    temp = _fresh_temp_dir(platform.home)
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block"]
    options = {
        "node-ip-address": "127.0.0.1",
        "port": ports["gcs"],
        "dashboard-host": "127.0.0.1",
        "dashboard-port": ports["dashboard"],
        "ray-client-server-port": ports["ray_client"],
        "dashboard-agent-listen-port": 0,
        "temp-dir": temp,
    }
    return [*command, *(f"--{name}={value}" for name, value in options.items())], _environment(platform)


def _mlflow(platform: Platform) -> tuple[list[str], dict[str, str]]:
    return mlflow_server.command(platform.home, platform.settings, platform.ports["mlflow"])


def _serve(platform: Platform) -> tuple[list[str], dict[str, str]]:
    command = [sys.executable, "-m", "serve", "--http-port", str(platform.ports["serve"])]
    return command, _environment(platform)


def _environment(platform: Platform) -> dict[str, str]:
    """Build the environment of the Ray head, which jobs and Serve's replicas inherit."""
    ports = platform.ports
    return os.environ | {
        "GDL_RAY_HOME": str(platform.home),
        "MLFLOW_TRACKING_URI": platform.urls["mlflow"],
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(PROJECT), os.environ.get("PYTHONPATH")])),
        "PYTHONUNBUFFERED": "1",
        # Replicas are added when samples wait, not ten seconds later.
        "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
        "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
        # Said outright, else a token left by another use of Ray decides. The boundary here is loopback.
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        # Not a cluster, on any system: the node's address is then loopback, and Ray listens nowhere else.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "DASHBOARD_METRIC_PORT": str(ports["dashboard_metrics"]),
        "AUTOSCALER_METRIC_PORT": str(ports["autoscaler_metrics"]),
        # Not the one in the user's shell; and without one, Ray's helpers guess among the machine's clusters.
        "RAY_ADDRESS": f"127.0.0.1:{ports['gcs']}",
        **haproxy.environment(_temp_dir(platform.home), ports),
        **(_credentials(platform.home) if platform.settings.auth else {}),
    }


def _credentials(home: Path) -> dict[str, str]:
    return auth.ray_environment(home) | auth.mlflow_environment(home)


def _temp_dir(home: Path) -> Path:
    """Name Ray's folder for sockets and logs: a short path, for a socket's has 107 characters at most."""
    digest = hashlib.sha256(f"{os.getuid()}:{home}".encode()).hexdigest()[:8]
    return Path("/tmp") / f"gdl-{digest}"  # noqa: S108  # private: made by us, for us alone to enter


def _fresh_temp_dir(home: Path) -> Path:
    temp = _temp_dir(home)
    shutil.rmtree(temp, ignore_errors=True)  # what an earlier head has left
    try:
        temp.mkdir(mode=0o700)
    except FileExistsError as error:
        raise PlatformError(
            f"{temp}, the folder for Ray's sockets and logs, belongs to someone else"
        ) from error
    return temp


def _wait_until_healthy(platform: Platform, name: str, limit_s: float = 120.0) -> None:
    """Return when a service answers.

    Raises:
        PlatformError: It has ended, or does not answer in time.
    """
    begin = time.monotonic()
    while not platform.is_healthy(name):
        running = is_alive(platform.processes[name])
        if not running and not platform.is_healthy(name):
            raise _failure(platform, name, "ended before it answered")
        if time.monotonic() - begin > limit_s:
            raise _failure(platform, name, f"does not answer at {platform.urls[name]} after {limit_s:.0f} s")
        time.sleep(0.1)
    print(f"  {name:<7} ready      {platform.urls[name]}", flush=True)


def _failure(platform: Platform, name: str, what: str) -> PlatformError:
    log = platform.log(name)
    lines = log.read_text(errors="replace").splitlines()[-15:]
    return PlatformError("\n".join([f"{name} {what}; the end of {log}:", *(f"    {line}" for line in lines)]))


def answers(url: str) -> bool:
    """Tell whether an address answers a GET with status 200."""
    try:
        with urllib.request.urlopen(url, timeout=5) as response:  # noqa: S310
            return bool(response.status == 200)
    except (OSError, HTTPException):
        return False


@contextmanager
def locked(home: Path) -> Iterator[None]:
    """Let one command at a time change the platform of a home; the next one waits."""
    with (home / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
