"""The service measured, in speed and in trouble: a row for each claim, and the bar that it must reach.

    python tests/bench/serve.py [ROW ...] [--quick]

Brings up a platform of its own, on free ports and in a folder of its own, trains the models that the rows
need for seconds, and ends it all. Rates and latencies that are compared are medians over rounds in which the
contestants take turns. All of it, the client too, shares the cores of this machine. `--peers` installs what
the rows compare with. Ends with exit code 1 unless every bar is reached.
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.bench.serving import faults, peers, speed
from tests.bench.serving.stage import Bar, Stage, stage

ROWS: dict[str, Callable[[Stage], list[Bar]]] = {
    "peers": speed.against_peers,
    "batching": speed.continuous_batching,
    "cache": speed.kv_cache,
    "overload": faults.overload,
    "killed": faults.killed_replica,
    "moved": faults.moved_alias,
    "requests": faults.every_request,
    "vanished": faults.vanished_clients,
    "shared": speed.shared_pool,
}


def main() -> int:
    """Measure the rows that are asked for, and print what came of each claim; 0 if all hold."""
    rows = "\n".join(f"  {key:<10}{row.__doc__}" for key, row in ROWS.items())
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=f"rows:\n{rows}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", metavar="ROW", help="what to measure; all of it if left out")
    parser.add_argument("--quick", action="store_true", help="show only that the rows work, not what is so")
    parser.add_argument("--peers", action="store_true", help="install what the rows compare with, and end")
    asked = parser.parse_args()
    if unknown := set(asked.rows) - ROWS.keys():
        parser.error(f"there is no row {', '.join(unknown)}; there are {', '.join(ROWS)}")
    if asked.peers:
        peers.install()
        return 0
    os.nice(15)  # as Ray's workers are: the client and the peers must not go before what is measured
    print(f"{os.cpu_count()} cores, shared by servers, models and this client", flush=True)
    with stage(asked.quick) as platform:
        bars = [bar for key in asked.rows or ROWS for bar in measure(platform, key)]
    return 0 if all(bar.holds for bar in bars) else 1


def measure(platform: Stage, key: str) -> list[Bar]:
    """Measure a row and print what came of it; a row that breaks is a bar that is missed."""
    print(f"\n{key}: {ROWS[key].__doc__}", flush=True)
    try:
        bars = ROWS[key](platform)
    except Exception as error:  # the other rows are still worth measuring
        bars = [Bar("the row can be measured", f"{type(error).__name__}: {error}", holds=False)]
    print(*bars, sep="\n", flush=True)
    return bars


if __name__ == "__main__":
    sys.exit(main())
