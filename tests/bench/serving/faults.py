"""Rows about what goes wrong: too much load, replicas that die, versions that change, clients that vanish."""

import asyncio
import io
import itertools
import re
import statistics
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import psutil
import torch
from numpy.typing import NDArray

from gdl_ray.client import Client
from gdl_ray.engine import request_keys
from gdl_ray.family import UNLABELLED
from tests.bench.serving.load import Answer, Target, ask_while, closed_loop, open_loop
from tests.bench.serving.peers import is_there, tool
from tests.bench.serving.speed import BODY, CONNECTIONS, at_least, at_most
from tests.bench.serving.stage import Bar, Stage, eventually, get

MIB = 2**20
Images = NDArray[Any]
CLIENTS = 8
SEEDS = 16
MOVES = 100
CASES = 10_000
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
VANISHING = 1000
AT_A_TIME = 50
CONFIG = """\
[dictionaries]
models = {{ values = {models} }}
[parameters]
name = {{ dictionary = "models", probability = 0.8 }}
"""
"""Most requests are about models that exist: all others end alike."""
NOTICE_S = 0.1
"""Seconds in which a server may notice that a client is gone."""
STAY_S = 0.05
"""Seconds after which a client that does not wait for its answer is gone."""


def overload(stage: Stage) -> list[Bar]:
    """The diffusion at five times its capacity: what is done, how the rest is refused, what memory does."""
    target = stage.target(stage.model("diffusion")[0])
    capacity_per_s = closed_loop(target, BODY, CONNECTIONS, stage.seconds(10)).per_s
    with watched(stage.replicas()) as rss_mib:
        begin_s = time.perf_counter()
        load = open_loop(target, BODY, 5 * capacity_per_s, stage.seconds(60))
    in_time = [each for each in load.answers if each.ended_s < begin_s + load.seconds]
    good_per_s = sum(each.status == 200 for each in in_time) / load.seconds
    print(f"  capacity {capacity_per_s:.1f}/s, asked {len(load.answers) / load.seconds:.1f}/s,", end=" ")
    print(f"statuses {dict(load.statuses)}, p50 of the good {load.percentile_ms(50):.0f} ms", flush=True)
    return [
        at_least("good answers a second over the capacity", good_per_s / capacity_per_s, 0.9),
        at_most("refusals other than 429 with Retry-After", sum(map(_is_unsound, load.answers)), 0),
        at_most("MiB that a replica grew by in the last two thirds", growth_mib(rss_mib), 16),
    ]


def _is_unsound(answer: Answer) -> bool:
    refused = answer.status == 429 and answer.header("retry-after") is not None
    return answer.status != 200 and not refused


def killed_replica(stage: Stage) -> list[Bar]:
    """One of the two replicas of a model is killed while clients ask."""
    seconds = stage.seconds(40)
    with stage.copies({"pair": [stage.model("vae")]}, {"serve.replicas": "2:2"}):
        eventually(lambda: len(stage.running("pair")) == 2, "two replicas of `pair` run")
        until_s = time.monotonic() + seconds
        with ThreadPoolExecutor(CLIENTS) as clients:
            url = stage.platform.urls["serve"]
            asked = [clients.submit(_ask_until, Client(url), until_s) for _ in range(CLIENTS)]
            time.sleep(seconds / 4)
            victim = min(stage.running("pair"))
            psutil.Process(victim).kill()
            back_s = eventually(lambda: len(stage.running("pair") - {victim}) == 2, "two replicas run again")
        outcomes = sum((each.result() for each in asked), Counter[str]())
    print(f"  {dict(outcomes)}")
    return [
        at_most("failed requests", outcomes.total() - outcomes["answered"], 0),
        at_most("seconds until two replicas answer again", back_s, 15),
    ]


def _ask_until(client: Client, until_s: float) -> Counter[str]:
    """Ask again and again; returns how often it went how."""
    outcomes: Counter[str] = Counter()
    while time.monotonic() < until_s:
        try:
            client.sample("pair", n=4, seed=7)
            outcomes["answered"] += 1
        except Exception as error:  # whatever a user would see
            outcomes[repr(error)] += 1
    return outcomes


def moved_alias(stage: Stage) -> list[Bar]:
    """The champion changes a hundred times under load; whose samples are they?"""
    versions = [stage.model("vae", seed) for seed in (0, 1)]
    expected = {str(i): _samples(stage, *version) for i, version in enumerate(versions, 1)}
    with stage.copies({"moving": versions}), ThreadPoolExecutor(1) as mover:
        moves = mover.submit(_move, stage, "moving", stage.times(MOVES))
        target, seeds = stage.target("moving"), itertools.cycle(range(SEEDS))
        requests = [target.request(BODY | {"seed": seed}) for seed in range(SEEDS)]
        load = ask_while(target, lambda: requests[next(seeds)], CLIENTS, lambda: not moves.done())
    good = [answer for answer in load.answers if answer.status == 200]
    wrong = sum(not _is_as_it_says(answer, expected) for answer in good)
    named = Counter(answer.header("x-version") for answer in good)
    print(f"  {load.per_s:.0f} requests/s, statuses {dict(load.statuses)}, versions {dict(named)};", end=" ")
    print(f"a move was followed after {statistics.median(moves.result()):.1f} s", flush=True)
    return [
        at_least("moves that were followed", len(moves.result()), stage.times(MOVES)),
        at_most("failed requests", len(load.answers) - len(good), 0),
        at_most("answers whose samples are not those of their version", wrong, 0),
    ]


def _move(stage: Stage, name: str, moves: int) -> list[float]:
    """Move the champion to and fro; returns after how many seconds each move was followed."""
    waits_s = []
    for move in range(moves):
        version = 2 - move % 2
        stage.promote(name, version)
        followed = partial(_answers_with, stage, name, version)
        waits_s.append(eventually(followed, f"{name} answers with version {version}"))
    return waits_s


def _answers_with(stage: Stage, name: str, version: int) -> bool:
    return bool(stage.card(name)["version"] == version)


def _is_as_it_says(answer: Answer, expected: Mapping[str, Sequence[Images]]) -> bool:
    """Compare samples with those of the version that an answer names, for the seed that it names."""
    version, seed = answer.header("x-version"), answer.header("x-seed")
    expected_samples = expected[str(version)][int(str(seed))]
    return np.array_equal(np.load(io.BytesIO(answer.body)), expected_samples)


def _samples(stage: Stage, name: str, version: int) -> list[Images]:
    """Draw what a version answers for each seed."""
    family = stage.weights(name, version)
    labels = torch.full((4,), UNLABELLED)
    with torch.no_grad():
        return [family.sample(request_keys(seed, 4), labels).numpy() for seed in range(SEEDS)]


def every_request(stage: Stage) -> list[Bar]:
    """Ten thousand requests made from the service's own description of itself, right ones and wrong ones."""
    if not is_there("schemathesis"):
        return [Bar("requests that were made", "none", holds=False)]
    known = [stage.model(family)[0] for family in ("vae", "diffusion", "autoregressive")]
    done = _schemathesis(f"{stage.platform.urls['serve']}/openapi.json", known, stage.times(CASES))
    print(*(f"  {line}" for line in done.stdout.splitlines()[-60:]), sep="\n", flush=True)
    made = re.search(r"(\d+) generated", done.stdout.replace(",", ""))
    sound = done.returncode == 0
    return [
        at_least("requests that were made", int(made[1]) if made else 0, stage.times(CASES)),
        Bar("no 5xx, and no undocumented status, type or shape", f"exit {done.returncode}", sound),
    ]


def _schemathesis(url: str, models: list[str], cases: int) -> "subprocess.CompletedProcess[str]":
    """Ask what a description allows and what it forbids, in so many cases or some more."""
    operations = sum("post" in path for path in get(url)["paths"].values())  # a get takes no body: few cases
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "schemathesis.toml"
        config.write_text(CONFIG.format(models=models))
        command = [tool("schemathesis"), "--config-file", str(config), "--no-color", "run", url]
        command += ["--phases", "examples,coverage,fuzzing", "--checks", CHECKS, "--seed", "7"]
        # Not all operations have so many different cases.
        command += ["--max-examples", str(2 * cases // operations), "--continue-on-failure", "--no-shrink"]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def vanished_clients(stage: Stage) -> list[Bar]:
    """A thousand clients ask for much and vanish; what do they leave behind?"""
    name = stage.model("diffusion")[0]
    target, held = stage.target(name), [*stage.replicas(), *stage.processes("haproxy")]
    asyncio.run(_vanish(target, VANISHING // 10))  # connections and memory that stay for the next
    eventually(lambda: _is_free(stage, name), "all slots are free")
    files, rss_mib = _files(held), _rss_mib(held)
    asyncio.run(_vanish(target, stage.times(VANISHING)))
    free_s = eventually(lambda: _is_free(stage, name), "all slots are free", pause_s=0.0)
    step_s = stage.card(name)["load"]["sample"]["step_s"]
    time.sleep(1)  # what is closed is closed by the event loops, each in its turn
    answers = closed_loop(target, BODY, 1, 1.0).statuses
    print(f"  a step takes {1000 * step_s:.0f} ms; afterwards: {dict(answers)}")
    return [
        at_most("seconds until all slots are free, less one to notice", free_s - NOTICE_S, step_s),
        at_most("sockets and files more than before", _files(held) - files, 16),
        at_most("MiB more than before", _rss_mib(held) - rss_mib, 32),
    ]


async def _vanish(target: Target, clients: int) -> None:
    """Let clients connect, ask and go away before the answer, some at a time."""
    request = target.request(BODY | {"n": 16, "steps": 1000})
    place, free = urlsplit(target.url), asyncio.Semaphore(AT_A_TIME)

    async def one() -> None:
        async with free:
            _, writer = await asyncio.open_connection(place.hostname, place.port)
            writer.write(request)
            await asyncio.sleep(STAY_S)
            writer.transport.abort()

    await asyncio.gather(*(one() for _ in range(clients)))


def _is_free(stage: Stage, name: str) -> bool:
    load = stage.card(name)["load"]["sample"]
    return bool(load["active"] + load["waiting"] == 0)


def _files(processes: Sequence[psutil.Process]) -> int:
    return sum(process.num_fds() for process in processes)


def _rss_mib(processes: Sequence[psutil.Process]) -> float:
    total_bytes: int = sum(process.memory_info().rss for process in processes)
    return total_bytes / MIB


@contextmanager
def watched(processes: Sequence[psutil.Process]) -> Iterator[list[list[float]]]:
    """Write down the memory of processes every half second, in MiB."""
    seen: list[list[float]] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.5):
            seen.append([process.memory_info().rss / MIB for process in processes])

    with ThreadPoolExecutor(1) as watcher:
        watching = watcher.submit(watch)
        try:
            yield seen
        finally:
            over.set()
    watching.result()


def growth_mib(seen: Sequence[Sequence[float]]) -> float:
    """Tell how much the process that grew most did, from the second third of the time to the last."""
    rss_mib, third = np.array(seen), len(seen) // 3
    early, late = np.median(rss_mib[third : 2 * third], axis=0), np.median(rss_mib[2 * third :], axis=0)
    return float((late - early).max())
