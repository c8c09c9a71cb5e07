"""The verbs for a stack in a cloud: what they print, for people or as JSON, and their exit codes."""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import yaml

from infra import placeholders
from infra.cluster import render, validate
from infra.folder import dump, folder_of
from infra.plan import Job, Plan, Status
from infra.stack import Stack, StackError

OK, USAGE, REFUSED, LEFTOVERS = 0, 2, 3, 4


class Cloud(Protocol):
    """A module that can do the verbs in one cloud; each raises `Refused` with cause and cure."""

    def plan(self, stack: Stack, job: Job | None = None) -> Plan:
        """Say what `up` would do; change nothing."""

    def up(self, stack: Stack, *, yes: bool, foundation_only: bool = False, restart: bool = False) -> None:
        """Make what there is as the stack says."""

    def status(self, stack: Stack) -> Status:
        """Say what there is."""

    def tunnel(self, stack: Stack) -> int:
        """Bring dashboard, MLflow and endpoints to loopback, until Ctrl-C; returns an exit code."""

    def down(self, stack: Stack, *, yes: bool, delete_data: bool = False) -> list[str]:
        """End it all; returns what is left."""

    def gc(self, *, regions: tuple[str, ...], expired: bool, yes: bool, project: str = "") -> list[str]:
        """End what stacks have left behind, in a project of Google's, after asking; returns what is left."""


def cloud_of(name: str) -> Cloud:
    """Find the module of a cloud; its libraries are read only then."""
    if name == "gcp":
        from infra import gcp

        return gcp
    from infra import aws

    return aws


def run(asked: argparse.Namespace, stack: Stack) -> int:
    """Do a verb on a stack in a cloud, or find leftovers of any.

    Returns:
        0; 3 where it is refused; 4 where something is otherwise than it should be, or left behind.

    Raises:
        Refused: The cloud does not do it.
        StackError: The stack cannot be rendered.
    """
    with only_the_answer(asked.json):
        done, lines, code = _VERBS[asked.verb](asked, stack)
    print(json.dumps(done, indent=2) if asked.json else "\n".join(lines), flush=True)
    return code


Answer = tuple[dict[str, Any], list[str], int]


def _plan(asked: argparse.Namespace, stack: Stack) -> Answer:
    plan = cloud_of(stack.cloud).plan(stack, asked.job)
    return asdict(plan), plan.lines(), REFUSED if plan.problems else OK


def _up(asked: argparse.Namespace, stack: Stack) -> Answer:
    cloud_of(stack.cloud).up(
        stack, yes=asked.yes, foundation_only=asked.foundation_only, restart=asked.restart
    )
    return {"up": stack.stack}, [f"{stack.stack} is as {asked.file} says"], OK


def _status(asked: argparse.Namespace, stack: Stack) -> Answer:
    status = cloud_of(stack.cloud).status(stack)
    return asdict(status), status.lines(), LEFTOVERS if status.drift or status.orphans else OK


def _tunnel(asked: argparse.Namespace, stack: Stack) -> Answer:
    try:
        code = cloud_of(stack.cloud).tunnel(stack)
    except KeyboardInterrupt:  # which is how it ends
        code = OK
    return {}, ["the tunnel is closed"], code


def _down(asked: argparse.Namespace, stack: Stack) -> Answer:
    done, lines, code = _left(cloud_of(stack.cloud).down(stack, yes=asked.yes, delete_data=asked.delete_data))
    if stack.storage.bucket != "auto":
        lines.append(f"your bucket {stack.storage.bucket} stays")
    elif not asked.delete_data:
        lines.append("the bucket with its data stays (--delete-data deletes it)")
    return done, lines, code


def _gc(asked: argparse.Namespace, stack: Stack) -> Answer:
    gc = cloud_of(stack.cloud).gc
    return _left(
        gc(regions=tuple(asked.regions), expired=not asked.all, yes=asked.yes, project=stack.project)
    )


def _left(leftovers: list[str]) -> Answer:
    lines = [f"left: {each}" for each in leftovers] or ["nothing is left"]
    return {"leftovers": leftovers}, lines, LEFTOVERS if leftovers else OK


def _render(asked: argparse.Namespace, stack: Stack) -> Answer:
    cluster = _placeholders(stack)
    return cluster, dump(cluster).splitlines(), OK


def _validate(asked: argparse.Namespace, stack: Stack) -> Answer:
    """Check a stack, as `load` has done already, by what is rendered from it."""
    problems = validate(_placeholders(stack))
    lines = [f"{asked.file}: {each}" for each in problems] or [f"{asked.file}: good"]
    return {"problems": problems}, lines, USAGE if problems else OK


def validate_file(file: Path, as_json: bool) -> int:
    """Check a cluster file, perhaps changed by hand."""
    try:
        cluster = yaml.safe_load(file.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise StackError(f"{file}: {' '.join(str(error).split())}") from error
    problems = validate(cluster) if isinstance(cluster, dict) else ["it is no mapping"]
    lines = [f"{file}: {each}" for each in problems] or [f"{file}: good"]
    print(json.dumps({"problems": problems}, indent=2) if as_json else "\n".join(lines))
    return USAGE if problems else OK


def _placeholders(stack: Stack) -> dict[str, Any]:
    folder = folder_of(stack)
    return render(stack, placeholders.facts(stack, folder))


@contextmanager
def only_the_answer(as_json: bool) -> Iterator[None]:
    """Send all else that is said, by commands that are run too, to the standard error if this is JSON."""
    if not as_json:
        yield
        return
    kept = os.dup(1)
    os.dup2(2, 1)  # for commands
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


_VERBS = {
    "plan": _plan,
    "up": _up,
    "status": _status,
    "tunnel": _tunnel,
    "down": _down,
    "gc": _gc,
    "render": _render,
    "validate": _validate,
}
