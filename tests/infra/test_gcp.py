"""Google Cloud: what is made, found again, put elsewhere and deleted, by a gcloud whose project is a file.

And whether the real gcloud takes each command line, up to the point where it asks who somebody is.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from infra import gcloud as gcloud_module
from infra import gcp
from infra.folder import folder_of, public_key
from infra.gcloud import GcloudError, gcloud
from infra.gcp_machine import create_command, startup
from infra.plan import Job, Refused
from infra.stack import Head, Stack, Storage
from tests.infra import fake_gcloud
from tests.infra.fake_gcloud import instance
from tests.infra.gcp_project import ALL, GPUS, SPOT, ZONES, Project

REAL = shutil.which("gcloud")


def test_a_plan_changes_nothing_and_says_what_comes(project: Project, cluster: Stack) -> None:
    plan = gcp.plan(cluster, Job.parse("workers=4,gpu=1,cpu=3"))
    assert project.changes() == []
    assert plan.problems == []
    assert plan.fits == {"workers=4,cpu=3,gpu=1": "fits: launches 4 x l4-spot"}
    assert plan.image.endswith("ubuntu-accelerator-2404-amd64-with-nvidia-580")
    assert [node.zones for node in plan.nodes] == [tuple(ZONES)] * 3
    what = "\n".join(plan.steps)
    assert "firewall rule gdl-ray-demo-proxy: tcp:22 from 35.235.240.0/20" in what
    assert "bucket gs://gdl-ray-my-project-demo, closed to the public" in what
    assert plan.steps[-1] == "launch the head, e2-standard-4, with `ray up`"


def test_a_job_that_never_fits_is_refused(project: Project, cluster: Stack) -> None:
    plan = gcp.plan(cluster, Job.parse("workers=7,gpu=1"))
    assert any("never fits" in problem for problem in plan.problems)


@pytest.mark.parametrize(
    ("quota", "metric"),
    [
        ({"quotas": [GPUS, SPOT | {"usage": 6}]}, "PREEMPTIBLE_NVIDIA_L4_GPUS leaves 2 of the 4"),
        ({"quotas": [GPUS | {"limit": 1}, SPOT]}, "NVIDIA_L4_GPUS leaves 1 of the 2"),
        ({"project_quotas": [ALL | {"limit": 5}]}, "GPUS_ALL_REGIONS leaves 5 of the 6"),
    ],
)
def test_what_a_quota_forbids_is_refused_before_anything_is_made(
    quota: dict[str, Any], metric: str, project: Project, cluster: Stack, capsys: pytest.CaptureFixture[str]
) -> None:
    project.set(**quota)
    with pytest.raises(Refused, match=re.escape(metric)):
        gcp.up(cluster, yes=True)
    assert project.changes() == []


def test_up_makes_all_once_and_hands_over_to_ray(
    project: Project, cluster: Stack, rays: list[tuple[str, ...]]
) -> None:
    gcp.up(cluster, yes=True)
    folder = folder_of(cluster)
    assert rays == [("up", "-y", "--no-config-cache", str(folder.cluster))]
    assert folder.key.stat().st_mode & 0o777 == 0o600
    assert public_key(folder.key).split()[1] in folder.cluster.read_text()
    made = len(project.changes())
    gcp.up(cluster, yes=True)
    assert len(project.changes()) == made
    labels = {"gdl-ray-stack": "demo", "ray-node-type": "head", "gdl-ray-expires-at": "2030-01-01t00_00_00z"}
    head = instance("ray-demo-head", "us-central1-b", labels, "e2-standard-4")
    project.set(instances=[head | {"labels": labels | {"ray-node-status": "up-to-date"}}])
    gcp.up(cluster, yes=True)
    assert rays[-1] == ("up", "-y", "--no-config-cache", "--no-restart", str(folder.cluster))
    text = folder.cluster.read_text()
    assert "availability_zone: us-central1-b" in text  # where the head is
    assert "2030-01-01T00:00:00Z" in text  # another time would be another head to Ray


def test_services_are_started_until_they_once_were(
    project: Project, cluster: Stack, rays: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head that was left unfinished gets its services; one that has them keeps its jobs."""
    failed = {"gdl-ray-stack": "demo", "ray-node-type": "head", "ray-node-status": "update-failed"}
    folder = folder_of(cluster)
    gcp.up(cluster, yes=True)
    project.set(instances=[instance("head", "us-central1-b", failed, "e2-standard-4")])
    code = 1

    def ray(*words: str) -> int:
        rays.append(words)
        return code

    monkeypatch.setattr(gcp, "_ray", ray)
    with pytest.raises(Refused, match="exit code 1"):
        gcp.up(cluster, yes=True)
    code = 0
    gcp.up(cluster, yes=True)
    assert rays[-2:] == [("up", "-y", "--no-config-cache", str(folder.cluster))] * 2
    gcp.up(cluster, yes=True)  # Ray's label still tells of a failure, as after an update that was cut off
    assert "--no-restart" in rays[-1]
    gcp.up(cluster, yes=True, restart=True)
    assert "--no-restart" not in rays[-1]


def test_rights_are_narrow(project: Project, cluster: Stack, rays: list[tuple[str, ...]]) -> None:
    gcp.up(cluster, yes=True)
    head = "serviceAccount:gdl-demo-head@my-project.iam.gserviceaccount.com"
    worker = "serviceAccount:gdl-demo-worker@my-project.iam.gserviceaccount.com"
    bucket = "storage buckets gs://gdl-ray-my-project-demo"
    account = "iam service-accounts gdl-demo-worker@my-project.iam.gserviceaccount.com"
    assert sorted(map(tuple, project.state["bindings"])) == sorted(
        [
            ("projects my-project", head, "roles/compute.instanceAdmin.v1"),
            (account, head, "roles/iam.serviceAccountUser"),
            (bucket, head, "roles/storage.objectAdmin"),
            (bucket, worker, "roles/storage.objectAdmin"),
        ]
    )


def test_up_that_was_interrupted_goes_on(
    project: Project, cluster: Stack, rays: list[tuple[str, ...]]
) -> None:
    project.set(complaints={"buckets update": "ERROR: gcloud crashed (ConnectionError)"})
    with pytest.raises(Refused, match="ConnectionError"):
        gcp.up(cluster, yes=True)
    assert rays == []
    before = set(project.state["things"])
    project.set(complaints={})
    gcp.up(cluster, yes=True)
    state = project.state
    assert before < set(state["things"]) or before == set(state["things"])
    assert state["things"]["storage buckets gs://gdl-ray-my-project-demo"]["versioning_enabled"] is True
    assert len(state["bindings"]) == 4
    assert len(rays) == 1


def test_the_bucket_keeps_replaced_versions_for_a_month(
    project: Project, cluster: Stack, rays: list[tuple[str, ...]]
) -> None:
    gcp.up(cluster, yes=True)
    things = project.state["things"]
    bucket = things["storage buckets gs://gdl-ray-my-project-demo"]
    rule = {"action": {"type": "Delete"}, "condition": {"daysSinceNoncurrentTime": 30}}
    assert rule in bucket["lifecycle_config"]["rule"]
    bucket["lifecycle_config"]["rule"].remove(rule)
    project.set(things=things)
    assert any("replaced versions for 30 days" in step for step in gcp.plan(cluster).steps)


def test_a_bucket_of_the_users_own_is_used_as_it_is(
    project: Project, cluster: Stack, rays: list[tuple[str, ...]]
) -> None:
    stack = replace(cluster, storage=Storage(bucket="my-thesis-data"))
    with pytest.raises(Refused, match="gs://my-thesis-data does not exist; make it"):
        gcp.up(stack, yes=True)
    assert project.changes() == []
    mine = {"name": "my-thesis-data", "versioning_enabled": False}
    project.set(things={"storage buckets gs://my-thesis-data": mine})
    gcp.up(stack, yes=True)
    assert gcp.down(stack, yes=True, delete_data=True) == []
    assert project.state["things"] == {"storage buckets gs://my-thesis-data": mine}
    left = [each for each in project.state["bindings"] if not each[0].startswith("iam")]
    assert left == []  # the stack's rights on what is not its own are taken back
    assert not [words for words in project.told if words[:2] == ["storage", "rm"]]


def test_what_a_launcher_needs_is_asked_for_before_anything_is_made(
    project: Project, cluster: Stack, machine: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.set(complaints={"application-default": "ERROR: Your default credentials were not found."})
    monkeypatch.setattr(gcp, "find_spec", lambda name: None)
    with pytest.raises(Refused, match="gcloud auth application-default login") as refused:
        gcp.up(cluster, yes=True)
    assert "pip install 'gdl_ray[gcp]'" in str(refused.value)
    assert project.changes() == []
    assert gcp.plan(machine).problems == []  # which Ray's launcher does not make


def test_gpus_that_the_stack_has_already_are_not_missing(
    project: Project, cluster: Stack, rays: list[tuple[str, ...]]
) -> None:
    labels = {"gdl-ray-stack": "demo", "ray-node-type": "worker"}
    mine = [instance(f"w{i}", ZONES[0], labels, "g2-standard-8") for i in range(4)]
    spot = [each | {"scheduling": {"provisioningModel": "SPOT"}} for each in mine]
    project.set(
        instances=spot,
        quotas=[GPUS, SPOT | {"limit": 4, "usage": 4}],
        project_quotas=[ALL | {"limit": 6, "usage": 4}],
    )
    assert gcp.plan(cluster).problems == []
    project.set(instances=[each | {"status": "TERMINATED"} for each in spot])  # others use those that count
    assert len(gcp.plan(cluster).problems) == 2


def test_a_job_on_one_machine_must_find_room_there(project: Project, machine: Stack) -> None:
    assert gcp.plan(machine, Job.parse("workers=2,cpu=4")).fits == {
        "workers=2,cpu=4,gpu=0": "fits: launches nothing"
    }
    plan = gcp.plan(machine, Job.parse("workers=2,cpu=1,gpu=1"))
    assert any("the one machine, g2-standard-8, has 8 CPU, 1 GPU" in problem for problem in plan.problems)
    old = replace(machine, head=Head(type="n1-standard-8"))
    assert gcp.plan(old, Job.parse("gpu=1")).problems == []  # one is attached


def test_a_project_that_may_not_be_seen_is_not_an_empty_one(project: Project, cluster: Stack) -> None:
    project.set(complaints={"instances list": "ERROR: The resource 'projects/my-projetc' was not found"})
    for verb in (gcp.status, gcp.plan):
        with pytest.raises(Refused, match="my-projetc"):
            verb(cluster)
    with pytest.raises(Refused, match="my-projetc"):
        gcp.down(cluster, yes=True)


def test_ctrl_c_is_how_a_tunnel_ends(
    project: Project, machine: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    gcp.up(machine, yes=True)

    def interrupted(command: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(gcp, "subprocess", SimpleNamespace(run=interrupted))
    assert gcp.tunnel(machine) == 0


def test_a_machine_goes_where_there_is_room(project: Project, machine: Stack) -> None:
    project.set(full=["us-central1-a"])
    gcp.up(machine, yes=True)
    (made,) = project.state["instances"]
    assert made["zone"].endswith("/us-central1-b")
    gcp.up(machine, yes=True)
    assert len(project.state["instances"]) == 1  # it is there


def test_what_google_says_has_room_is_tried_first(project: Project, machine: Stack) -> None:
    project.set(full=["us-central1-a"], available="us-central1-c,us-east1-b")
    gcp.up(machine, yes=True)
    assert project.state["instances"][0]["zone"].endswith("/us-central1-c")


def test_where_no_zone_has_room_it_says_so(project: Project, machine: Stack) -> None:
    project.set(full=ZONES)
    with pytest.raises(
        Refused, match=r"no zone has a g2-standard-8 now \(us-central1-a, us-central1-b, us-central1-c\)"
    ):
        gcp.up(machine, yes=True)


def test_other_failures_are_not_tried_in_other_zones(project: Project, machine: Stack) -> None:
    project.set(complaints={"instances create": "ERROR: Quota 'NVIDIA_L4_GPUS' exceeded. Limit: 0.0"})
    with pytest.raises(Refused, match="a quota is used up"):
        gcp.up(machine, yes=True)
    assert len([words for words in project.told if words[1:3] == ["instances", "create"]]) == 1


def test_zones_are_those_of_the_stack_that_have_the_type(project: Project, machine: Stack) -> None:
    zones = ("us-central1-c", "us-central1-f")
    assert gcp.plan(replace(machine, zones=zones)).nodes[0].zones == ("us-central1-c",)
    (problem,) = gcp.plan(replace(machine, zones=("us-central1-f",))).problems
    assert problem.startswith("no zone of us-central1 has g2-standard-8")


def test_a_gpu_is_attached_where_the_machine_brings_none(machine: Stack) -> None:
    def command(kind: str) -> list[str]:
        stack = replace(machine, head=Head(type=kind))
        return create_command(stack, ZONES[0], "image", "2030-01-01T00:00:00Z", Path("script"))

    assert "--accelerator=type=nvidia-tesla-t4,count=1" in command("n1-standard-8")
    assert not [
        word for kind in ("g2-standard-8", "a2-highgpu-1g") for word in command(kind) if "accel" in word
    ]
    assert {"--termination-time=2030-01-01T00:00:00Z", "--instance-termination-action=DELETE"} <= set(
        command("n1-standard-8")
    )


def test_the_machine_starts_the_platform_and_installs_it_once(machine: Stack) -> None:
    script = startup(machine, "d1gest")
    assert "BUCKET='gs://gdl-ray-my-project-demo'" in script
    assert "DIGEST='d1gest'" in script
    subprocess.run(["bash", "-n", "-c", script], check=True)
    assert "@" not in re.sub(r'"\$\{\w+\[@\]\}"', "", script)


def test_status_tells_age_end_drift_and_orphans(
    project: Project, cluster: Stack, rays: list[tuple[str, ...]]
) -> None:
    assert gcp.status(cluster).nodes == []
    gcp.up(cluster, yes=True)
    labels = {
        "gdl-ray-stack": "demo",
        "gdl-ray-expires-at": "2030-01-01t00_00_00z",
        "ray-node-type": "worker",
    }
    project.set(instances=[instance("w", "us-central1-a", labels, "g2-standard-8", "TERMINATED")])
    things = project.state["things"]
    del things["compute firewall-rules gdl-ray-demo-proxy"]
    project.set(things=things)
    status = gcp.status(cluster)
    assert status.expires_at == "2030-01-01T00:00:00Z"
    assert status.drift == ["make firewall rule gdl-ray-demo-proxy: tcp:22 from 35.235.240.0/20"]
    assert status.orphans == ["w is terminated: its disk costs money", "w has no head"]
    assert status.nodes[0].age_h > 24


def test_a_number_is_not_an_answer() -> None:
    said = GcloudError("ERROR: Permission denied on projects/404409 (request 140914041)")
    assert not said.is_absent
    assert not said.is_there
    taken = "ERROR: HTTPError 409: The requested bucket name is not available."
    assert not GcloudError(taken).is_there  # it is another's


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("ERROR: Quota 'GPUS_ALL_REGIONS' exceeded. Limit: 0.0 globally.", "may have no more GPUs"),
        ("ERROR: code: QUOTA_EXCEEDED", "a quota is used up"),
        ("ERROR: PERMISSION_DENIED: Permission iam.roles.get denied", "it is not allowed"),
        (
            "ERROR: Compute Engine API has not been used in project 1 before or it is disabled.",
            "gcloud services enable",
        ),
        ("ERROR: You do not currently have an active account selected.", "gcloud auth login"),
        (
            "ERROR: There was a problem refreshing your current auth tokens: ('invalid_grant', ...)",
            "gcloud auth login",
        ),
        ("ERROR: code: RESOURCE_OPERATION_RATE_EXCEEDED", "try again in a minute"),
        ("ERROR: something else\nin two lines", "Google Cloud: ERROR: something else in two lines"),
    ],
)
def test_an_error_is_one_line_with_cause_and_cure(said: str, told: str) -> None:
    message = str(GcloudError(said).refusal())
    assert told in message
    assert "\n" not in message


def test_gcloud_is_a_command(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gcloud_module, "subprocess", subprocess)
    assert gcloud("compute", "instances", "list") == []
    assert project.told[-1] == ["compute", "instances", "list", "--format=json", "--quiet"]
    with pytest.raises(GcloudError, match="'a' was not found") as failed:
        gcloud("compute", "networks", "describe", "a")
    assert failed.value.is_absent


def test_without_gcloud_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Refused, match="install the Google Cloud CLI"):
        gcloud("info")


@pytest.fixture
def commands(
    project: Project, cluster: Stack, machine: Stack, rays: list[tuple[str, ...]]
) -> list[list[str]]:
    """Each kind of command line that the verbs have given."""
    gcp.up(cluster, yes=True)
    head = {"gdl-ray-stack": "demo", "ray-node-type": "head"}
    zone = f"projects/my-project/zones/{ZONES[0]}"
    project.set(
        instances=[instance("head", ZONES[0], head, "e2-standard-4")],
        disks=[{"name": "d", "zone": zone, "labels": head}],
    )
    gcp.up(cluster, yes=True)
    gcp.down(cluster, yes=True, delete_data=True)
    gcp.up(machine, yes=True)
    gcp.gc(expired=False, yes=True, project="my-project")
    gcp.up(replace(machine, head=Head(type="n1-standard-8")), yes=True)
    tunnel = gcp.tunnel_command(machine)[1:]
    kinds = {_kind(words): words for words in project.told}
    return [*kinds.values(), tunnel]


def _kind(words: list[str]) -> tuple[str, ...]:
    """Tell command lines apart by their verb and flags; names and values differ."""
    verb = next(i for i, word in enumerate(words) if word in fake_gcloud._VERBS)
    return (*words[: verb + 1], *(word.partition("=")[0] for word in words if word.startswith("--")))


@pytest.mark.slow
@pytest.mark.skipif(REAL is None, reason="gcloud is not on this machine")
def test_the_real_gcloud_takes_each_command_line(commands: list[list[str]], tmp_path: Path) -> None:
    wrong = ["compute", "instances", "create", "a", "--acelerator=count=1"]
    script = tmp_path / "script"
    script.touch()
    lines = [
        json.dumps([re.sub(r"(startup-script=).*", rf"\1{script}", word) for word in words])
        for words in [wrong, *commands]
    ]
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("real_gcloud.py"), str(REAL)],
        input="\n".join(lines),
        env=os.environ | {"CLOUDSDK_CONFIG": str(tmp_path / "config")},
        capture_output=True,
        text=True,
        check=True,
    )
    refused, *answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert refused[0] == 2  # so the others are right, because they get further
    for words, (code, said) in zip(commands, answers, strict=True):
        assert code == 1, (words, said)
        assert re.search("active account|default credentials were not found", said), (words, said)
