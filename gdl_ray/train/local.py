"""Training without a cluster: checkpoints in a local folder, a line per report."""

import json
import math
import shutil
from pathlib import Path

from gdl_ray.train.checkpoint import DamagedCheckpointError, verify
from gdl_ray.train.loop import Report
from gdl_ray.train.validation import SCORE

_SHOWN = ("loss", "bits_per_dim")


class LocalRun:
    """Reporter that keeps the last and the best checkpoint of a run in a folder, and prints its progress.

    A folder that holds a run already is gone on with: pass `last` to the loop as what to resume from.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.last: Path | None = None
        self.best: Path | None = None
        """By validation; the last one where there is none."""
        self._score = math.inf
        for path in sorted(folder.glob("step-*")):
            self._recall(path)

    def __call__(self, report: Report) -> None:
        """Take a report of the loop."""
        print(progress_line(report), flush=True)
        if report.snapshot:
            before = {self.last, self.best}
            self.last = self.folder / f"step-{report.step:08d}"
            report.snapshot.write(self.last)
            report.snapshot.release()
            if (score := report.metrics.get(SCORE, -math.inf)) <= self._score:
                self._score, self.best = score, self.last
            for path in before - {self.last, self.best}:
                if path:
                    shutil.rmtree(path)

    def _recall(self, path: Path) -> None:
        """Take up a checkpoint of an earlier process; one that it did not finish is deleted."""
        try:
            verify(path)
        except DamagedCheckpointError:
            shutil.rmtree(path)
            return
        counters = json.loads((path / "resume" / "counters.json").read_text())
        self.last = path
        if counters["stale"] == 0:
            self.best, self._score = path, -math.inf if counters["best"] is None else counters["best"]


def progress_line(report: Report) -> str:
    """Say in one line how far training is, how fast, and how well it does."""
    values = report.metrics
    if not values:
        return f"step {report.step:>6}  interrupted"
    shown = [f"{name} {value:.4g}" for name, value in values.items() if name.endswith(_SHOWN)]
    if "progress" not in values:  # a validation that came after the step
        return "  ".join([f"step {report.step:>6}", *shown])
    left_s = values["seconds"] * (1 / max(values["progress"], 1e-9) - 1)
    parts = [f"step {report.step:>6}", f"{min(values['progress'], 1):4.0%}", *shown]
    parts += [f"{values['examples_per_s']:,.0f} examples/s", f"{max(left_s, 0):.0f} s left"]
    return "  ".join(parts)
