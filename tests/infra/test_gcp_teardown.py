"""What ends of a stack on Google Cloud, what stays, and what is found of stacks that nobody has ended."""

from datetime import UTC, datetime

import pytest

from infra import gcp
from infra.folder import folder_of
from infra.plan import Refused
from infra.stack import Head, Stack
from tests.infra.fake_gcloud import instance
from tests.infra.gcp_project import Project


def test_down_leaves_data_alone_and_says_what_is_left(
    project: Project, cluster: Stack, rays: list[tuple[str, ...]]
) -> None:
    gcp.up(cluster, yes=True)
    labels = {"gdl-ray-stack": "demo", "ray-node-type": "head"}
    mine = [instance("head", "us-central1-a", labels, "e2-standard-4")]
    mine += [
        instance("w", "us-central1-a", labels | {"ray-node-type": "worker"}, "g2-standard-8", "TERMINATED")
    ]
    other = instance("other", "us-central1-a", {"gdl-ray-stack": "other"}, "e2-standard-4")
    project.set(instances=[*mine, other])
    assert gcp.down(cluster, yes=True) == []
    assert rays[-1][0] == "down"
    assert project.state["instances"] == [other]
    assert list(project.state["things"]) == ["storage buckets gs://gdl-ray-my-project-demo"]
    assert [binding for binding in project.state["bindings"] if binding[0].startswith("projects")] == []
    assert gcp.down(cluster, yes=True) == []  # again, and nothing is wrong
    assert gcp.down(cluster, yes=True, delete_data=True) == []
    assert project.state["things"] == {}


def test_what_cannot_be_deleted_is_named(project: Project, machine: Stack) -> None:
    gcp.up(machine, yes=True, foundation_only=True)
    things = project.state["things"]
    project.set(complaints={"networks delete": "ERROR: network was not found"})  # it says so, and it is there
    assert gcp.down(machine, yes=True) == ["network gdl-ray-demo"]
    assert "compute networks gdl-ray-demo" in things


def test_what_may_not_be_deleted_is_named_and_the_rest_goes(project: Project, machine: Stack) -> None:
    gcp.up(machine, yes=True)
    folder = folder_of(machine)
    project.set(complaints={"firewall-rules delete": "ERROR: Required 'compute.firewalls.delete' permission"})
    left = gcp.down(machine, yes=True)
    rules = ["firewall rule gdl-ray-demo-inside", "firewall rule gdl-ray-demo-proxy"]
    assert [line.partition(":")[0] for line in left] == ["network gdl-ray-demo", *rules]
    assert "it is not allowed" in left[-1]
    assert folder.path.exists()  # what is left may need its key
    project.set(complaints={})
    assert gcp.down(machine, yes=True) == []
    assert not folder.path.exists()


def test_where_nothing_is_found_nothing_is_removed_here(project: Project, machine: Stack) -> None:
    folder = folder_of(machine)
    folder.make()
    assert gcp.down(machine, yes=False) == []
    assert folder.token.exists()


def left_behind(project: Project, name: str, region: str, expires: str) -> None:
    """Put what `up` makes for a stack into a project, with a head of a time, or without one."""
    gcp.up(
        Stack(stack=name, cloud="gcp", project="my-project", region=region, head=Head(type="e2-standard-4")),
        yes=True,
        foundation_only=True,
    )
    labels = {"gdl-ray-stack": name, "gdl-ray-expires-at": expires}
    if expires:
        node = instance(f"{name}-head", f"{region}-a", labels, "e2-standard-4")
        project.set(instances=[*project.state["instances"], node])


def test_gc_finds_what_is_past_its_time_in_any_stack(project: Project) -> None:
    project.set(zones=["us-central1-a", "europe-west4-a"])
    left_behind(project, "old", "us-central1", "2020-01-01t00_00_00z")
    left_behind(project, "far", "europe-west4", "2020-01-01t00_00_00z")
    left_behind(project, "new", "us-central1", "2090-01-01t00_00_00z")
    left_behind(project, "bare", "us-central1", "")
    before, kept = project.changes(), set(project.state["things"])
    found = gcp.gc(yes=False)
    assert {"old-head in us-central1-a, running", "far-head in europe-west4-a, running"} <= set(found)
    for name in ("old", "far", "bare"):
        assert f"network gdl-ray-{name}" in found
        assert f"account gdl-{name}-head@my-project.iam.gserviceaccount.com" in found
        assert f"right of gdl-{name}-head to launch nodes in my-project" in found
    assert not [line for line in found if "new" in line or line.startswith("bucket")]
    assert project.changes() == before
    assert gcp.gc(regions=("us-central1",), yes=True) == []
    assert [each["name"] for each in project.state["instances"]] == ["far-head", "new-head"]
    buckets = {f"storage buckets gs://gdl-ray-my-project-{name}" for name in ("old", "bare")}
    gone = {each for each in kept if "-old" in each or "-bare" in each} - buckets
    assert set(project.state["things"]) == kept - gone
    assert gcp.gc(yes=True) == []
    assert gcp.gc(yes=True, expired=False) == []
    assert {each.partition(" gs:")[0] for each in project.state["things"]} == {"storage buckets"}


def test_gc_leaves_a_stack_alone_that_is_just_being_made(project: Project) -> None:
    left_behind(project, "bare", "us-central1", "")
    things = project.state["things"]
    things["compute networks gdl-ray-bare"]["creationTimestamp"] = datetime.now(UTC).isoformat()
    project.set(things=things)
    assert gcp.gc(yes=True) == []
    assert project.state["things"] == things


def test_gc_finds_disks_that_no_node_uses(project: Project) -> None:
    zone = "https://www.googleapis.com/compute/v1/projects/my-project/zones/us-central1-a"
    disk = {"name": "d", "zone": zone, "labels": {"gdl-ray-stack": "lost"}}
    used = disk | {"name": "u", "users": ["https://.../instances/i"]}
    project.set(disks=[disk, used])
    assert gcp.gc(yes=False) == ["disk d in us-central1-a"]
    assert gcp.gc(yes=True) == []
    assert project.state["disks"] == [used]


def test_gc_looks_in_the_project_of_the_stack(project: Project) -> None:
    project.set(project="")
    with pytest.raises(Refused, match="set to no project"):
        gcp.gc()
    gcp.gc(project="another")
    asked = [words for words in project.told if words[0] in ("compute", "iam")]
    assert asked
    assert all("--project=another" in words for words in asked)


def test_gc_asks_at_a_terminal(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    left_behind(project, "old", "us-central1", "2020-01-01t00_00_00z")
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda question: "n")
    before = project.changes()
    with pytest.raises(Refused, match="not confirmed"):
        gcp.gc()
    assert project.changes() == before
    monkeypatch.setattr("builtins.input", lambda question: "y")
    assert gcp.gc() == []
    assert project.state["instances"] == []
