"""Secrets of the platform: made once, for their owner alone, and read by a real shell."""

import subprocess
from pathlib import Path

import pytest

from infra import auth


def test_a_secret_is_made_once_and_for_its_owner_alone(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    assert auth.kept(file, lambda: "first") == "first"
    assert auth.kept(file, lambda: "second") == "first"
    assert file.stat().st_mode & 0o777 == 0o600
    assert [each.name for each in tmp_path.iterdir()] == ["secret"]


def test_what_is_written_again_becomes_private(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text("for all to read")
    file.chmod(0o644)
    auth.write_private(file, "new")
    assert (file.read_text(), file.stat().st_mode & 0o777) == ("new", 0o600)


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    auth.write_private(file, "old")

    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="no space"):
        auth.write_private(file, "new")
    assert file.read_bytes() == b"old"


def test_homes_share_no_secret(tmp_path: Path) -> None:
    homes = [tmp_path / "a", tmp_path / "b"]
    for home in homes:
        home.mkdir()
    tokens = {Path(auth.ray_environment(home)["RAY_AUTH_TOKEN_PATH"]).read_text() for home in homes}
    passwords = {auth.mlflow_environment(home)["MLFLOW_TRACKING_PASSWORD"] for home in homes}
    assert len(tokens | passwords) == 4
    assert all(len(secret) >= 32 for secret in tokens | passwords)


def test_a_shell_reads_what_is_written_for_it(tmp_path: Path) -> None:
    odd = {"ONE": "a b", "TWO": "$HOME `id` 'x' \"y\" \\", "THREE": ""}
    auth.write_shell_file(tmp_path / "env.sh", odd)
    script = f". {tmp_path}/env.sh; env -0"
    printed = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout
    environment = dict(line.partition("=")[::2] for line in printed.split("\0"))
    assert {name: environment[name] for name in odd} == odd
    assert (tmp_path / "env.sh").stat().st_mode & 0o777 == 0o600
