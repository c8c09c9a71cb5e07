"""What doing a verb takes in every cloud: a step, the question before it, the programs that it calls."""

import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from infra.plan import Refused

LAUNCHER = {"ssh": "OpenSSH's client", "ssh-keygen": "OpenSSH's client", "rsync": "rsync"}
"""The programs that Ray's launcher calls, and what each comes with."""


@dataclass(frozen=True)
class Step:
    """Something that `up` is to do: what, in a line, and the call that does it."""

    what: str
    do: Callable[[], object]


def confirm(question: str, yes: bool) -> None:
    """Ask the person at the terminal, if there is need and one.

    Raises:
        Refused: The answer is no, or nobody is there to give one.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        raise Refused(f"nobody is there to ask {question!r}: give --yes to go on without")
    if input(f"{question} [y/N] ").strip().lower() not in ("y", "yes"):
        raise Refused("not confirmed: nothing was done")


def programs_missing(programs: Mapping[str, str]) -> list[str]:
    """Name the programs that are not on this machine, with what to do about it.

    Args:
        programs: By its name on the PATH, what each comes with.
    """
    return [
        f"{program} is not on this machine: install {what}"
        for program, what in programs.items()
        if shutil.which(program) is None
    ]
