"""Rows about speed: other servers, other ways of batching, and what sharing costs."""

import math
import re
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from tests.bench.serving import batched
from tests.bench.serving.load import Load, Target, closed_loop, open_loop
from tests.bench.serving.peers import free_port, peers
from tests.bench.serving.stage import ROOT, Bar, Stage

CONNECTIONS = 32
SEED = 7
BODY = {"n": 4, "seed": SEED, "format": "npy"}
ROUNDS = 5
UTILISATION = 0.7


def against_peers(stage: Stage) -> list[Bar]:
    """n=4, 32 connections, the vae, two workers each: `mlflow models serve`, BentoML, LitServe."""
    name, version = stage.model("vae")
    with stage.copies({"two": [(name, version)]}, {"serve.replicas": "2"}), ExitStack() as running:
        bodies: dict[Target, Mapping[str, Any]] = {stage.target("two"): BODY}
        for peer in peers(name, version, SEED):
            bodies[running.enter_context(peer.running(free_port()))] = peer.body
        rounds = _closed_rounds(stage, bodies)
    _show(rounds)
    ours, mlflow, *others = (_median(each) for each in rounds.values())
    best = max(others, default=math.inf)  # without any of them, nothing is shown
    return [
        at_least("requests/s over those of MLflow", ours / mlflow, 5),
        at_least("requests/s over the best of BentoML and LitServe", ours / best, 1.5),
    ]


def continuous_batching(stage: Stage) -> list[Bar]:
    """n=4, the diffusion, at 70 % of the lower capacity: against batches of whole requests (@serve.batch)."""
    name, version = stage.model("diffusion")
    stage.submit("tests.bench.serving.batched", name, str(version))
    whole = Target("whole requests", f"{stage.platform.urls['serve']}/{batched.APPLICATION}/sample")
    ours = stage.target(name)
    closed = _closed_rounds(stage, {ours: BODY, whole: BODY})
    capacity = {target: _median(loads) for target, loads in closed.items()}
    per_s = UTILISATION * min(capacity.values())
    rounds: dict[Target, list[Load]] = {ours: [], whole: []}
    for number in range(ROUNDS):
        for target, loads in rounds.items():
            loads.append(open_loop(target, BODY, per_s, stage.seconds(10), seed=number))
    print(f"  capacity: {', '.join(f'{target.name} {each:.1f}/s' for target, each in capacity.items())}")
    print(f"  open loop at {per_s:.1f}/s:")
    _show(rounds)
    p50 = {target: _median_ms(loads, 50) for target, loads in rounds.items()}
    return [
        at_least("p50 of whole requests over ours", p50[whole] / p50[ours], 2),
        at_least("capacity over that of whole requests", capacity[ours] / capacity[whole], 1),
    ]


def kv_cache(stage: Stage) -> list[Bar]:
    """Pixel by pixel with the keys and values of the past kept, against computing them anew."""
    command = [sys.executable, "tests/bench/engine.py", "cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    print(*(f"  {line}" for line in done.stdout.splitlines()), sep="\n", flush=True)
    (times,) = re.findall(r"([\d.]+) times as fast", done.stdout)
    return [at_least("times as fast", float(times), 20)]


def shared_pool(stage: Stage) -> list[Bar]:
    """24 models in the pool, and one of them once more in replicas of its own."""
    models = [stage.model(family) for family in ("vae", "diffusion", "autoregressive")]
    pooled = {f"pooled-{number:02}": [models[number % len(models)]] for number in range(24)}
    with stage.copies(pooled), stage.copies({"apart": [models[0]]}, {"serve.replicas": "1:1"}):
        answers = [closed_loop(stage.target(name), BODY, 1, 0.01).statuses[200] > 0 for name in pooled]
        rounds: dict[Target, list[Load]] = {stage.target("pooled-00"): [], stage.target("apart"): []}
        for _ in range(stage.times(10)):
            for target, loads in rounds.items():
                loads.append(closed_loop(target, BODY, 1, stage.seconds(3)))
    _show(rounds)
    warm, apart = (_median_ms(loads, 50) for loads in rounds.values())
    return [
        at_least("models of 24 that answer", sum(answers), 24),
        at_most("p50 of a warm one over that of the one apart", warm / apart, 2),
    ]


def at_least(claim: str, measured: float, bar: float) -> Bar:
    """Claim that a figure is so large or larger."""
    return Bar(claim, f"{measured:.2f} (at least {bar:g})", measured >= bar)


def at_most(claim: str, measured: float, bar: float) -> Bar:
    """Claim that a figure is so small or smaller."""
    return Bar(claim, f"{measured:.2f} (at most {bar:g})", measured <= bar)


def _closed_rounds(stage: Stage, bodies: Mapping[Target, Mapping[str, Any]]) -> dict[Target, list[Load]]:
    """Find what servers can do, in turns."""
    for target, body in bodies.items():
        closed_loop(target, body, CONNECTIONS, 1.0)  # warm-up
    rounds: dict[Target, list[Load]] = {target: [] for target in bodies}
    for _ in range(ROUNDS):
        for target, loads in rounds.items():
            loads.append(closed_loop(target, bodies[target], CONNECTIONS, stage.seconds(5)))
    return rounds


def _show(rounds: Mapping[Target, Sequence[Load]]) -> None:
    """Print the medians over rounds."""
    print(f"  {'server':<20}{'requests/s':>12}{'p50 ms':>10}{'p99 ms':>10}{'failed':>8}")
    for target, loads in rounds.items():
        failed = sum(len(load.answers) - load.statuses[200] for load in loads)
        p50, p99 = _median_ms(loads, 50), _median_ms(loads, 99)
        print(f"  {target.name:<20}{_median(loads):>12.1f}{p50:>10.1f}{p99:>10.1f}{failed:>8}", flush=True)


def _median(loads: Sequence[Load]) -> float:
    """Give the median over rounds of the good answers a second."""
    return statistics.median(load.per_s for load in loads)


def _median_ms(loads: Sequence[Load], percent: int) -> float:
    """Give the median over rounds of a percentile of the latencies."""
    return statistics.median(load.percentile_ms(percent) for load in loads)
