"""Where the project keeps what it makes on this machine, and how it keeps it whole."""

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def home(default: Path = Path(".gdl_ray")) -> Path:
    """Find the folder of datasets, runs and downloaded models: GDL_RAY_HOME where set, else `default`."""
    return Path(os.environ.get("GDL_RAY_HOME") or default).expanduser().absolute()


@contextmanager
def made_whole(folder: Path) -> Iterator[Path]:
    """Make a folder that appears under its name only when it is whole, replacing what was there.

    Yields:
        An empty folder to write to. If the body fails, nothing is left of it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        new = Path(scratch) / "new"
        new.mkdir()
        yield new
        try:
            if folder.exists():
                folder.rename(Path(scratch) / "old")
            new.rename(folder)
        except OSError:
            # Another process put its own there meanwhile; it is as good as this one.
            if not folder.exists():
                raise


def file_sha256(path: Path) -> str:
    """Compute the sha256 sum of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def bytes_sha256(content: bytes) -> str:
    """Compute the sha256 sum of bytes, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()
