"""The curve of a run whose workers come and go, against one that always has one worker.

    python tests/bench/elastic.py

An elastic job begins on one node, takes a second one that joins, and loses the first, which gives notice.
Prints the steps that each group of workers reported, and the largest relative difference of the loss.
"""

import tempfile
from pathlib import Path
from threading import Event, Thread

from gdl_ray.data import load
from gdl_ray.families import build, preset
from gdl_ray.train.loop import Report, train
from gdl_ray.train.plan import Budget, Plan
from tests.cluster import Cluster, eventually

STEPS = 10**6  # more than it will take
ARGUMENTS = ["vae", "--size", "0.5", "--workers", "1:2", "--steps", str(STEPS), "--patience", "1000000"]
ARGUMENTS += ["--report-every", "5", "--checkpoint-every", "20", "--name", "elastic"]


def record_curve(data_root: Path, curve: dict[int, float], done: Event) -> None:
    """Train the same with one worker, until it is done, and note the loss at each report."""
    digits, chosen = load("digits", data_root), preset("vae", "digits", 0.5)
    plan = Plan(optimization=chosen.optimization, budget=Budget(steps=STEPS), report_every=5, patience=10**6)

    def note(report: Report) -> None:
        if report.metrics:
            curve[report.step] = report.metrics["train/loss"]
        if report.snapshot:
            report.snapshot.release()

    family = build("vae", chosen.model, digits.spec, plan.seed)
    train(family, digits, plan, note, interrupted=done.is_set)


def come_and_go(cluster: Cluster) -> None:
    """Let the nodes of an elastic job change, and kill it when its third group has reported for a while."""
    job = cluster.train(*ARGUMENTS)
    eventually(cluster.groups)
    cluster.add_node()
    eventually(lambda: len(cluster.workers()) == 2 and len(cluster.groups()) == 2)
    cluster.drain(cluster.nodes[0], deadline_s=30)
    eventually(lambda: len(cluster.groups()) == 3 and len(cluster.groups()[2]) > 20)
    job.kill()


def main() -> None:
    """Run both side by side, and compare."""
    curve: dict[int, float] = {}
    done = Event()
    with tempfile.TemporaryDirectory(prefix="gdl-elastic-") as home:
        cluster = Cluster(Path(home))
        beside = Thread(target=record_curve, args=(Path(home) / "data", curve, done))
        try:
            cluster.up(nodes=1)
            beside.start()
            come_and_go(cluster)
        finally:
            done.set()
            beside.join()
            groups = cluster.groups()
            found = cluster.result("elastic").metrics["train/loss"]
            cluster.down()
    pairs = [(loss, curve[step]) for step, loss in found if step in curve]
    worst = max(abs(loss - expected) / abs(expected) for loss, expected in pairs)
    print("; ".join(f"steps {group[0]} to {group[-1]}" for group in groups))
    print(f"largest relative difference of the loss over {len(pairs)} reports: {worst:.1e}")


if __name__ == "__main__":
    main()
