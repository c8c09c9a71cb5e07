"""The environment of a node's services: what the local platform has, and who may ask for what."""

import json
from pathlib import Path

import pytest

from infra import node
from jobs.cluster import node_types


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A node's home, with the passwords that it was sent."""
    private = tmp_path / "gdl_ray" / "private"
    private.mkdir(parents=True)
    (private / "mlflow").write_text("MLFLOW_TRACKING_USERNAME=admin\nMLFLOW_TRACKING_PASSWORD=a=b\n")
    return tmp_path


GIVEN = {"PATH": "/usr/bin", "GDL_RAY_BUCKET": "s3://bucket", "RAY_AUTH_MODE": "token"}


def test_a_worker_reports_to_the_head_with_its_password(home: Path) -> None:
    env = node.environment("worker", GIVEN | {"RAY_HEAD_IP": "10.0.0.5"}, home)
    assert env["MLFLOW_TRACKING_URI"] == "http://10.0.0.5:5000"
    assert env["MLFLOW_TRACKING_PASSWORD"] == "a=b"
    assert env["GDL_RAY_STORAGE"] == "s3://bucket/runs"
    assert env["RAY_AUTH_MODE"] == "token"
    assert env["PATH"].endswith(":/usr/bin")


def test_the_head_has_the_ingress_of_the_local_platform(home: Path) -> None:
    env = node.environment("head", GIVEN, home)
    assert env["RAY_ADDRESS"] == "127.0.0.1:6379"
    assert env["MLFLOW_TRACKING_URI"] == "http://127.0.0.1:5000"
    wrapper = Path(env["RAY_SERVE_HAPROXY_BINARY_PATH"])
    assert "127.0.0.1" in wrapper.read_text()  # its statistics are for nobody else either


def test_mlflow_does_not_ask_itself(home: Path) -> None:
    env = node.environment("mlflow", GIVEN, home)
    assert "MLFLOW_TRACKING_URI" not in env
    assert env["MLFLOW_WEBHOOK_ALLOWED_SCHEMES"] == "http,https"


def test_jobs_on_the_head_learn_which_nodes_may_come(
    home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Also from a file that `ray up` has changed since the head was started."""
    config = tmp_path / "config"
    monkeypatch.setattr(node, "CONFIG", config)
    env = node.environment("head", GIVEN, home)
    monkeypatch.setenv("GDL_RAY_CLUSTER_FILE", env["GDL_RAY_CLUSTER_FILE"])
    assert node_types() == {}
    head = {"resources": {"CPU": 0}, "max_workers": 0}
    for most in (2, 5):
        types = {"head": head, "l4": {"resources": {"CPU": 8}, "max_workers": most}}
        config.write_text(json.dumps({"head_node_type": "head", "available_node_types": types}))
        assert node_types() == {"l4": {"resources": {"CPU": 8}, "max": most}}
