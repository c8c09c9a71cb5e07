"""The same run twice: left alone, and with faults injected at random times; then every trace is compared.

    python tests/bench/soak.py [--faults 20] [--seed 0] [--families vae gan energy]

Two workers on nodes of their own, a head and an MLflow server, all on this machine. Ends with exit code 1
unless for every family weights, state of training and all that MLflow was told are the same, bit for bit.
"""

import argparse
import itertools
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.cluster import Cluster, Job, Result, eventually

REPORT_EVERY = 5
STEPS = {"vae": 4000, "gan": 1000, "energy": 600}  # half a minute of training or so
OTHER_STEPS = 600
PAUSE_S = (0.0, 4.0)  # between the first step after a fault and the next fault
AWAY_S = (2.0, 8.0)  # how long a server or the storage stays away


@dataclass
class Soak:
    """One run under faults."""

    cluster: Cluster
    family: str
    chance: random.Random
    name: str
    job: Job = field(init=False)

    def __post_init__(self) -> None:
        self.seen = len(self.cluster.groups())
        self.submit()

    @property
    def groups(self) -> list[list[int]]:
        """Reported steps, group of workers by group."""
        return self.cluster.groups()[self.seen :]

    @property
    def step(self) -> int:
        """The last step that was reported."""
        return max((step for group in self.groups[-1:] for step in group), default=0)

    @property
    def reports(self) -> int:
        """How many reports there were."""
        return sum(len(group) for group in self.groups)

    @property
    def run_folder(self) -> Path:
        """Where the run keeps its checkpoints."""
        return self.cluster.home / "runs" / self.name

    def submit(self) -> None:
        """Submit the job: the same command every time."""
        arguments = [self.family, "--name", self.name, "--workers", "2", "--size", "0.5", "--keep", "2"]
        arguments += ["--report-every", str(REPORT_EVERY), "--checkpoint-every", "25", "--patience", "1000"]
        arguments += ["--steps", str(STEPS.get(self.family, OTHER_STEPS)), "--max-failures", "10"]
        self.job = self.cluster.train(*arguments)

    def away_s(self) -> float:
        """Draw how long something stays away."""
        return self.chance.uniform(*AWAY_S)


# The faults.


def worker_killed(soak: Soak) -> None:
    """SIGKILL to one of the processes that train."""
    workers = soak.cluster.workers()
    if workers:
        soak.chance.choice(workers).kill()


def driver_killed(soak: Soak) -> None:
    """SIGKILL to the driver, and the same command again."""
    soak.job.kill()
    soak.submit()


def node_killed(soak: Soak) -> None:
    """SIGKILL to all processes of a node; another one comes."""
    soak.cluster.kill(soak.chance.choice(soak.cluster.nodes))
    soak.cluster.add_node()


def notice(soak: Soak) -> None:
    """Notice that a node will be taken away; another one comes, and then the first goes."""
    leaving = soak.chance.choice(soak.cluster.nodes)
    soak.cluster.drain(leaving, deadline_s=20)
    soak.cluster.add_node()
    time.sleep(15)
    soak.cluster.kill(leaving)


def mlflow_away(soak: Soak) -> None:
    """MLflow is killed, and started on its database after a while."""
    soak.cluster.kill("mlflow")
    time.sleep(soak.away_s())
    soak.cluster.start_mlflow()


def storage_away(soak: Soak) -> None:
    """The folder of the run cannot be read or written for a while; root is stopped by this too."""
    elsewhere = soak.run_folder.with_name("elsewhere")
    soak.run_folder.rename(elsewhere)
    soak.run_folder.touch()
    time.sleep(soak.away_s())
    soak.run_folder.unlink()
    elsewhere.rename(soak.run_folder)


def checkpoint_damaged(soak: Soak) -> None:
    """The driver is killed, and a bit of the last checkpoint flips before the same command comes again."""
    soak.job.kill()
    eventually(lambda: not soak.cluster.workers())
    last = max(soak.run_folder.glob("step-*"))
    file = soak.chance.choice(
        sorted(path for path in last.rglob("*") if path.is_file() and path.stat().st_size)
    )
    content = bytearray(file.read_bytes())
    content[soak.chance.randrange(len(content))] ^= 1 << soak.chance.randrange(8)
    file.write_bytes(content[: soak.chance.choice([len(content), len(content) // 2])])  # torn, perhaps
    soak.submit()


def power_cut(soak: Soak) -> None:
    """The driver, all nodes and MLflow are killed at once; then the same command on a new cluster."""
    soak.cluster.cut_power()
    soak.cluster.up(nodes=2)
    soak.submit()


FAULTS: list[Callable[[Soak], None]] = [
    power_cut,
    worker_killed,
    node_killed,
    mlflow_away,
    driver_killed,
    storage_away,
    notice,
    checkpoint_damaged,
]


NO_RESTART = (mlflow_away, storage_away)
"""Training goes on under these; all others need a new group of workers."""


@dataclass(frozen=True)
class Damage:
    """What one fault cost."""

    kind: str
    lost_s: float
    """From the fault to the next step that was reported; 0 if training went on."""
    repeated: int
    """Steps that were taken again."""


def inject(soak: Soak, fault: Callable[[Soak], None]) -> Damage | None:
    """Let something happen, and wait until training goes on; None if it came to its end before."""
    groups, begin = len(soak.groups), time.monotonic()
    step = soak.step
    fault(soak)
    if fault in NO_RESTART:
        damage = Damage(fault.__name__, 0.0, 0)
    else:
        eventually(lambda: len(soak.groups) > groups or not soak.job.is_running, 600)
        if len(soak.groups) == groups:
            return None
        before, after = soak.groups[groups - 1 : groups + 1]
        repeated = max(0, before[-1] + REPORT_EVERY - after[0])
        damage = Damage(fault.__name__, time.monotonic() - begin, repeated)
    took = f"{damage.lost_s:5.1f} s to the next report, {damage.repeated} steps repeated"
    print(f"  {soak.family:<8} step {step:>5}  {damage.kind:<20} {took}", flush=True)
    return damage


def disturb(
    cluster: Cluster, family: str, faults: int, seed: int
) -> tuple[float, list[Damage], list[list[int]]]:
    """Train under faults; returns the seconds, what they cost, and the steps of each group of workers."""
    begin = time.monotonic()
    soak = Soak(cluster, family, random.Random(f"{family} {seed}"), f"{family}-disturbed")
    kinds = [FAULTS[0], *soak.chance.sample(FAULTS[1:], len(FAULTS) - 1)]
    damages = []
    for fault in itertools.islice(itertools.cycle(kinds), faults):
        reports = soak.reports
        eventually(lambda: soak.reports > reports or not soak.job.is_running, 600)  # noqa: B023
        time.sleep(soak.chance.uniform(*PAUSE_S))
        if not soak.job.is_running:
            break
        if damage := inject(soak, fault):
            damages.append(damage)
    assert soak.job.wait(1800) == 0, soak.job.output
    return time.monotonic() - begin, damages, soak.groups


def leave_alone(cluster: Cluster, family: str) -> float:
    """Train undisturbed; returns the seconds."""
    begin = time.monotonic()
    soak = Soak(cluster, family, random.Random(0), f"{family}-undisturbed")
    assert soak.job.wait(1800) == 0, soak.job.output
    return time.monotonic() - begin


def differences(expected: Result, found: Result) -> list[str]:
    """Name all that is not as it was without faults."""
    wrong = []
    if found.model_sha256 != expected.model_sha256:
        wrong.append("model.safetensors differs")
    if found.training_sha256 != expected.training_sha256:
        wrong.append("resume/tensors.safetensors differs")
    if found.versions != 1:
        wrong.append(f"{found.versions} versions are registered")
    for name in sorted(expected.metrics.keys() | found.metrics.keys()):
        wanted, got = expected.metrics.get(name, []), found.metrics.get(name, [])
        twice = len(got) - len({step for step, _ in got})
        if twice:
            wrong.append(f"{name}: {twice} steps are logged twice")
        elif wanted != got:
            wrong.append(
                f"{name}: {len(set(wanted) ^ set(got))} of {len(wanted)} values differ or are missing"
            )
    return wrong


def soak(cluster: Cluster, family: str, faults: int, seed: int) -> bool:
    """Train a family both ways and print what came of it; returns whether both are the same."""
    print(f"{family}: left alone", flush=True)
    alone_s = leave_alone(cluster, family)
    expected = cluster.result(f"{family}-undisturbed")
    print(f"{family}: {alone_s:.0f} s; now with {faults} faults", flush=True)
    disturbed_s, damages, taken = disturb(cluster, family, faults, seed)
    wrong = differences(expected, cluster.result(f"{family}-disturbed"))
    verdict = "; ".join(wrong) or "all is the same"
    print(
        f"{family}: {alone_s:.0f} s alone, {disturbed_s:.0f} s with {len(damages)} faults; {verdict}",
        flush=True,
    )
    steps = [step for group in taken for step in group]
    repeated = (len(steps) - len(set(steps))) * REPORT_EVERY
    print(f"  {len(taken)} groups of workers; {repeated} steps of {STEPS.get(family, OTHER_STEPS)} repeated")
    for fault in FAULTS:
        lost_s = [each.lost_s for each in damages if each.kind == fault.__name__]
        if lost_s:
            mean_s = sum(lost_s) / len(lost_s)
            print(
                f"  {fault.__name__:<20} {len(lost_s)} times  {mean_s:5.1f} s mean, {max(lost_s):5.1f} s most"
            )
    return not wrong


def main() -> int:
    """Soak all families; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--faults", type=int, default=20, help="over all families")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--families", nargs="+", default=list(STEPS))
    given = parser.parse_args()
    shares = [given.faults * (at + 1) // len(given.families) - given.faults * at // len(given.families)
              for at in range(len(given.families))]  # fmt: skip
    same = []
    with tempfile.TemporaryDirectory(prefix="gdl-soak-") as home:
        cluster = Cluster(Path(home))
        try:
            cluster.up(nodes=2)
            for family, faults in zip(given.families, shares, strict=True):
                same.append(soak(cluster, family, faults, given.seed))
        finally:
            cluster.down()
    return 0 if all(same) else 1


if __name__ == "__main__":
    sys.exit(main())
