"""Saving in the background: training goes on while checkpoints are written, and while they cannot be."""

import threading
import time
from collections.abc import Callable

from safetensors import SafetensorError

from gdl_ray.train.snapshot import Snapshot

_PATIENCE_S = 600.0  # how long the end of training waits for a store that is away
_FIRST_RETRY_S = 1.0
_LAST_RETRY_S = 30.0
_WAITING = 2  # snapshots beside the one that is being written, each the size of a model with its optimizer


class StorageError(Exception):
    """The store was away for too long."""


class Saver:
    """Hands snapshots to a store, one after the other, in a thread of its own.

    While the store refuses them, it says so, tries again, and holds on to the newest and the best alone.

    Args:
        save: keeps one snapshot; raises OSError if it cannot.
        say: prints a line.
    """

    def __init__(self, save: Callable[[Snapshot], object], say: Callable[[str], None] = print) -> None:
        self._save = save
        self._say = say
        self._waiting: list[Snapshot] = []
        self._writing: Snapshot | None = None
        self._failed = 0  # attempts in a row
        self._error: Exception | None = None  # what is no fault of the store
        self._changed = threading.Condition()
        threading.Thread(target=self._work, name="saver", daemon=True).start()

    def submit(self, snapshot: Snapshot) -> None:
        """Take a snapshot; waits only while two are waiting already and the store works."""
        with self._changed:
            self._changed.wait_for(lambda: self._error or self._failed or len(self._waiting) < _WAITING)
            self._raise_error()
            self._waiting.append(snapshot)
            if self._failed:
                self._drop_superseded()
            self._changed.notify_all()

    def settle(self) -> None:
        """Wait until all is saved, or cannot be for now."""
        with self._changed:
            self._changed.wait_for(lambda: self._error or self._failed or not self._waiting)
            self._raise_error()

    def drain(self, limit_s: float = _PATIENCE_S) -> None:
        """Wait until all is saved.

        Raises:
            StorageError: if it is not in time.
        """
        with self._changed:
            is_over = self._changed.wait_for(lambda: self._error or not self._waiting, limit_s)
            self._raise_error()
            if not is_over:
                raise StorageError(
                    f"step {self._waiting[-1].step} could not be saved within {limit_s:.0f} s: "
                    f"submit the same command again when the storage is back"
                )

    def _raise_error(self) -> None:
        if self._error:
            raise self._error

    def _work(self) -> None:
        try:
            self._save_all()
        except Exception as error:  # raised again where somebody hears of it
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _save_all(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting)
                snapshot = self._writing = self._waiting[0]
            failure = self._attempt(snapshot)
            with self._changed:
                self._writing = None
                if failure:
                    self._failed += 1
                    self._drop_superseded()
                else:
                    self._failed = 0
                    self._waiting.remove(snapshot)
                    snapshot.release()
                self._changed.notify_all()
            if failure:
                self._tell_and_wait(snapshot, failure)

    def _attempt(self, snapshot: Snapshot) -> str:
        """Save; returns what went wrong."""
        try:
            self._save(snapshot)
        except (OSError, SafetensorError) as error:
            return str(error)
        if self._failed:
            self._say(f"step {snapshot.step}: checkpoints can be saved again")
        return ""

    def _tell_and_wait(self, snapshot: Snapshot, failure: str) -> None:
        if self._failed == 1:
            self._say(f"step {snapshot.step}: the checkpoint cannot be saved ({failure}); training goes on")
        time.sleep(min(_FIRST_RETRY_S * 2 ** (self._failed - 1), _LAST_RETRY_S))

    def _drop_superseded(self) -> None:
        """Keep the newest snapshot and the best one, and what is being written now."""
        best = min(reversed(self._waiting), key=lambda snapshot: snapshot.score)
        for snapshot in [each for each in self._waiting[:-1] if each not in (best, self._writing)]:
            self._waiting.remove(snapshot)
            snapshot.release()
