"""API keys: who may call, what for, and how many samples a minute.

    python -m serve.keys add NAME [--scopes read sample] [--samples-per-minute 600] [--expires-days 90]
    python -m serve.keys list
    python -m serve.keys revoke ID

A secret is shown once, when its key is made. What is kept is its sha256: slow hashes protect passwords, which
can be guessed; nobody guesses 256 random bits. Several keys may bear one name: to rotate a key, add another
of its name, hand it out, and revoke the old one.

References:
    Jones, Hardt. The OAuth 2.0 Authorization Framework: Bearer Token Usage. RFC 6750, 2012.
"""

import argparse
import fcntl
import hashlib
import hmac
import json
import math
import os
import re
import secrets
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from pathlib import Path
from typing import Any

from gdl_ray.home import home
from serve.problems import FieldProblem, Problem, invalid

SCOPES = ("read", "sample", "infer")
"""What a key may be for: to list and describe models, to draw samples, to ask about data."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@-]{0,63}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Key:
    """One key as it is kept: everything but its secret."""

    id: str
    """The first 12 digits of the sum."""
    name: str
    """Of the person or program that holds it."""
    scopes: tuple[str, ...]
    samples_per_minute: int | None
    """None sets no limit."""
    created: str
    """ISO 8601, with its zone, as is `expires`."""
    expires: str | None
    sha256: str
    """Sum of the secret, in hexadecimal."""

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> "Key":
        """Read a key from a record of the table.

        Raises:
            ValueError: the record is not one; the message names the field.
        """
        try:
            key = cls(**{**record, "scopes": tuple(record["scopes"])})
        except (TypeError, KeyError) as error:
            raise ValueError(f"{record} is not the record of a key: {error}") from None
        key._check()
        return key

    def _check(self) -> None:
        limit = self.samples_per_minute
        right = {
            "name": _is(_NAME, self.name),
            "scopes": all(scope in SCOPES for scope in self.scopes),
            "samples_per_minute": limit is None or (type(limit) is int and limit > 0),
            "created": _is_moment(self.created),
            "expires": self.expires is None or _is_moment(self.expires),
            "sha256": _is(_SHA256, self.sha256),
            "id": self.id == str(self.sha256)[:12],
        }
        for field, is_right in right.items():
            if not is_right:
                raise ValueError(f"{field}={getattr(self, field)!r} of key {self.id!r} cannot be right")

    def has_expired(self) -> bool:
        """Tell whether its time is over."""
        return self.expires is not None and datetime.fromisoformat(self.expires) <= datetime.now(UTC)


def _is(pattern: re.Pattern[str], value: object) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None


def _is_moment(value: object) -> bool:
    try:
        return datetime.fromisoformat(str(value)).tzinfo is not None
    except ValueError:
        return False


def keys_file() -> Path:
    """Name the file of the keys: `keys.json` in the home of the platform."""
    return home() / "keys.json"


def read_records(file: Path) -> list[dict[str, Any]]:
    """Read the table of the keys, for `Keyring.update`; empty where there is no file.

    Raises:
        ValueError: the file does not hold a table of keys.
    """
    if not file.exists():
        return []
    try:
        records = json.loads(file.read_text())["keys"]
        return [asdict(Key.read(record)) for record in records]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{file} does not hold keys: {error}; restore it, or remove it and add keys"
        ) from None


def add(
    file: Path,
    name: str,
    scopes: Sequence[str] = SCOPES,
    samples_per_minute: int | None = None,
    expires: datetime | None = None,
) -> tuple[str, Key]:
    """Make a key and write it down.

    Returns:
        The secret, which is kept nowhere, and the key.

    Raises:
        ValueError: a value is not one for its field, or the file does not hold keys.
    """
    secret = "gdl_" + secrets.token_urlsafe(32)
    key = Key.read(
        {
            "id": _sum(secret)[:12],
            "name": name,
            "scopes": scopes,
            "samples_per_minute": samples_per_minute,
            "created": _iso(datetime.now(UTC)),
            "expires": _iso(expires) if expires else None,
            "sha256": _sum(secret),
        }
    )
    with _records(file) as records:
        records.append(asdict(key))
    return secret, key


def revoke(file: Path, key_id: str) -> Key:
    """Take a key out of the table.

    Raises:
        ValueError: there is none of this id.
    """
    with _records(file) as records:
        revoked = [record for record in records if record["id"] == key_id]
        if not revoked:
            raise ValueError(f"ID={key_id}: no key has it; `python -m serve.keys list` tells those there are")
        records.remove(revoked[0])
    return Key.read(revoked[0])


@contextmanager
def _records(file: Path) -> Iterator[list[dict[str, Any]]]:
    """Change the table: one command at a time, and whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        records = read_records(file)
        yield records
        handle, new = tempfile.mkstemp(prefix=".keys-", dir=file.parent)  # of mode 0600
        try:
            with os.fdopen(handle, "w") as stream:
                json.dump({"keys": records}, stream, indent=2)
                stream.flush()
                os.fsync(handle)
            Path(new).replace(file)
        finally:
            Path(new).unlink(missing_ok=True)


def _sum(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _iso(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sends a request, as the audit names them."""

    id: str
    name: str


ANONYMOUS = Caller("", "anonymous")


class _Bucket:
    """An allowance that fills up evenly within a minute, and may go into debt.

    A full one lets any request through that the key allows, even where a replica's share of the allowance is
    smaller than the request; the debt is then paid off first, so that the mean rate is kept.
    """

    def __init__(self, per_minute: float) -> None:
        self._most = self._level = per_minute
        self._settled_at = time.monotonic()

    def resize(self, per_minute: float) -> None:
        """Take another allowance from now on; what was used stays used."""
        self._settle()
        self._level += per_minute - self._most
        self._most = per_minute

    def take(self, samples: int) -> float:
        """Take samples, and return 0; or take none, and return the seconds until they may be taken."""
        self._settle()
        missing = min(samples, self._most) - self._level
        if missing > 1e-9 * self._most:  # or a wait to the very moment ends a rounding error too early
            return missing / self._most * 60
        self._level -= samples
        return 0.0

    def _settle(self) -> None:
        now = time.monotonic()
        self._level = min(self._most, self._level + (now - self._settled_at) / 60 * self._most)
        self._settled_at = now


class Keyring:
    """The keys that a replica knows; any thread may ask it.

    Args:
        required: whether a request without a key is refused.
    """

    def __init__(self, required: bool) -> None:
        self._required = required
        self._keys: dict[str, Key] = {}
        self._buckets: dict[str, _Bucket] = {}
        self._lock = threading.Lock()

    def update(self, records: list[dict[str, Any]], share: float = 1.0) -> None:
        """Take a new table; keys that are not in it admit nobody any more.

        Args:
            records: what `read_records` returns.
            share: this replica's part of each rate limit, in (0, 1]: one over the number of replicas.

        Raises:
            ValueError: the share or a record is not as described; the table from before stays.
        """
        if not 0 < share <= 1:
            raise ValueError(f"share={share} must lie in (0, 1]")
        keys = {key.id: key for key in map(Key.read, records)}
        limits = {key.id: key.samples_per_minute * share for key in keys.values() if key.samples_per_minute}
        with self._lock:
            buckets = {name: self._buckets.get(name) or _Bucket(limit) for name, limit in limits.items()}
            for name, bucket in buckets.items():
                bucket.resize(limits[name])
            self._keys, self._buckets = keys, buckets

    def admit(self, authorization: str | None, scope: str) -> Caller:
        """Tell who sends a request, from its Authorization header.

        A key that is given must be right even where none is required: who sends one believes to be known.

        Raises:
            Problem: 401, the key is missing, unknown or expired; 403, it is not for this scope.
        """
        if authorization is None:
            if self._required:
                detail = "Send a key: 'Authorization: Bearer gdl_...'. The operator of this service has them."
                raise _challenge(HTTPStatus.UNAUTHORIZED, "key-missing", detail)
            return ANONYMOUS
        scheme, _, secret = authorization.partition(" ")
        key = self._find(secret.strip()) if scheme.lower() == "bearer" else None
        if key is None or key.has_expired():
            detail = "The key in 'Authorization: Bearer gdl_...' is unknown or has expired; ask for another."
            raise _challenge(HTTPStatus.UNAUTHORIZED, "key-invalid", detail, 'error="invalid_token"')
        if scope not in key.scopes:
            detail = (
                f"This needs a key with the scope {scope!r}; yours has {', '.join(key.scopes) or 'none'}."
            )
            more = f'error="insufficient_scope", scope="{scope}"'
            raise _challenge(HTTPStatus.FORBIDDEN, "scope-missing", detail, more)
        return Caller(key.id, key.name)

    def charge(self, caller: Caller, samples: int) -> None:
        """Count samples against the caller's limit; those that are refused are not counted.

        Raises:
            Problem: 429, the minute's allowance is used up, and when to come again; 422, the request is
                larger than the allowance: no waiting helps, and told 429 clients would try for ever.
        """
        with self._lock:
            key, bucket = self._keys.get(caller.id), self._buckets.get(caller.id)
            if key is None or bucket is None:
                return
            if samples > (allowance := key.samples_per_minute or 0):
                cure = f"Ask for at most {allowance} at a time: your key allows {allowance} samples a minute"
                raise invalid(FieldProblem(field="n", value=str(samples), cure=cure))
            wait_s = math.ceil(bucket.take(samples))
        if wait_s:
            detail = f"Your key allows {allowance} samples a minute; {samples} more fit in {wait_s} s."
            headers = {"Retry-After": str(wait_s)}
            raise Problem(HTTPStatus.TOO_MANY_REQUESTS, "rate-limit", detail, headers=headers)

    def _find(self, secret: str) -> Key | None:
        """Find the key of a secret, comparing it with every one: the time taken tells nothing."""
        given, found = _sum(secret), None
        for key in self._keys.values():
            if hmac.compare_digest(key.sha256, given):
                found = key
        return found


def _challenge(status: HTTPStatus, kind: str, detail: str, more: str = "") -> Problem:
    challenge = ", ".join(filter(None, ['Bearer realm="gdl_ray"', more]))
    return Problem(status, kind, detail, headers={"WWW-Authenticate": challenge})


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit code: 0, or 2 where an argument is wrong.
    """
    asked = _parser().parse_args(arguments)
    try:
        if asked.command == "add":
            days: float | None = asked.expires_days
            expires = datetime.now(UTC) + timedelta(days=days) if days else None
            _show_secret(*add(keys_file(), asked.name, asked.scopes, asked.samples_per_minute, expires))
        elif asked.command == "revoke":
            print(f"revoked {asked.id}, of {revoke(keys_file(), asked.id).name}")
        else:
            _show([Key.read(record) for record in read_records(keys_file())])
    except (ValueError, OverflowError) as error:
        print(f"python -m serve.keys: error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    description, _, _ = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(prog="python -m serve.keys", description=description)
    commands = parser.add_subparsers(dest="command", required=True)
    adding = commands.add_parser("add", help="make a key; its secret is shown this once")
    adding.add_argument("name", metavar="NAME", help="who will hold it")
    adding.add_argument("--scopes", nargs="+", choices=SCOPES, default=SCOPES, help="what it is for")
    adding.add_argument(
        "--samples-per-minute", type=_positive(int), metavar="N", help="limit; none if left out"
    )
    adding.add_argument("--expires-days", type=_positive(float), metavar="D", help="never if left out")
    commands.add_parser("list", help="show the keys")
    revoking = commands.add_parser("revoke", help="let a key admit nobody any more")
    revoking.add_argument("id", metavar="ID", help="as `list` shows it")
    return parser


def _positive(number: type[int] | type[float]) -> Any:
    def parse(text: str) -> float:
        if not 0 < (value := number(text)) < math.inf:
            raise argparse.ArgumentTypeError(f"{text} must be more than 0")
        return value

    parse.__name__ = number.__name__  # argparse's word for what is no number at all
    return parse


def _show_secret(secret: str, key: Key) -> None:
    """Print the secret alone to the standard output, so that a script can take it."""
    print(f"key {key.id} of {key.name}, for {', '.join(key.scopes)}; its secret, this once:", file=sys.stderr)
    print(secret)


def _show(keys: list[Key]) -> None:
    if not keys:
        print("there are no keys; `python -m serve.keys add NAME` makes one")
        return
    print(f"{'ID':<12}  {'NAME':<16}  {'SAMPLES/MIN':>11}  {'CREATED':<25}  {'EXPIRES':<25}  SCOPES")
    for key in keys:
        limit = key.samples_per_minute or "-"
        expires = "expired" if key.has_expired() else key.expires or "-"
        scopes = " ".join(key.scopes)
        print(f"{key.id}  {key.name:<16}  {limit:>11}  {key.created:<25}  {expires:<25}  {scopes}")


if __name__ == "__main__":
    sys.exit(main())
