"""Training without a cluster: checkpoints in a local folder, a line per report."""

import math
import shutil
from pathlib import Path

from gdl_ray.train.loop import SCORE, Report


class LocalRun:
    """Reporter that keeps the last and the best checkpoint of a run, and prints its progress."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.last: Path | None = None
        self.best: Path | None = None
        """By validation; the last one where there is none."""
        self._score = math.inf

    def __call__(self, report: Report) -> None:
        """Take a report of the loop."""
        print(progress_line(report), flush=True)
        if report.write:
            before = {self.last, self.best}
            self.last = self.folder / f"step-{report.step:08d}"
            report.write(self.last)
            if (score := report.metrics.get(SCORE, -math.inf)) <= self._score:
                self._score, self.best = score, self.last
            for path in before - {self.last, self.best}:
                if path:
                    shutil.rmtree(path)


def progress_line(report: Report) -> str:
    """Say in one line how far training is, how fast, and how well it does."""
    values = report.metrics
    left_s = values["seconds"] * (1 / max(values["progress"], 1e-9) - 1)
    parts = [f"step {report.step:>6}", f"{min(values['progress'], 1):4.0%}"]
    parts += [f"{name} {value:.4g}" for name, value in values.items() if name.endswith(_SHOWN)]
    parts += [f"{values['examples_per_s']:,.0f} examples/s", f"{left_s:.0f} s left"]
    return "  ".join(parts)


_SHOWN = ("loss", "bits_per_dim")
