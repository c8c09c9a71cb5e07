"""What is said of programs that are not on this machine."""

from pathlib import Path

import pytest

from infra.programs import programs_missing


def test_a_missing_program_is_named_with_what_brings_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert programs_missing({"there": "It", "absent": "Its package"}) == [
        "absent is not on this machine: install Its package"
    ]
