"""Files copied between folders and a real S3 server, bit for bit; what is said of places that are none."""

import hashlib
from pathlib import Path

import pytest

from infra.artifacts import Files
from infra.errors import PlatformError

CONTENTS = {
    "1/model/weights.safetensors": bytes(range(256)) * 40_000,  # more than a part of an upload, 10 MB
    "1/images/samples+step+100.png": b"\x89PNG",
    "1/empty": b"",
    "of a name/50% ünï.txt": b"odd",
}


@pytest.fixture
def folder(tmp_path: Path) -> Files:
    """A folder of files, and one that is empty, which a bucket has no word for."""
    for name, content in CONTENTS.items():
        file = tmp_path / "from" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    (tmp_path / "from" / "nothing").mkdir()
    return Files(str(tmp_path / "from"))


def test_files_go_to_a_bucket_and_come_back_the_same(folder: Files, s3: str, tmp_path: Path) -> None:
    place, _, query = s3.partition("?")
    bucket, back = Files(f"{place}/{tmp_path.name}?{query}"), Files(str(tmp_path / "back"))
    assert bucket.names() == back.names() == []
    sums = folder.copy(folder.names(), bucket)
    assert sums == {name: hashlib.sha256(content).hexdigest() for name, content in CONTENTS.items()}
    assert bucket.names() == sorted(CONTENTS)
    assert bucket.copy(bucket.names(), back) == sums
    assert {name: (tmp_path / "back" / name).read_bytes() for name in back.names()} == CONTENTS


def test_a_place_that_loses_what_is_written_is_found_out(folder: Files, tmp_path: Path) -> None:
    (tmp_path / "to" / "1" / "images").mkdir(parents=True)
    (tmp_path / "to" / "1" / "images" / "samples+step+100.png").symlink_to("/dev/null")
    with pytest.raises(PlatformError, match=r"/to gives back 1/images/samples\+step\+100.png other than"):
        folder.copy(folder.names(), Files(str(tmp_path / "to")))


def test_a_bucket_that_is_not_there_is_told(s3: str) -> None:
    with pytest.raises(PlatformError, match="there is no bucket nope; make it first"):
        Files(s3.replace("s3://runs", "s3://nope/mlflow"))


def test_a_server_that_does_not_answer_is_told() -> None:
    address = "s3://runs/mlflow?endpoint_override=127.0.0.1:1&scheme=http"
    with pytest.raises(PlatformError, match=r"^--artifacts s3://runs/mlflow\?.* cannot be used: "):
        Files(address)
