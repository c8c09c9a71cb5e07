"""`make demo`: the platform, one trained model and its samples, by the commands that a user would type."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from infra import local

MODEL = "digits-vae"
TRAIN = "ray job submit --working-dir . -- python -m jobs.train vae --data digits --workers 2"
REQUEST = {"n": 64, "seed": 7, "format": "png"}
SAMPLES = Path("samples.png")
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


class DemoError(Exception):
    """A step of the demo failed; the message says which, and where to look."""


def main() -> int:
    """Run the demo from the project's folder.

    Returns:
        0 when samples are there; 1 when a step failed; 130 after Ctrl-C.
    """
    try:
        _demo()
    except (DemoError, local.PlatformError) as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; the platform still runs, `make down` ends it", file=sys.stderr)
        return 130
    return 0


def _demo() -> None:
    os.chdir(local.PROJECT)
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    _say("python -m infra up")
    platform = local.up(local.home_dir())
    urls = platform.urls
    _say(f". {platform.shell_file}" if platform.shell_file else f"export RAY_ADDRESS={urls['ray']}")
    os.environ |= platform.client_environment
    _run(shlex.split(TRAIN), "the training job failed; its output is above, and in the Ray dashboard")
    model_url = f"{urls['serve']}/v1/models/{MODEL}"
    _wait_for(model_url)
    _sample(f"{model_url}/sample")
    print(f"""
MLflow page        {urls["mlflow"]}
Ray dashboard      {urls["ray"]}
sampling endpoint  {model_url}/sample
playground         {urls["serve"]}
OpenAPI page       {urls["serve"]}/docs
samples            {SAMPLES.absolute()}
stop it all        make down""")


def _sample(url: str) -> None:
    """Sample over HTTP with curl, or with Python where there is no curl."""
    SAMPLES.unlink(missing_ok=True)
    body = json.dumps(REQUEST)
    command = ["curl", "-sS", "-X", "POST", url, "-d", body, "-o", str(SAMPLES)]
    failure = f"{url} did not answer with an image"
    if shutil.which("curl"):
        _run(command, failure)
    else:
        _say(f"{shlex.join(command)}    # no curl here: the same request from Python")
        try:
            with urllib.request.urlopen(url, data=body.encode(), timeout=60) as response:  # noqa: S310
                SAMPLES.write_bytes(response.read())
        except urllib.error.HTTPError as error:
            SAMPLES.write_bytes(error.read())
        except OSError as error:
            raise DemoError(f"{failure}: {error}") from error
    answer = SAMPLES.read_bytes()
    if not answer.startswith(PNG_SIGNATURE):
        SAMPLES.unlink()
        raise DemoError(f"{failure} but with: {answer[:2000].decode(errors='replace')}")


def _wait_for(url: str, limit_s: float = 60.0) -> None:
    """Return when the model answers: the operator makes an endpoint of a registered champion."""
    begin = time.monotonic()
    print(f"\nwaiting for {url} ", end="", flush=True)
    while not local.answers(url):
        if time.monotonic() - begin > limit_s:
            print()
            log = local.home_dir() / "logs"
            raise DemoError(f"{url} does not answer after {limit_s:.0f} s; see {log} and the Ray dashboard")
        print(".", end="", flush=True)
        time.sleep(1)
    print(f" answers after {time.monotonic() - begin:.0f} s", flush=True)


def _run(command: list[str], failure: str) -> None:
    _say(shlex.join(command))
    if subprocess.run(command, check=False).returncode != 0:  # noqa: S603
        raise DemoError(failure)


def _say(command: str) -> None:
    print(f"\n$ {command}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
