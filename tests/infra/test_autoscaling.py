"""Ray's real autoscaler, on a cluster file such as a stack's; its cloud's machines are processes here."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from infra.processes import end, spawn
from tests.conftest import ROOT, free_port

HEAD_ID = "f" * 51 + "00000"


def worker(kind: str, most: int, priority: int) -> dict[str, Any]:
    """Describe nodes with two CPUs and a GPU, which show their kind as a resource."""
    has = {"CPU": 2, "GPU": 1, kind: 1}
    return {"node_config": {}, "resources": has, "min_workers": 0, "max_workers": most, "priority": priority}


@pytest.fixture
def cluster() -> Iterator[dict[str, str]]:
    """A head without workers, and the environment of jobs on it."""
    folder = Path(tempfile.mkdtemp(prefix="gdl-as-"))
    port = free_port()
    head = {"node_config": {}, "resources": {"CPU": 0}, "max_workers": 0}
    config = {
        "cluster_name": "fake",
        "max_workers": 3,
        "idle_timeout_minutes": 0.05,
        "provider": {
            "type": "external",
            "module": "tests.infra.fake_provider.Provider",
            "head_node_id": HEAD_ID,
            "gcs_address": f"127.0.0.1:{port}",
            "launch_multiple": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": head,
            "od": worker("od", 1, priority=0),
            "spot": worker("spot", 2, priority=10),
        },
        "auth": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "initialization_commands": [],
        "setup_commands": [],
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "head_start_ray_commands": [],
        "worker_start_ray_commands": [],
    }
    file = folder / "cluster.yaml"
    file.write_text(json.dumps(config))
    env = os.environ | {
        "PYTHONPATH": str(ROOT),
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    env.pop("RAY_ADDRESS", None)
    ray = str(Path(sys.executable).with_name("ray"))
    command = [ray, "start", "--head", "--block", "--num-cpus=0", "--num-gpus=0", "--include-dashboard=false"]
    command += [f"--port={port}", "--node-ip-address=127.0.0.1", f"--temp-dir={folder / 'ray'}"]
    started = spawn([*command, f"--autoscaling-config={file}"], folder / "log", env, ROOT)
    try:
        jobs = {name: value for name, value in env.items() if not name.startswith("RAY_")}
        yield jobs | {
            "RAY_ADDRESS": f"127.0.0.1:{port}",
            "RAY_AUTH_MODE": "disabled",
            "GDL_RAY_CLUSTER_FILE": str(file),
        }
    finally:
        end(started)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.long
def test_a_job_gets_nodes_from_none_spot_first_and_they_end_after_it(cluster: dict[str, str]) -> None:
    job = subprocess.run(
        [sys.executable, "-m", "tests.infra.waits_for_nodes"],
        cwd=ROOT,
        env=cluster,
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert job.returncode == 0, job.stderr
    # Among what Ray tells of the autoscaler, which may come last.
    said = json.loads(next(line for line in job.stdout.splitlines() if line.startswith("{")))
    assert said["before"] == {"head": 1}
    assert "room for 3 of 4 when all nodes are up that the cluster may launch" in said["refused"]
    assert said["during"] == {"head": 1, "spot": 2, "od": 1}
    assert said["after"] == {"head": 1}
