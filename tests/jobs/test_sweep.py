"""Sweeps: which runs a command line makes, what becomes of them, and how they are summed up.

The drivers are small programs here; tests/jobs/test_sweep_on_cluster.py has real ones.
"""

import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from textwrap import dedent

import pytest
import ray

from jobs import sweep as module
from jobs.options import parse
from jobs.sweep import Outcome, Run, expand, room, sweep, table
from jobs.train import main

ROOT = Path(__file__).parents[2]


def named(*labels: str) -> list[Run]:
    """Runs of a sweep `x`, from labels such as `vae-0`."""
    parts = [(label, *label.split("-")) for label in labels]
    return [
        Run(family, seed, f"x-{label}", (family, "--seed", seed, "--name", f"x-{label}"))
        for label, family, seed in parts
    ]


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["vae", "gan", "--name", "x"], ["x-vae-0", "x-gan-0"]),
        (["vae", "--seed", "3", "1", "--name=x"], ["x-vae-3", "x-vae-1"]),
        (["vae", "--seed=3", "--seed=1", "--name=x"], ["x-vae-3", "x-vae-1"]),
        (["--seed", "0", "1", "vae", "gan", "--name", "x"], ["x-vae-0", "x-gan-0", "x-vae-1", "x-gan-1"]),
        (["gan", "--gpu", "vae", "gan", "--seed", "5", "5", "--name", "x"], ["x-gan-5", "x-vae-5"]),
        (["flow", "gan", "--name", "vae"], ["vae-flow-0", "vae-gan-0"]),
    ],
)
def test_every_family_has_every_seed_and_each_its_first_one_early(
    arguments: list[str], names: list[str]
) -> None:
    assert [run.name for run in expand(arguments)] == names


@pytest.mark.parametrize(
    "line", ["vae", "vae --seed 3", "vae --name gan", "vae vae", "--help", "vea --seed 1 2"]
)
def test_one_run_is_no_sweep(line: str) -> None:
    assert expand(line.split()) == []


def test_the_runs_differ_in_family_seed_and_name_alone() -> None:
    common = ["--data", "digits", "--workers", "2", "--budget", "60s", "--optimization.betas", "0.8", "0.9"]
    for run in expand(["vae", *common[:4], "gan", *common[4:], "--seed", "0", "1", "--name", "x"]):
        options, alone = parse(run.arguments), parse([run.family, *common])
        assert (options.family, options.seed, options.name) == (run.family, int(run.seed), run.name)
        assert asdict(options) | {"seed": 0, "name": ""} == asdict(alone)


def test_a_sweep_without_a_name_is_given_one_that_no_other_has() -> None:
    first, second = (expand(["vae", "gan"]) for _ in range(2))
    assert len({run.name for run in first + second}) == 4
    assert first[0].name.removesuffix("vae-0") == first[1].name.removesuffix("gan-0")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["vae", "gan", "--budget", "60"], "--budget '60': write a time as 60s, 10min or 2h"),
        (["vae", "gan", "--data", "digit"], "unknown dataset --data digit"),
        (["vae", "gan", "--name", "a/b"], "--name 'a/b-vae-0': use letters"),
    ],
)
def test_bad_options_are_refused_before_anything_starts(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    said, complained = capsys.readouterr()
    assert said == ""
    assert complained.startswith(f"jobs.train: {told}")
    assert complained.count("\n") == 1


@pytest.mark.parametrize(
    "arguments", [["vae", "--seed", "0", "x"], ["vae", "gna", "--seed", "0", "1"], ["vae", "gan", "--seed"]]
)
def test_what_is_no_seed_or_no_family_is_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2


@pytest.mark.parametrize(
    ("each", "workers", "runs"),
    [
        ({"CPU": 1}, 1, 11),
        ({"CPU": 1}, 2, 5),
        ({"CPU": 2}, 1, 5),  # 4 on the first node, 1 on the second, none on the third
        ({"CPU": 2, "GPU": 1}, 1, 2),  # 2, 0, 0
        ({"CPU": 1, "GPU": 1}, 4, 1),  # too large for the cluster of today: Ray's queue has it
    ],
)
def test_room_is_what_whole_workers_find_on_the_nodes(
    each: dict[str, int], workers: int, runs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = [{"CPU": 8.0, "GPU": 2.0}, {"CPU": 2.0}, {"CPU": 1.0}]
    nodes = [{"Alive": True, "Resources": resources} for resources in cluster]
    dead = {"Alive": False, "Resources": {"CPU": 64.0}}
    monkeypatch.setattr(ray, "nodes", lambda: [*nodes, dead])
    assert room(each, workers) == runs


DRIVER = """
import os, signal, sys, time
from pathlib import Path

family, _, seed, _, name = sys.argv[1:]
here = Path(__file__).parent
REGISTERED = f"jobs.train: digits-{family} version {int(seed) + 1} (champion stays 9; --promote moves it)  "

def log(what):
    with (here / "log").open("a") as file:
        file.write(f"{what} {name}\\n")

def wait_for(condition):
    while not condition():
        time.sleep(0.01)
"""


@pytest.fixture
def drive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make drivers of a program, which a test writes to the file of this fixture."""
    program = tmp_path / "driver.py"
    monkeypatch.setattr(module, "_DRIVER", (sys.executable, str(program)))
    return program


def write(program: Path, body: str) -> None:
    program.write_text(DRIVER + dedent(body))


def rows(printed: str) -> dict[str, str]:
    """The rows of the table by their first word."""
    lines = printed.partition("\nrun ")[2].partition("\n\n")[0].splitlines()
    return {line.split()[0]: line for line in lines[1:]}


def test_one_that_fails_is_told_with_its_reason_and_the_others_go_on(
    drive: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(
        drive,
        """
        print("step 1")
        if seed == "0":
            print(REGISTERED + "validation/bits_per_dim 1.9982  test/bits_per_dim_exact 2.0138")
            print("  http://127.0.0.1/versions/1")
        elif seed == "1":
            print("jobs.train: training diverged; lower something", file=sys.stderr)
            print("\\x1b[33m(raylet)\\x1b[0m too many workers", file=sys.stderr)
            print("[2026-11-24 23:32:46,582 E 3 3] core_worker.cc:1: bye", file=sys.stderr)
            sys.exit(1)
        elif seed == "2":
            raise ValueError("what nobody foresaw\\n[at length]\\n(see there)")
        elif seed == "3":
            os.kill(os.getpid(), signal.SIGKILL)
        elif seed == "4":
            print(REGISTERED)
        elif seed == "5":
            sys.exit(0)  # and no model
        """,
    )
    runs = named(*(f"vae-{seed}" for seed in range(6)))
    assert sweep(runs, lambda: 2) == 1
    said, complained = capsys.readouterr()
    shown = rows(said)
    assert shown["vae-0"].split()[:5] == ["vae-0", "digits-vae", "1", "1.9982", "2.0138"]
    assert shown["vae-1"].endswith("  training diverged; lower something")
    assert shown["vae-2"].endswith("  ValueError: what nobody foresaw")
    assert shown["vae-3"].endswith("  ended by SIGKILL")
    assert shown["vae-4"].split()[:5] == ["vae-4", "digits-vae", "5", "-", "-"]
    assert shown["vae-5"].endswith("  exit code 0, and no model")
    for seed in range(6):
        assert f"vae-{seed} | step 1\n" in said  # also of the one that was killed
    assert "vae-1 | jobs.train: training diverged; lower something\n" in complained
    assert "sweep x: 2 of 6 runs succeeded\n  the same command with --name x goes on with the rest" in said


def test_when_all_succeed_so_does_the_sweep(drive: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(drive, "print(REGISTERED)")
    assert sweep(named("vae-0", "autoregressive-0"), lambda: 1) == 0
    said = capsys.readouterr().out
    assert "sweep x: 2 of 2 runs succeeded\n" in said
    assert "vae-0            | jobs.train: digits-vae version 1" in said  # output stands in line
    assert "autoregressive-0 | jobs.train: digits-autoregressive version 1" in said


def test_as_many_run_at_once_as_there_is_room_for(drive: Path) -> None:
    """Each driver waits until as many as there is room for have started: fewer at once would never end."""
    write(
        drive,
        """
        log("start")
        starts = lambda: (here / "log").read_text().count("start")
        wait_for(lambda: starts() >= 3 or name in ("x-vae-3", "x-vae-4"))
        log("end")
        print(REGISTERED)
        """,
    )
    assert sweep(named(*(f"vae-{seed}" for seed in range(5))), lambda: 3) == 0
    going = most = 0
    for line in (drive.parent / "log").read_text().splitlines():
        going += 1 if line.startswith("start") else -1
        most = max(most, going)
    assert (going, most) == (0, 3)


def test_a_cluster_that_grows_is_used(drive: Path) -> None:
    """The second and third wait for each other, which takes the room that came while the first ran."""
    write(
        drive,
        """
        log("start")
        wait_for(lambda: seed == "0" or (here / "log").read_text().count("start") == 3)
        print(REGISTERED)
        """,
    )
    log = drive.parent / "log"
    assert sweep(named("vae-0", "vae-1", "vae-2"), lambda: 2 if log.exists() else 1) == 0


STOPPED = """
import sys
from jobs import sweep
sweep._DRIVER = (sys.executable, sys.argv[1])
sweep._GRACE_S = 0.2
sys.exit(sweep.sweep(sweep.expand(["vae", "gan", "flow", "--name", "x"]), lambda: 2))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_and_waited_for(number: signal.Signals, drive: Path) -> None:
    """The drivers take longer to end than the grace: the table comes at once, and again at the end."""
    write(
        drive,
        """
        def stop(number, frame):
            log(signal.Signals(number).name)
            wait_for(lambda: (here / "table").exists())
            log("ended")
            sys.exit(0)  # as a driver does that Ray Train has stopped
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)
        log("start")
        print("ready", flush=True)
        wait_for(lambda: False)
        """,
    )
    command = [sys.executable, "-c", STOPPED, str(drive)]
    going = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert going.stdout
    lines: list[str] = []
    while sum("ready" in line for line in lines) < 2:
        lines.append(going.stdout.readline())
    going.send_signal(number)
    while not any(line.startswith("vae-0 ") and "has not ended" in line for line in lines):
        lines.append(going.stdout.readline())
    (drive.parent / "table").touch()
    shown = rows(going.stdout.read())
    assert going.wait() == 128 + number
    assert shown["flow-0"].endswith("  not started")
    assert shown["vae-0"].endswith(f"  stopped by {number.name}")
    assert shown["gan-0"].endswith(f"  stopped by {number.name}")
    logged = (drive.parent / "log").read_text().split()
    assert logged.count(number.name) == logged.count("ended") == 2


def test_the_table_stands_in_columns_by_family_and_seed_with_means_of_what_succeeded() -> None:
    vae, gan, flow = (
        {run: Outcome() for run in named(*(f"{family}-{seed}" for seed in (10, 2, 0)))}
        for family in ("vae", "gan", "flow")
    )
    for run, bits in zip(vae, (1.9, 2.0, 2.1), strict=True):  # deviation 0.1
        scores = {"validation/bits_per_dim": bits, "test/bits_per_dim_lower_bound": 2 * bits}
        vae[run] = Outcome("", 30.0, "digits-vae 3", scores)
    gan[named("gan-2")[0]] = Outcome("", 8.0, "digits-gan 12")
    gan[named("gan-10")[0]] = Outcome("", 10.0, "digits-gan 13")  # deviation of 8 and 10: the root of 2
    flow[named("flow-0")[0]] = Outcome("out of memory", 1234.5, "failed")
    expected = """
    run      version        validation/bits_per_dim                test bits/dim  seconds
    flow-0   failed                               -                            -     1234  out of memory
    flow-2   -                                    -                            -        0  not started
    flow-10  -                                    -                            -        0  not started
    gan-0    -                                    -                            -        0  not started
    gan-2    digits-gan 12                        -                            -        8
    gan-10   digits-gan 13                        -                            -       10
    gan      mean of 2                            -                            -    9 ± 1
    vae-0    digits-vae 3                    2.1000           4.2000 lower bound       30
    vae-2    digits-vae 3                    2.0000           4.0000 lower bound       30
    vae-10   digits-vae 3                    1.9000           3.8000 lower bound       30
    vae      mean of 3              2.0000 ± 0.1000  4.0000 ± 0.2000 lower bound   30 ± 0
    """
    assert table(vae | gan | flow) == dedent(expected).strip()
