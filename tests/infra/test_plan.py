"""What the verbs tell people: jobs as written, tables that line up, nothing unknown passed off as known."""

import pytest

from infra.plan import Job, Node, NodePlan, Plan, Refused, Status, confirm


def test_a_job_is_read_as_its_bundles() -> None:
    job = Job.parse("workers=3,gpu=1,cpu=2")
    assert job.bundles == [{"CPU": 2, "GPU": 1}] * 3
    assert Job.parse("workers=2").bundles == [{"CPU": 1}] * 2
    assert Job.parse(str(job)) == job


@pytest.mark.parametrize(
    "text", ["", "workers", "workers=0", "workers=1.5", "gpus=1", "cpu=1,cpu=2", "cpu=-1"]
)
def test_what_is_no_job_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="workers"):
        Job.parse(text)


def test_a_plan_says_what_it_does_not_know() -> None:
    node = NodePlan(name="l4", type="g6.2xlarge", market="spot", max=4, zones=("a", "b"), usd_per_hour=None)
    lines = Plan(
        steps=[], nodes=[node], worst_usd_per_hour=None, image="ami-1", problems=["no quota"]
    ).lines()
    assert lines[0].index("market") == lines[1].index("spot")
    assert lines[1].split() == ["l4", "g6.2xlarge", "spot", "4", "?", "-", "a", "b"]
    assert "nothing to do: all is as the stack says" in lines
    assert lines[-1] == "refused: no quota"


def test_a_status_shows_what_costs_money_and_what_is_left_behind() -> None:
    node = Node(name="head", type="m7i.xlarge", zone="a", state="running", age_h=2.04, usd=0.4)
    lines = Status(
        nodes=[node], usd_so_far=0.4, expires_at="2026-01-01T00:00:00Z", orphans=["volume v1"]
    ).lines()
    assert lines[1].split() == ["head", "m7i.xlarge", "a", "running", "2.0", "0.40"]
    assert lines[-1] == "orphan  volume v1"
    assert Status(nodes=[], usd_so_far=0, expires_at="").lines() == ["no nodes"]


def test_who_has_agreed_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("builtins.input")
    confirm("Do it?", yes=True)


def test_where_nobody_is_there_it_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: False)
    with pytest.raises(Refused, match="--yes"):
        confirm("Do it?", yes=False)


@pytest.mark.parametrize(("answer", "agreed"), [("y", True), (" YES ", True), ("", False), ("no", False)])
def test_only_yes_is_a_yes(answer: str, agreed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda question: answer)
    if agreed:
        confirm("Do it?", yes=False)
    else:
        with pytest.raises(Refused, match="nothing was done"):
            confirm("Do it?", yes=False)
