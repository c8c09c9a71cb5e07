"""Who is let in, how much they may draw, and what is kept of a key."""

import hmac
import json
import os
import random
import stat
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from serve import keys
from serve.keys import ANONYMOUS, Caller, Keyring
from serve.problems import Problem


class Clock:
    """A clock that the test moves on."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    return clock


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "home" / "keys.json"


def made(file: Path, name: str = "ada", **options: Any) -> tuple[str, Keyring]:
    """A key, and a keyring that requires one and knows it."""
    secret, _ = keys.add(file, name, **options)
    ring = Keyring(required=True)
    ring.update(keys.read_records(file))
    return secret, ring


def refused(ring: Keyring, authorization: str | None, scope: str = "sample") -> Problem:
    with pytest.raises(Problem) as caught:
        ring.admit(authorization, scope)
    return caught.value


def overdrawn(ring: Keyring, caller: Caller, samples: int) -> Problem:
    with pytest.raises(Problem) as caught:
        ring.charge(caller, samples)
    return caught.value


def test_a_key_admits_its_holder_for_its_scopes(file: Path) -> None:
    secret, ring = made(file, scopes=["read", "sample"])
    caller = ring.admit(f"Bearer {secret}", "sample")
    assert caller.name == "ada"
    assert caller.id == keys.read_records(file)[0]["id"]
    assert ring.admit(f"bearer  {secret} ", "read") == caller  # RFC 9110: schemes know no case


def test_a_wrong_scope_is_named(file: Path) -> None:
    secret, ring = made(file, scopes=["read"])
    problem = refused(ring, f"Bearer {secret}", "metrics")
    assert problem.document.status == 403
    assert "'metrics'" in problem.document.detail
    assert problem.headers is not None
    assert 'error="insufficient_scope", scope="metrics"' in problem.headers["WWW-Authenticate"]


def test_a_missing_key_is_challenged(file: Path) -> None:
    _, ring = made(file)
    problem = refused(ring, None)
    assert problem.document.status == 401
    assert problem.headers == {"WWW-Authenticate": 'Bearer realm="gdl_ray"'}


def test_an_unknown_key_learns_no_more_than_an_expired_one(file: Path) -> None:
    secret, ring = made(file, expires=datetime.now(UTC) - timedelta(seconds=1))
    expired = refused(ring, f"Bearer {secret}")
    unknown = refused(ring, f"Bearer {secret[:-1]}")
    assert expired.document == unknown.document
    assert expired.headers == unknown.headers
    assert expired.document.status == 401


@pytest.mark.parametrize(
    "given", ["", "Bearer", "Bearer ", "Basic dTpw", "Bearer \xff", "{secret}", "x" * 9000]
)
def test_what_is_no_key_is_refused_even_where_none_is_required(file: Path, given: str) -> None:
    secret, _ = made(file)
    ring = Keyring(required=False)
    ring.update(keys.read_records(file))
    assert refused(ring, given.format(secret=secret)).document.status == 401
    assert ring.admit(None, "sample") == ANONYMOUS
    assert ring.admit(f"Bearer {secret}", "sample").name == "ada"


def test_the_sum_of_a_secret_is_no_secret(file: Path) -> None:
    _, ring = made(file)
    record = keys.read_records(file)[0]
    assert refused(ring, f"Bearer {record['sha256']}").document.status == 401
    assert refused(ring, f"Bearer {record['id']}").document.status == 401


def test_the_time_of_a_refusal_tells_nothing_of_the_key(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = [keys.add(file, f"n{i}")[0] for i in range(5)]
    ring = Keyring(required=True)
    ring.update(keys.read_records(file))
    compared: list[str] = []
    compare = hmac.compare_digest

    def counted(kept: str, given: str) -> bool:
        compared.append(kept)
        return compare(kept, given)

    monkeypatch.setattr(hmac, "compare_digest", counted)
    for secret in [secrets[0], secrets[4], "gdl_nothing"]:
        compared.clear()
        ring._find(secret)
        assert len(compared) == 5


def test_keys_of_one_name_live_side_by_side_until_one_is_revoked(file: Path) -> None:
    old, ring = made(file)
    new, _ = keys.add(file, "ada")
    ring.update(keys.read_records(file))
    callers = [ring.admit(f"Bearer {secret}", "sample") for secret in (old, new)]
    assert [caller.name for caller in callers] == ["ada", "ada"]
    keys.revoke(file, callers[0].id)
    ring.update(keys.read_records(file))
    assert refused(ring, f"Bearer {old}").document.status == 401
    assert ring.admit(f"Bearer {new}", "sample") == callers[1]


def test_a_bad_table_is_refused_and_the_one_before_stays(file: Path) -> None:
    secret, ring = made(file)
    good = keys.read_records(file)[0]
    wrong: list[dict[str, Any]] = [
        {"id": "1"},
        good | {"scopes": ["everything"]},
        good | {"scopes": [["read"]]},
        good | {"expires": "tomorrow"},
        good | {"expires": "2030-01-01T00:00:00"},  # in which zone?
        good | {"samples_per_minute": 0},
        good | {"samples_per_minute": True},
        good | {"sha256": "abc"},
        good | {"id": "0" * 12},
        good | {"name": "ada\n{}"},
        good | {"more": 1},
    ]
    for record in wrong:
        with pytest.raises(ValueError, match=r"record of a key|cannot be right"):
            ring.update([record])
    with pytest.raises(ValueError, match=r"share=0 must lie in \(0, 1\]"):
        ring.update([good], share=0)
    assert ring.admit(f"Bearer {secret}", "sample").name == "ada"


def test_the_limit_is_kept_and_the_time_to_wait_is_right(file: Path, clock: Clock) -> None:
    secret, ring = made(file, samples_per_minute=60)
    caller = ring.admit(f"Bearer {secret}", "sample")
    ring.charge(caller, 60)
    problem = overdrawn(ring, caller, 10)
    assert problem.document.status == 429
    assert problem.headers == {"Retry-After": "10"}
    clock.now_s += 9.9
    assert overdrawn(ring, caller, 10).headers == {"Retry-After": "1"}
    clock.now_s += 0.1
    ring.charge(caller, 10)


@pytest.mark.parametrize("share", [1.0, 0.25, 0.01])
def test_over_an_hour_a_greedy_client_draws_what_its_key_allows(
    file: Path, clock: Clock, share: float
) -> None:
    secret, ring = made(file, samples_per_minute=100)
    ring.update(keys.read_records(file), share)
    caller = ring.admit(f"Bearer {secret}", "sample")
    sizes, drawn, begin_s = random.Random(0), 0, clock.now_s
    while clock.now_s < begin_s + 3600:
        n = sizes.randint(1, 100)
        try:
            ring.charge(caller, n)
        except Problem as problem:
            clock.now_s += int((problem.headers or {})["Retry-After"])
            ring.charge(caller, n)  # it was told when to come again, and is let in
        drawn += n
    earned = (clock.now_s - begin_s) / 60 * 100 * share
    assert 0.95 * earned <= drawn <= earned + 100.001


def test_a_request_that_never_fits_is_not_told_to_wait(file: Path, clock: Clock) -> None:
    secret, ring = made(file, samples_per_minute=60)
    caller = ring.admit(f"Bearer {secret}", "sample")
    problem = overdrawn(ring, caller, 61)
    assert problem.document.status == 422
    assert "60 samples a minute" in problem.document.detail
    assert problem.document.errors is not None
    assert problem.document.errors[0].field == "n"
    ring.charge(caller, 60)  # what was refused was not counted


def test_a_changed_limit_counts_at_once_and_forgives_nothing(file: Path, clock: Clock) -> None:
    secret, ring = made(file, samples_per_minute=60)
    caller = ring.admit(f"Bearer {secret}", "sample")
    ring.charge(caller, 60)
    record = keys.read_records(file)[0]
    ring.update([record])
    assert overdrawn(ring, caller, 1).headers == {"Retry-After": "1"}
    ring.update([record | {"samples_per_minute": 120}])
    ring.charge(caller, 60)
    assert overdrawn(ring, caller, 60).headers == {"Retry-After": "30"}
    ring.update([record | {"samples_per_minute": None}])
    ring.charge(caller, 10**9)


def test_nobody_else_pays(file: Path, clock: Clock) -> None:
    secret, ring = made(file, samples_per_minute=10)
    other, key = keys.add(file, "bob", samples_per_minute=10)
    ring.update(keys.read_records(file))
    ring.charge(ring.admit(f"Bearer {secret}", "sample"), 10)
    ring.charge(ring.admit(f"Bearer {other}", "sample"), 10)
    ring.charge(ANONYMOUS, 10**9)
    keys.revoke(file, key.id)
    ring.update(keys.read_records(file))
    ring.charge(Caller(key.id, "bob"), 10)  # admitted just before: it ends well


def test_threads_do_not_draw_more_than_the_limit(file: Path, clock: Clock) -> None:
    secret, ring = made(file, samples_per_minute=1000)
    caller = ring.admit(f"Bearer {secret}", "sample")
    granted: list[int] = []

    def draw() -> None:
        for _ in range(500):
            try:
                ring.charge(caller, 1)
                granted.append(1)
            except Problem:
                pass
            ring.update(keys_now)

    keys_now = keys.read_records(file)
    threads = [threading.Thread(target=draw) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(granted) == 1000


def test_the_file_is_private_and_holds_no_secret(file: Path) -> None:
    before = os.umask(0)
    try:
        secret, _ = made(file)
    finally:
        os.umask(before)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert len(secret) == 4 + 43  # 256 bits in base64
    assert secret not in file.read_text()
    assert secret[4:] not in file.read_text()


def test_what_is_half_written_is_not_read(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(file)
    before = file.read_bytes()

    def fail(handle: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        keys.add(file, "bob")
    assert file.read_bytes() == before
    assert {entry.name for entry in file.parent.iterdir()} == {"keys.json", "keys.lock"}


def test_a_damaged_file_is_named_and_not_replaced(file: Path) -> None:
    file.parent.mkdir()
    for damaged in ["", "{", "[]", '{"keys": [{}]}', '{"keys": 3}']:
        file.write_text(damaged)
        with pytest.raises(ValueError, match=r"keys\.json does not hold keys"):
            keys.add(file, "ada")
        assert file.read_text() == damaged


def run(home: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "serve.keys", *arguments]
    env = os.environ | {"GDL_RAY_HOME": str(home)}
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=Path(__file__).parents[2])


@pytest.mark.slow
def test_the_command_adds_lists_and_revokes(tmp_path: Path) -> None:
    added = run(tmp_path, "add", "ada", "--scopes", "read", "sample", "--samples-per-minute", "600")
    assert added.returncode == 0
    secret = added.stdout.strip()
    ring = Keyring(required=True)
    ring.update(keys.read_records(tmp_path / "keys.json"))
    caller = ring.admit(f"Bearer {secret}", "sample")
    assert caller.id in added.stderr
    listed = run(tmp_path, "list").stdout
    assert all(word in listed for word in (caller.id, "ada", "600", "read sample"))
    assert secret not in listed
    assert run(tmp_path, "revoke", caller.id).returncode == 0
    assert json.loads((tmp_path / "keys.json").read_text()) == {"keys": []}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["revoke", "0" * 12], "no key has it"),
        (["add", "ada\nbob"], "name='ada\\nbob'"),
        (["add", "ada", "--samples-per-minute", "0"], "0 must be more than 0"),
        (["add", "ada", "--samples-per-minute", "many"], "invalid int value: 'many'"),
        (["add", "ada", "--expires-days", "nan"], "nan must be more than 0"),
        (["add", "ada", "--expires-days", "1e9"], "error:"),
        (["add", "ada", "--scopes", "root"], "invalid choice: 'root'"),
        ([], "required: command"),
    ],
)
def test_a_wrong_argument_is_told(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("GDL_RAY_HOME", str(tmp_path))
    try:
        code: object = keys.main(arguments)
    except SystemExit as end:
        code = end.code
    assert code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "keys.json").exists()
