"""What the workers of a group agree on before they train."""

import shutil
from functools import partial
from pathlib import Path

import pytest

from gdl_ray.train.parallel import World
from gdl_ray.train.store import Store
from gdl_ray.train.worker import _last_checkpoint
from tests.train.test_loop import in_workers
from tests.train.test_store import snapshot


def choose(root: Path, world: World) -> None:
    """Write down which checkpoint a worker goes on from, by what it sees of the store."""
    saved = _last_checkpoint(Store(str(root / f"seen-by-{world.rank}")), world)
    (root / f"chosen-by-{world.rank}").write_text(str(saved.counters["step"]) if saved else "")


@pytest.mark.slow
def test_all_go_on_from_the_checkpoint_of_the_first_worker(tmp_path: Path) -> None:
    """A folder that nodes share may look newer from one of them."""
    (tmp_path / "seen-by-0").mkdir()
    first = Store(str(tmp_path / "seen-by-0"))
    first.save(snapshot(1), keep=9)
    shutil.copytree(tmp_path / "seen-by-0", tmp_path / "seen-by-1")
    Store(str(tmp_path / "seen-by-1")).save(snapshot(2), keep=9)
    in_workers(2, tmp_path, partial(choose, tmp_path))
    assert [(tmp_path / f"chosen-by-{rank}").read_text() for rank in range(2)] == ["1", "1"]
