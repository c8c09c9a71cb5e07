"""Fixtures for the tests of Google Cloud: an empty project, and the stacks that are put into it."""

import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from infra import gcloud as gcloud_module
from infra import gcp
from infra.folder import Folder
from infra.local import PROJECT
from infra.stack import Head, Stack, load
from tests.infra.gcp_project import Project


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """An empty project, and a machine on which nothing is known of any stack.

    The fake gcloud runs in this process, ten times as fast; `test_gcloud_is_a_command` starts it as one.
    """
    stub = tmp_path / "bin" / "gcloud"
    stub.parent.mkdir()
    fake = Path(__file__).with_name("fake_gcloud.py")
    stub.write_text(f'#!/bin/sh\nexec {sys.executable} -S {fake} "$@"\n')
    stub.chmod(0o755)
    for name in ("rsync", "ssh"):  # that they are there is all that is asked of them
        stub.with_name(name).symlink_to("/bin/true")
    monkeypatch.setenv("PATH", f"{stub.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_GCLOUD", str(tmp_path / "project"))
    monkeypatch.setenv("GDL_RAY_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(Folder, "pack", _pack)
    empty = Project(tmp_path / "project")
    monkeypatch.setattr(gcloud_module, "subprocess", SimpleNamespace(run=empty.run, DEVNULL=None))
    return empty


def _pack(self: Folder) -> str:
    """Stand in for building a wheel, which test_folder.py does."""
    self.code.mkdir(exist_ok=True)
    return "c0de"


@pytest.fixture
def rays(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """What Ray's launcher would be told; it needs Google's own API."""
    told: list[tuple[str, ...]] = []

    def ray(*words: str) -> int:
        told.append(words)
        return 0

    monkeypatch.setattr(gcp, "_ray", ray)
    return told


@pytest.fixture
def cluster() -> Stack:
    return load(PROJECT / "infra" / "examples" / "gcp.stack.yaml")


@pytest.fixture
def machine(cluster: Stack) -> Stack:
    """A stack of one machine, with a GPU."""
    return replace(cluster, workers=(), head=Head(type="g2-standard-8"))
