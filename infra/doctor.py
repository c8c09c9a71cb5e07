"""The storage doctor: does a bucket, or a folder, give back what is written to it?

    python -m infra doctor s3://bucket/runs
    python -m infra doctor "s3://bucket/runs?endpoint_override=HOST:PORT&scheme=http&region=us-east-1"
    python -m infra doctor gs://bucket/runs
    python -m infra doctor /mnt/shared/runs

It does what training does, by the same library: writes small and large files and a tree of folders in a
folder of its own, reads them back, compares sha256 sums, lists and deletes them. Nothing of it stays. Where a
server understands S3 as it was before Amazon's clients began to send checksums behind the content, it finds
out, and names the setting.
"""

import argparse
import hashlib
import json
import os
import re
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pyarrow import fs  # type: ignore[import-untyped]

CHECKSUMS = "AWS_REQUEST_CHECKSUM_CALCULATION"
SETTING = f"{CHECKSUMS}=when_required"
"""What a server needs that takes checksums for content."""

_LARGE_BYTES = 11 * 2**20  # above the 10 MB from which pyarrow uploads in several parts
_TREE = {"top": 1000, "checkpoint/model": 2000, "checkpoint/resume/state": 3000}  # bytes of each file
_GCS_RETRY_S = 10  # else pyarrow tries for a quarter of an hour

# What errors say, what is wrong then and what helps; the first that fits is told.
_CURES = (
    (
        ("NO_SUCH_BUCKET", "NoSuchBucket", "not found"),
        "there is no bucket of this name",
        "make it, or correct the name",
    ),
    (
        ("ExpiredToken", "TokenRefreshRequired", "RequestExpired"),
        "the credentials have expired",
        "log in again, for example with `aws sso login`",
    ),
    (
        ("INVALID_ACCESS_KEY", "InvalidAccessKeyId", "SignatureDoesNotMatch", "INVALID_SIGNATURE"),
        "the server does not know these credentials",
        "correct AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    ),
    (
        ("OAuth2 access token",),
        "there are no credentials for Google Cloud",
        "log in by `gcloud auth application-default login`, or run where a service account is given",
    ),
    (
        ("ACCESS_DENIED", "AccessDenied", "403", "Permission denied", "Anonymous caller"),
        "it is not allowed",
        "allow to read, write, list and delete here: s3:GetObject, s3:PutObject, s3:DeleteObject, "
        "s3:AbortMultipartUpload and s3:ListBucket on AWS, roles/storage.objectAdmin on Google Cloud, rwx "
        "for a folder",
    ),
    (
        ("CreateBucket", "retry.function=CreateResumableUpload, gcloud-cpp.retry.reason=permanent-error"),
        "there is no bucket of this name",
        "make it, or correct the name",
    ),
    (
        ("NETWORK_CONNECTION", "Could not connect", "resolve host", "CURL error [7]", "timed out"),
        "no server answers",
        "correct endpoint_override=HOST:PORT and scheme=http or https after the address, and see it run",
    ),
    (("No space left", "quota exceeded"), "it is full", "make room"),
)
_SUSPECT = "the server alters what it is given", "keep checkpoints elsewhere: they would be damaged there"


class UnfitError(Exception):
    """The storage answered, and wrongly; the message says in what."""


@dataclass(frozen=True, slots=True)
class Step:
    """One thing that was tried."""

    name: str
    seconds: float
    ok: bool
    cause: str = ""
    cure: str = ""

    def line(self) -> str:
        """Write it as one line."""
        told = f"  {self.cause}; {self.cure}" if self.cause else ""
        return f"{'ok' if self.ok else 'FAILED':<7}{self.name:<22}{self.seconds:6.2f} s{told}"


@dataclass(frozen=True, slots=True)
class Report:
    """What was found."""

    address: str
    steps: tuple[Step, ...]
    setting: str = ""
    """Environment variable and value with which all goes well; empty where none is needed or helps."""

    @property
    def ok(self) -> bool:
        """Whether the storage is fit as it is."""
        return all(step.ok for step in self.steps)

    def text(self) -> str:
        """Write it for people, a line for each step and one for the end."""
        return "\n".join([*(step.line() for step in self.steps), self.verdict()])

    def verdict(self) -> str:
        """Sum it up in one line."""
        if self.ok:
            return f"{self.address} is fit for checkpoints"
        if self.setting:
            return f"{self.address} is fit with {self.setting}: set it wherever jobs, MLflow and replicas run"
        failed = ", ".join(step.name for step in self.steps if not step.ok)
        return f"{self.address} is not fit for checkpoints: {failed}"


def check(address: str) -> Report:
    """Try a storage, and again with `SETTING` where that may cure it.

    Args:
        address: as `--storage` of a job takes it: a folder, s3://bucket/folder or gs://bucket/folder.

    Raises:
        ValueError: the address is not understood.
    """
    shown = re.sub("//[^/@]*@", "//***@", address)  # s3://KEY:SECRET@bucket is an address too
    report = Report(shown, _examine(address))
    is_curable = address.startswith("s3://") and os.environ.get(CHECKSUMS) != "when_required"
    if report.ok or not is_curable or report.steps[0].name == "open":
        return report
    with _checksums_when_required():
        cured = all(step.ok for step in _examine(address))
    return replace(report, setting=SETTING if cured else "")


def _examine(address: str) -> tuple[Step, ...]:
    """Take all steps, or those up to the first whose error lets the next have no chance."""
    begin = time.monotonic()
    try:
        place = _Place(address)
    except OSError as error:
        return (_failed("open", begin, error),)
    steps = []
    try:
        for name, act in place.steps():
            steps.append(_take(name, act))
            if not steps[-1].ok and name.startswith("write"):
                break
    finally:
        steps.append(_take("delete", place.clear))
    return tuple(steps)


def _take(name: str, act: Callable[[], None]) -> Step:
    begin = time.monotonic()
    try:
        act()
    except (OSError, ValueError, UnfitError) as error:
        return _failed(name, begin, error)
    return Step(name, time.monotonic() - begin, True)


def _failed(name: str, begin: float, error: Exception) -> Step:
    said = " ".join(str(error).split())
    cause, cure = said, "correct the address, or mend what the message names"
    if isinstance(error, UnfitError):
        cause, cure = f"{said}: {_SUSPECT[0]}", _SUSPECT[1]
    for signs, meaning, remedy in _CURES:
        if not isinstance(error, UnfitError) and any(sign in said for sign in signs):
            cause, cure = f"{meaning} ({said})", remedy
            break
    return Step(name, time.monotonic() - begin, False, cause, cure)


class _Place:
    """A folder of the doctor's own below an address, and what is done there.

    Raises:
        ValueError: the address is not understood.
        OSError: the bucket is asked where it is, and does not answer; or the folder is not to be seen.
    """

    def __init__(self, address: str) -> None:
        local = "" if "://" in address else f"{Path(address).expanduser().absolute()}"
        try:
            self._fs, root = fs.FileSystem.from_uri(local or _impatient(address))
        except ValueError as error:
            raise ValueError(f"{address}: {error}") from error
        self._folder = f"{root.rstrip('/')}/gdl-ray-doctor-{uuid.uuid4().hex}"
        self._written: dict[str, bytes] = {}
        parents = [str(parent) for parent in Path(self._folder).parents][:-1]
        # Folders of a bucket come and go with what is in them, and pyarrow leaves marks of those above.
        self._new = [parent for parent in parents if not self._is_folder(parent)]

    def steps(self) -> Iterator[tuple[str, Callable[[], None]]]:
        """Name what to do, in this order; `clear` comes last."""
        files = {"1 B": 1, "100 B": 100, "11 MB in parts": _LARGE_BYTES}
        for name, count in files.items():
            file = f"{count}.bin"
            yield f"write {name}", lambda file=file, count=count: self._write(file, count)  # type: ignore[misc]
            yield f"read {name}", lambda file=file: self._read(file)  # type: ignore[misc]
        yield "read ranges", lambda: self._read_ranges(f"{_LARGE_BYTES}.bin")
        yield "write folders", self._write_tree
        yield "read folders", self._read_tree
        yield "list", self._list

    def clear(self) -> None:
        """Delete all of it, and the folders above that were not there before.

        Raises:
            UnfitError: something stays.
        """
        self._delete(self._folder)
        if left := self._found(self._folder):
            raise UnfitError(f"{len(left)} files are there after they were deleted, below {self._folder}")
        for parent in self._new:
            if self._is_folder(parent) and not self._fs.get_file_info(fs.FileSelector(parent)):
                self._delete(parent)

    def _delete(self, folder: str) -> None:
        if not self._is_folder(folder):
            return
        try:
            self._fs.delete_dir(folder)
        except OSError:
            if self._is_folder(folder):  # else nothing is wrong: Google Cloud has no folders to delete
                raise

    def _write(self, name: str, count: int) -> None:
        content = _content(name, count)
        path = f"{self._folder}/{name}"
        if not isinstance(self._fs, fs.S3FileSystem):  # which needs no folders, and keeps a mark of each
            self._fs.create_dir(path.rpartition("/")[0])
        with self._fs.open_output_stream(path) as stream:
            stream.write(content)
        self._written[name] = content

    def _read(self, name: str) -> None:
        with self._fs.open_input_stream(f"{self._folder}/{name}") as stream:
            _compare(name, stream.read(), self._written[name])

    def _read_ranges(self, name: str) -> None:
        content = self._written[name]
        ranges = ((1, 1), (len(content) // 2 - 3, 1000), (len(content) - 10, 10))
        with self._fs.open_input_file(f"{self._folder}/{name}") as file:
            for offset, count in ranges:
                got = file.read_at(count, offset)
                _compare(f"the range of {count} B from {offset} on", got, content[offset : offset + count])

    def _write_tree(self) -> None:
        for name, count in _TREE.items():
            self._write(f"tree/{name}", count)

    def _read_tree(self) -> None:
        """Copy the folders as a run does that takes up its checkpoint."""
        with tempfile.TemporaryDirectory(prefix="gdl-ray-") as scratch:
            fs.copy_files(f"{self._folder}/tree", scratch, self._fs, fs.LocalFileSystem())
            for name in _TREE:
                copy = Path(scratch, name)
                got = copy.read_bytes() if copy.exists() else b""
                _compare(name, got, self._written[f"tree/{name}"])

    def _list(self) -> None:
        names = {info.base_name for info in self._fs.get_file_info(fs.FileSelector(self._folder))}
        if "tree" not in names:
            raise UnfitError(f"the list of {self._folder} lacks its folder")
        found = self._found(self._folder)
        expected = {f"{self._folder}/{name}": len(content) for name, content in self._written.items()}
        for path, size in expected.items():
            if path not in found:
                raise UnfitError(f"the list lacks {path}")
            if found[path] != size:
                raise UnfitError(f"the list gives {path} {found[path]} bytes, {size} were written")
        if extra := found.keys() - expected.keys():
            raise UnfitError(f"the list has {min(extra)}, which nobody wrote")

    def _found(self, folder: str) -> dict[str, int]:
        """List the files below a folder, each with its size in bytes."""
        selector = fs.FileSelector(folder, recursive=True, allow_not_found=True)
        infos = self._fs.get_file_info(selector)
        return {info.path: info.size for info in infos if info.type == fs.FileType.File}

    def _is_folder(self, path: str) -> bool:
        return bool(self._fs.get_file_info(path).type == fs.FileType.Directory)


def _impatient(address: str) -> str:
    """Let an address of Google's give up soon where it does not say when."""
    if not address.startswith("gs://") or "retry_limit_seconds" in address:
        return address
    return f"{address}{'&' if '?' in address else '?'}retry_limit_seconds={_GCS_RETRY_S}"


def _content(name: str, count: int) -> bytes:
    """Make bytes that look like noise, which nothing on the way can compress, other ones for each name."""
    return hashlib.shake_128(name.encode()).digest(count)


def _compare(name: str, got: bytes, expected: bytes) -> None:
    if len(got) != len(expected):
        raise UnfitError(f"{name} comes back with {len(got)} bytes instead of {len(expected)}")
    sums = [hashlib.sha256(content).hexdigest()[:12] for content in (got, expected)]
    if sums[0] != sums[1]:
        raise UnfitError(f"{name} comes back altered, with sha256 {sums[0]} instead of {sums[1]}")


@contextmanager
def _checksums_when_required() -> Iterator[None]:
    before = os.environ.get(CHECKSUMS)
    os.environ[CHECKSUMS] = "when_required"
    try:
        yield
    finally:
        if before is None:
            del os.environ[CHECKSUMS]
        else:
            os.environ[CHECKSUMS] = before


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        0 when the storage is fit as it is; 2 when its address is not understood; 3 when it is not fit.
    """
    description, _, _ = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(prog="python -m infra doctor", description=description)
    parser.add_argument(
        "address", metavar="ADDRESS", help="a folder, s3://bucket/folder or gs://bucket/folder"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    asked = parser.parse_args(arguments)
    try:
        report = check(asked.address)
    except ValueError as error:
        print(f"python -m infra doctor: error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(_told(report), indent=2) if asked.json else report.text())
    return 0 if report.ok else 3


def _told(report: Report) -> dict[str, Any]:
    return {**asdict(report), "ok": report.ok, "verdict": report.verdict()}


if __name__ == "__main__":
    sys.exit(main())
