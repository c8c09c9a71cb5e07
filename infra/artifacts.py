"""The files that MLflow keeps beside its database, in a folder or a bucket: listed, copied, summed up."""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pyarrow import fs  # type: ignore[import-untyped]

from infra.errors import PlatformError

_CHUNK_BYTES = 2**22
_COPIES_AT_A_TIME = 8


class Files:
    """All files under a folder, or under a folder of a bucket, by their path from there.

    Args:
        address: a folder, or s3://BUCKET/FOLDER, perhaps with ?endpoint_override=HOST:PORT&scheme=http.

    Raises:
        PlatformError: The bucket is not there, or does not answer.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        try:
            if "://" not in address:
                self._fs, self._root = fs.LocalFileSystem(), str(Path(address).absolute())
                return
            self._fs, self._root = fs.FileSystem.from_uri(address)
            bucket = self._root.partition("/")[0]
            is_there = self._fs.get_file_info(bucket).type != fs.FileType.NotFound
        except OSError as error:
            raise PlatformError(f"--artifacts {address} cannot be used: {error}") from error
        if not is_there:
            raise PlatformError(f"--artifacts {address}: there is no bucket {bucket}; make it first")

    def names(self) -> list[str]:
        """List the files."""
        selector = fs.FileSelector(self._root, recursive=True, allow_not_found=True)
        found = self._fs.get_file_info(selector)
        return sorted(each.path[len(self._root) + 1 :] for each in found if each.type == fs.FileType.File)

    def sha256(self, name: str) -> str:
        """Compute the sum of a file, in hexadecimal."""
        digest = hashlib.sha256()
        with self._fs.open_input_stream(self._path(name)) as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                digest.update(chunk)
        return digest.hexdigest()

    def copy(self, names: Sequence[str], target: "Files") -> dict[str, str]:
        """Copy files to another place, and read them back from there.

        Returns:
            The sum of each file, as it was read here.

        Raises:
            PlatformError: What was read back is not what was written.
            OSError: A file cannot be read or written.
        """
        with ThreadPoolExecutor(_COPIES_AT_A_TIME) as pool:
            return dict(zip(names, pool.map(lambda name: self._copy(name, target), names), strict=True))

    def _copy(self, name: str, target: "Files") -> str:
        digest = hashlib.sha256()
        place = target._path(name)
        if isinstance(target._fs, fs.LocalFileSystem):  # a bucket has no folders to make
            Path(place).parent.mkdir(parents=True, exist_ok=True)
        with (
            self._fs.open_input_stream(self._path(name)) as source,
            target._fs.open_output_stream(place) as sink,
        ):
            while chunk := source.read(_CHUNK_BYTES):
                digest.update(chunk)
                sink.write(chunk)
        if target.sha256(name) != digest.hexdigest():
            raise PlatformError(f"{target.address} gives back {name} other than it was written")
        return digest.hexdigest()

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"
