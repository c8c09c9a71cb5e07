"""Where the checkpoints of a run are kept: a folder of this machine, or of a bucket by an address like s3://...

    run.json                        what was asked for, and the id of the MLflow run
    step-00000250-1938f3a2c41/      a checkpoint; one without a manifest is half written, and passed over
        score.json                  how it was validated, where that was done after it was saved

What is in the store is all that a run needs to go on: on other workers, by another driver, after a power cut.
"""

import json
import math
import os
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pyarrow import fs  # type: ignore[import-untyped]

from gdl_ray.train.checkpoint import MANIFEST, DamagedCheckpointError, verify
from gdl_ray.train.snapshot import Snapshot

_COUNTERS = "resume/counters.json"
_SCORE_FILE = "score.json"
_CHUNK_BYTES = 2**24
_PATIENCE_S = 600.0  # how long a run that starts or ends waits for a store that does not answer
_RETRY_S = 2.0

T = TypeVar("T")


@dataclass(frozen=True, order=True, slots=True)
class Saved:
    """A checkpoint in the store; they are ordered by time."""

    step: int
    name: str
    evaluated: bool
    """Whether it was validated and sampled, as all are but those saved in haste before an interruption."""
    score: float
    """Validation score, lower is better; infinite where there is none."""


class Store:
    """The checkpoints of one run, or other files that belong together.

    Args:
        address: a folder, or an address that pyarrow knows: s3://bucket/folder, with
            ?endpoint_override=HOST:PORT&scheme=http for servers other than Amazon's, gs://bucket/folder.

    Raises:
        ValueError: if the address is not understood.
        OSError: if a bucket is asked where it is, and does not answer.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        try:
            self._fs, self._root = fs.FileSystem.from_uri(address)
        except ValueError as error:
            raise ValueError(f"{address}: {error}") from error
        self._is_local = isinstance(self._fs, fs.LocalFileSystem)

    def read(self, name: str) -> bytes | None:
        """Read a file; None if it is not there."""
        if not self._exists(name):
            return None
        with self._fs.open_input_stream(self.path(name)) as stream:
            content: bytes = stream.read()
        return content

    def write(self, name: str, content: bytes) -> None:
        """Write a file, whole or not at all: an object of a bucket is so by itself."""
        if not self._is_local:
            with self._fs.open_output_stream(self.path(name)) as stream:
                stream.write(content)
            return
        place = Path(self.path(name))
        with _written(place, content) as new:
            new.replace(place)

    def write_first(self, name: str, content: bytes) -> None:
        """Write a file unless it is there, where the storage can do that in one step.

        Buckets and some mounts cannot: there, of those who write at the same time, the last one's stays. So
        read it again to see whose it is.
        """
        place = Path(self.path(name))
        if not self._is_local:
            self.write(name, content)
            return
        with _written(place, content) as new:
            try:
                os.link(new, place)
            except FileExistsError:
                return
            except OSError:  # a mount without links
                new.replace(place)

    def read_json(self, name: str) -> Any:
        """Read a JSON file; None if it is not there."""
        content = self.read(name)
        return None if content is None else json.loads(content)

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file, whole or not at all."""
        self.write(name, json.dumps(value, indent=2).encode())

    def create(self) -> None:
        """Make the folder of the run; a bucket needs none."""
        if self._is_local:
            Path(self._root).mkdir(parents=True, exist_ok=True)

    def saved(self) -> list[Saved]:
        """List the checkpoints that were written to their end, in the order of time."""
        names = [name for name in self._folders() if self._exists(f"{name}/{MANIFEST}")]
        return sorted(found for name in names if (found := self._describe(name)))

    def last(self) -> Saved | None:
        """Find the checkpoint to go on from: the last one whose every file is whole; says which are not."""
        whole = filter(self._is_whole, sorted(self._folders(), reverse=True))
        name = next(whole, None)
        return self._describe(name) if name else None

    def best(self) -> Saved | None:
        """Find the checkpoint to register, and say which are damaged.

        Of those whose every file is whole, the best by validation, or the last where there is no score.
        """
        saved = self.saved()
        while found := _best(saved):
            if self._is_whole(found.name):
                return found
            saved.remove(found)
        return None

    @contextmanager
    def open(self, name: str) -> Iterator[Path]:
        """Have a checkpoint in a local folder meanwhile.

        Raises:
            DamagedCheckpointError: if it is incomplete or altered.
        """
        with self._local(name) as folder:
            verify(folder)
            yield folder

    def _is_whole(self, name: str) -> bool:
        """Tell whether a checkpoint is what its manifest says; says so if not."""
        try:
            with self.open(name):
                return True
        except DamagedCheckpointError as error:
            print(f"{error}; it is passed over", file=sys.stderr, flush=True)
            return False

    def save(self, snapshot: Snapshot, keep: int) -> Saved:
        """Keep a checkpoint, with the last `keep - 1` before it and the best; delete the rest.

        Raises:
            OSError: if it cannot be written; nothing is deleted then.
        """
        # A step that is repeated after a failure is another, later folder: the first may be half written.
        name = f"step-{snapshot.step:08d}-{time.time_ns() // 10**6:x}"
        try:
            self._write(name, snapshot)
        except BaseException:
            self._delete(name)
            raise
        self._prune(keep, name)
        found = self._describe(name)
        if found is None:
            raise OSError(f"{self.path(name)} vanished while it was saved")
        return found

    def rate(self, saved: Saved, score: float) -> None:
        """Write down the validation score of a checkpoint that was saved without one."""
        self.write_json(f"{saved.name}/{_SCORE_FILE}", score)

    def _write(self, name: str, snapshot: Snapshot) -> None:
        if self._is_local:
            # Not made anew: what has vanished may be a mount, and what is written below it would vanish too.
            if not Path(self._root).is_dir():
                raise FileNotFoundError(f"{self._root} is gone")
            snapshot.write(Path(self.path(name)))
            return
        with tempfile.TemporaryDirectory(prefix="gdl-ray-") as scratch:
            folder = Path(scratch) / name
            snapshot.write(folder)
            self._mark(folder, name)
            files = [path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST]
            for path in [*files, folder / MANIFEST]:
                self._upload(path, f"{name}/{path.relative_to(folder).as_posix()}")

    def _mark(self, folder: Path, name: str) -> None:
        """Make the folders of a checkpoint on Google Cloud, which lists none but those that were made."""
        if not isinstance(self._fs, fs.GcsFileSystem):
            return
        names = [name, *(f"{name}/{path.relative_to(folder)}" for path in folder.rglob("*") if path.is_dir())]
        try:
            for each in names:
                self._fs.create_dir(self.path(each))
        except ValueError as error:  # there is no bucket, and pyarrow cannot make one
            raise OSError(f"{self.address}: {error}") from error

    def _upload(self, source: Path, name: str) -> None:
        with source.open("rb") as file, self._fs.open_output_stream(self.path(name)) as stream:
            shutil.copyfileobj(file, stream, _CHUNK_BYTES)

    @contextmanager
    def _local(self, name: str) -> Iterator[Path]:
        if self._is_local:
            yield Path(self.path(name))
            return
        with tempfile.TemporaryDirectory(prefix="gdl-ray-") as scratch:
            folder = Path(scratch) / name
            folder.mkdir()
            fs.copy_files(self.path(name), str(folder), self._fs, fs.LocalFileSystem())
            yield folder

    def _prune(self, keep: int, new: str) -> None:
        saved = self.saved()
        evaluated = [each for each in saved if each.evaluated]  # the last may be under validation still
        kept = {new, *(each.name for each in [*saved[-keep:], *evaluated[-1:], _best(saved)] if each)}
        for name in self._folders():
            if name not in kept:
                self._delete(name)

    def _folders(self) -> list[str]:
        found = self._fs.get_file_info(fs.FileSelector(self._root, allow_not_found=True))
        return [info.base_name for info in found if info.base_name.startswith("step-")]

    def _describe(self, name: str) -> Saved | None:
        """Read what a checkpoint says of itself; None if that is no sense."""
        try:
            counters = self.read_json(f"{name}/{_COUNTERS}")
            score = counters["score"]
            if score is None:
                score = self.read_json(f"{name}/{_SCORE_FILE}")
            return Saved(
                step=int(counters["step"]),
                name=name,
                evaluated=bool(counters["evaluated"]),
                score=math.inf if score is None else float(score),
            )
        except (ValueError, TypeError, KeyError):
            return None

    def _exists(self, name: str) -> bool:
        return bool(self._fs.get_file_info(self.path(name)).type == fs.FileType.File)

    def _delete(self, name: str) -> None:
        """Delete a folder as far as that can be done now; what remains is swept with the next save."""
        try:
            self._fs.delete_dir(self.path(name))
        except OSError:
            return

    def path(self, name: str) -> str:
        """Name the place of a file or folder on its file system."""
        return f"{self._root}/{name}"


@contextmanager
def _written(place: Path, content: bytes) -> Iterator[Path]:
    """Have a file beside a place, under a name that no other writer uses; nothing remains of it."""
    new = place.with_name(f".{place.name}-{uuid.uuid4().hex}.new")
    try:
        with new.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        yield new
    finally:
        new.unlink(missing_ok=True)


def _best(saved: list[Saved]) -> Saved | None:
    """Choose the best; of equals, the last."""
    evaluated = [each for each in saved if each.evaluated]
    return min(reversed(evaluated), key=lambda each: each.score) if evaluated else None


def patiently(read: Callable[[], T]) -> T:
    """Read from a store, and again while it does not answer.

    Raises:
        OSError: if it does not for ten minutes.
    """
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            return read()
        except OSError as error:
            if time.monotonic() > deadline:
                raise
            print(f"the storage does not answer ({error}); trying again", file=sys.stderr, flush=True)
            time.sleep(_RETRY_S)
