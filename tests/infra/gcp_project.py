"""A project of Google Cloud that is a file, as the tests of infra/gcp*.py set and read it."""

import json
import subprocess
import threading
from pathlib import Path
from typing import Any

from tests.infra import fake_gcloud

GPUS = {"metric": "NVIDIA_L4_GPUS", "limit": 8, "usage": 0}
SPOT = {"metric": "PREEMPTIBLE_NVIDIA_L4_GPUS", "limit": 8, "usage": 0}
ALL = {"metric": "GPUS_ALL_REGIONS", "limit": 16, "usage": 0}
ZONES = ["us-central1-a", "us-central1-b", "us-central1-c"]


class Project:
    """The project that the fake gcloud keeps."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._lock = threading.Lock()
        quotas = {"quotas": [GPUS, SPOT], "project_quotas": [ALL]}
        empty: dict[str, Any] = {"things": {}, "instances": [], "disks": [], "bindings": [], "told": []}
        empty |= {"zones": ZONES, "full": [], "available": "", "complaints": {}, "project": "my-project"}
        file.write_text(json.dumps(empty | quotas))

    @property
    def state(self) -> dict[str, Any]:
        """All of it."""
        state: dict[str, Any] = json.loads(self._file.read_text())
        return state

    def set(self, **values: Any) -> None:
        """Change some of it."""
        self._file.write_text(json.dumps(self.state | values))

    def run(self, command: list[str], **_: object) -> "subprocess.CompletedProcess[str]":
        """Stand in for `subprocess.run`."""
        with self._lock:
            state = self.state
            says, complains = fake_gcloud.main(command[1:], state)
            self._file.write_text(json.dumps(state))
        output = "" if says is None else json.dumps(says)
        return subprocess.CompletedProcess(command, int(bool(complains)), output, complains)

    @property
    def told(self) -> list[list[str]]:
        """The command lines so far."""
        told: list[list[str]] = self.state["told"]
        return told

    def changes(self) -> list[list[str]]:
        """The command lines that change something."""
        reading = {"describe", "describe-from-family", "list", "get-iam-policy", "print-access-token", "get"}
        return [words for words in self.told if not reading & set(words)]
