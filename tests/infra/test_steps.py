"""What the verbs share: the question before anything is done, and what is said of missing programs."""

from pathlib import Path

import pytest

from infra.plan import Refused
from infra.steps import confirm, programs_missing


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


def test_a_missing_program_is_named_with_what_brings_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert programs_missing({"there": "It", "absent": "Its package"}) == [
        "absent is not on this machine: install Its package"
    ]
