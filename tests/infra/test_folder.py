"""What this machine keeps of a stack: private, made once; and a wheel that depends on its files alone."""

import base64
import stat
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

import gdl_ray.home
from infra.folder import Folder, folder_of, public_key
from infra.local import PROJECT
from infra.plan import Refused
from infra.stack import Stack


def test_what_is_secret_is_for_its_owner_alone_and_made_once(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "demo")
    folder.make()
    files = [folder.token, folder.secrets]
    for file in files:
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    before = [file.read_text() for file in files]
    folder.make()
    assert [file.read_text() for file in files] == before
    assert len(set(before[0])) > 8  # a token, not a constant
    Folder(tmp_path / "other").make()
    assert Folder(tmp_path / "other").token.read_text() != before[0]


def test_mlflow_gets_the_key_that_its_encryption_takes(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "demo")
    folder.make()
    given = dict(line.split("=", 1) for line in folder.secrets.read_text().splitlines())
    assert len(base64.urlsafe_b64decode(given["MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY"])) == 32
    assert given["MLFLOW_TRACKING_PASSWORD"] == given["MLFLOW_AUTH_ADMIN_PASSWORD"]


def test_the_cluster_file_is_private_from_the_first_byte_on(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.cluster.write_text("old")
    folder.cluster.chmod(0o644)
    folder.write({"cluster_name": "demo"})
    assert folder.cluster.read_text() == "cluster_name: demo\n"
    assert stat.S_IMODE(folder.cluster.stat().st_mode) == 0o600


def test_stacks_of_one_name_in_other_places_share_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Else `down` of one would end the other's cluster, and delete its key."""
    monkeypatch.setenv("GDL_RAY_HOME", str(tmp_path))
    here = Stack(stack="demo", cloud="aws", region="us-west-2")
    google = replace(here, cloud="gcp", region="us-central1", project="mine")
    stacks = [here, replace(here, region="eu-west-1"), google, replace(google, project="yours")]
    folders = [folder_of(stack).path for stack in stacks]
    assert len(set(folders)) == 4
    assert {folder.parent for folder in folders} == {tmp_path / "stacks"}
    assert folders[0].name == "aws-us-west-2-demo"


def test_a_key_file_that_is_none_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "key.pem"
    file.write_text("nonsense")
    with pytest.raises(Refused, match=f"{file}: ssh-keygen cannot use it"):
        public_key(file)


@pytest.mark.slow
def test_nodes_get_the_code_of_this_checkout(tmp_path: Path) -> None:
    before = subprocess.run(
        ["git", "status", "--short", "--ignored", "build"], cwd=PROJECT, capture_output=True, check=True
    )
    folder = Folder(tmp_path)
    digest = folder.pack()
    (wheel,) = folder.code.glob("*.whl")
    assert gdl_ray.home.file_sha256(wheel).startswith(digest)
    assert (folder.code / "constraints.txt").read_bytes() == (PROJECT / "constraints.txt").read_bytes()
    with zipfile.ZipFile(wheel) as content:
        names = set(content.namelist())
        assert content.read("infra/node.py") == (PROJECT / "infra" / "node.py").read_bytes()
    assert {"serve/playground.html", "infra/scripts/service.sh", "gdl_ray/families/vae.py"} <= names
    assert not [name for name in names if name.startswith(("tests", ".gdl_ray", "build"))]
    assert folder.pack() == digest  # nodes install it again only if it is another
    after = subprocess.run(
        ["git", "status", "--short", "--ignored", "build"], cwd=PROJECT, capture_output=True, check=True
    )
    assert after.stdout == before.stdout
