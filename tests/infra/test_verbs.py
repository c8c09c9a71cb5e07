"""The command line: what each verb asks of a cloud, what it prints, and its exit code."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra import verbs
from infra.__main__ import main
from infra.local import PROJECT
from infra.plan import Job, Node, Plan, Refused, Status
from infra.stack import Stack

EXAMPLE = str(PROJECT / "infra" / "stack.example.yaml")
CLUSTER = PROJECT / "infra" / "examples" / "aws.yaml"


class FakeCloud:
    """A cloud that writes down what it is asked, and answers what the test says."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.problems: list[str] = []
        self.left: list[str] = []
        self.refusal = ""

    def plan(self, stack: Stack, job: Job | None = None) -> Plan:
        self.asked.append(("plan", stack.stack, job))
        return Plan(
            steps=["make it"], nodes=[], worst_usd_per_hour=3.5, image="ami-1", problems=self.problems
        )

    def up(self, stack: Stack, *, yes: bool, foundation_only: bool = False, restart: bool = False) -> None:
        print("ray says many things")
        subprocess.run(["echo", "so does what it runs"], check=True)
        self.asked.append(("up", stack.stack, yes, foundation_only, restart))
        if self.refusal:
            raise Refused(self.refusal)

    def status(self, stack: Stack) -> Status:
        node = Node(name="head", type="m7i.xlarge", zone="a", state="running", age_h=1, usd=0.2)
        return Status(nodes=[node], usd_so_far=0.2, expires_at="2030-01-01T00:00:00Z", orphans=self.left)

    def tunnel(self, stack: Stack) -> int:
        self.asked.append(("tunnel", stack.stack))
        return 0

    def down(self, stack: Stack, *, yes: bool, delete_data: bool = False) -> list[str]:
        self.asked.append(("down", stack.stack, yes, delete_data))
        return self.left

    def gc(self, *, regions: tuple[str, ...], expired: bool, yes: bool, project: str = "") -> list[str]:
        self.asked.append(("gc", regions, expired, yes))
        return self.left


@pytest.fixture
def cloud(monkeypatch: pytest.MonkeyPatch) -> FakeCloud:
    fake = FakeCloud()
    monkeypatch.setattr(verbs, "cloud_of", lambda _: fake)
    return fake


ASKED: list[tuple[str, tuple[Any, ...]]] = [
    ("plan --job workers=2,gpu=1", ("plan", "demo", Job(workers=2, gpu=1))),
    ("up", ("up", "demo", False, False, False)),
    ("up -y --foundation-only", ("up", "demo", True, True, False)),
    ("up --yes --restart", ("up", "demo", True, False, True)),
    ("tunnel", ("tunnel", "demo")),
    ("down -y --delete-data", ("down", "demo", True, True)),
    ("gc --regions us-west-2 eu-west-1 -y", ("gc", ("us-west-2", "eu-west-1"), True, True)),
    ("gc --all", ("gc", (), False, False)),
]


@pytest.mark.parametrize(("line", "call"), ASKED)
def test_a_verb_asks_the_cloud_of_the_stack(line: str, call: tuple[Any, ...], cloud: FakeCloud) -> None:
    assert main([*line.split(), "-f", EXAMPLE]) == 0
    assert cloud.asked == [call]


def test_what_a_plan_refuses_is_exit_code_3(cloud: FakeCloud, capsys: pytest.CaptureFixture[str]) -> None:
    cloud.problems = ["the quota is 0"]
    assert main(["plan", "-f", EXAMPLE]) == 3
    assert "refused: the quota is 0" in capsys.readouterr().out


def test_what_the_cloud_refuses_is_one_line_and_exit_code_3(
    cloud: FakeCloud, capfd: pytest.CaptureFixture[str]
) -> None:
    cloud.refusal = "no room in us-west-2: choose another region"
    assert main(["up", "-f", EXAMPLE, "-y"]) == 3
    assert capfd.readouterr().err == "error: no room in us-west-2: choose another region\n"


@pytest.mark.parametrize("verb", ["down", "gc", "status"])
def test_what_is_left_behind_is_named_and_exit_code_4(
    verb: str, cloud: FakeCloud, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([verb, "-f", EXAMPLE]) == 0
    cloud.left = ["volume vol-1"]
    assert main([verb, "-f", EXAMPLE]) == 4
    assert "volume vol-1" in capsys.readouterr().out


@pytest.mark.parametrize(("options", "stays"), [([], True), (["--delete-data"], False)])
def test_down_says_whether_the_data_stay(
    options: list[str], stays: bool, cloud: FakeCloud, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["down", "-f", EXAMPLE, "-y", *options]) == 0
    assert ("the bucket with its data stays (--delete-data" in capsys.readouterr().out) == stays


def test_ctrl_c_names_the_stack_that_was_begun(
    cloud: FakeCloud, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`down` alone would end the platform on this machine, which was not meant."""

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cloud, "up", interrupt)
    assert main(["up", "-f", EXAMPLE, "-y"]) == 130
    said = capsys.readouterr().err
    assert f"`python -m infra up -f {EXAMPLE}` goes on" in said
    assert f"`down -f {EXAMPLE}`" in said
    monkeypatch.setattr(cloud, "tunnel", interrupt)
    assert main(["tunnel", "-f", EXAMPLE]) == 0  # which is how it ends


def test_json_is_all_there_is_on_the_standard_output(
    cloud: FakeCloud, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["up", "-f", EXAMPLE, "-y", "--json"]) == 0
    said = capfd.readouterr()
    assert json.loads(said.out) == {"up": "demo"}
    assert said.err == "ray says many things\nso does what it runs\n"
    assert main(["plan", "-f", EXAMPLE, "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["worst_usd_per_hour"] == 3.5
    cloud.refusal = "no"
    assert main(["up", "-f", EXAMPLE, "--json"]) == 3
    assert json.loads(capfd.readouterr().out) == {"error": "no"}


def test_a_stack_file_with_an_error_is_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "stack.yaml"
    file.write_text("{stack: A, clud: aws}")
    assert main(["plan", "-f", str(file)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert all(line.startswith(f"error: {file}: ") for line in lines)


USAGE = [
    ("plan --job workers=x -f x", "write a job as workers=4,gpu=1,cpu=3"),
    ("tunnel", "tunnel is for a cluster in a cloud: name its stack file by -f"),
    ("render", "render is for a cluster in a cloud"),
    ("render -f LOCAL", "render is for a cluster in a cloud, and LOCAL says cloud: local"),
    ("down --delete-data", "--delete-data is for a cluster in a cloud"),
    ("up --restart", "--restart is for a cluster in a cloud"),
    ("plan --job workers=2", "--job is for a cluster in a cloud"),
    ("fly", "invalid choice: 'fly'"),
]


@pytest.mark.parametrize(("line", "message"), USAGE)
def test_what_cannot_be_asked_is_exit_code_2(
    line: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "local.yaml"
    file.write_text("{stack: here, cloud: local}")
    with pytest.raises(SystemExit) as ended:
        main(line.replace("LOCAL", str(file)).split())
    assert ended.value.code == 2
    assert message.replace("LOCAL", str(file)) in capsys.readouterr().err


def test_render_shows_an_ordinary_file_without_any_cloud(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["render", "-f", EXAMPLE]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["cluster_name"] == "gdl-ray-demo"
    assert main(["render", "-f", EXAMPLE, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == shown


def test_validate_finds_what_was_changed_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "-f", EXAMPLE]) == 0
    assert main(["validate", str(CLUSTER)]) == 0
    file = tmp_path / "cluster.yaml"
    file.write_text(CLUSTER.read_text().replace("cache_stopped_nodes", "cache_stoped_nodes"))
    capsys.readouterr()
    assert main(["validate", str(file)]) == 2
    assert "did you mean cache_stopped_nodes?" in capsys.readouterr().out
    assert main(["validate", str(tmp_path / "none.yaml"), "--json"]) == 2
    assert "No such file" in json.loads(capsys.readouterr().out)["error"]


def test_the_local_platform_plans_and_answers_in_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GDL_RAY_HOME", str(tmp_path))
    assert main(["plan"]) == 0
    assert capsys.readouterr().out == "start ray\nstart mlflow\nstart serve\n"
    assert main(["status", "--json"]) == 1
    assert [service["name"] for service in json.loads(capsys.readouterr().out)] == ["ray", "mlflow", "serve"]
    assert main(["down", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"ended": {}, "leftovers": []}


def test_the_local_commands_start_without_the_clouds() -> None:
    """Their libraries take seconds to import."""
    code = "import sys, infra.__main__; print(sorted({'boto3', 'ray', 'pyarrow'} & sys.modules.keys()))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
