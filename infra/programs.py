"""Programs of this machine that the verbs call: which are not there."""

import shutil
from collections.abc import Mapping

LAUNCHER = {"ssh": "OpenSSH's client", "ssh-keygen": "OpenSSH's client", "rsync": "rsync"}
"""The programs that Ray's launcher calls, and what each comes with."""


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
