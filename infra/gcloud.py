"""Google's own command: run it, read its JSON, and say of its errors what they mean and what helps.

It is what users of Google Cloud have and are logged in with; it checks its arguments before it asks anyone.
"""

import json
import re
import shutil
import subprocess
from typing import Any

from infra.plan import Refused

# What errors say, what is the matter and what helps; the first that fits is told.
_CURES = [
    (
        r"GPUS_ALL_REGIONS",
        "the project may have no more GPUs",
        "ask for more: console, IAM & Admin, Quotas, GPUS_ALL_REGIONS",
    ),
    (
        r"QUOTA_EXCEEDED|Quota '?\w+'? exceeded",
        "a quota is used up",
        "ask for more in this region: console, IAM & Admin, Quotas",
    ),
    (
        r"SERVICE_DISABLED|has not been used in project|it is disabled",
        "an API is not enabled",
        "`gcloud services enable compute.googleapis.com iam.googleapis.com iap.googleapis.com`",
    ),
    (
        r"PERMISSION_DENIED|does not have .*(permission|access)|Required '.*' permission",
        "it is not allowed",
        "ask for roles/editor",
    ),
    (r"active account|credentials|reauth|invalid_grant", "nobody is logged in", "`gcloud auth login`"),
    (r"RATE_EXCEEDED|RESOURCE_NOT_READY", "Google asks to wait", "try again in a minute"),
    (r"billing", "the project has no billing account", "link one in the console, under Billing"),
]
_NO_ROOM = re.compile(
    r"ZONE_RESOURCE_POOL_EXHAUSTED|does not have enough resources|UNSUPPORTED_OPERATION|currently unavailable"
)
# Words alone: the numbers 404 and 409 stand in project numbers and request ids too.
_ABSENT = re.compile(r"not found|notFound|NOT_FOUND|does not exist|could not be found", re.IGNORECASE)
_THERE = re.compile(r"already exists|alreadyExists|ALREADY_EXISTS|already own", re.IGNORECASE)


class GcloudError(Exception):
    """A command of gcloud has failed; the message is what it said."""

    @property
    def has_no_room(self) -> bool:
        """Tell whether the zone has no such machine now; another may."""
        return bool(_NO_ROOM.search(str(self)))

    @property
    def is_absent(self) -> bool:
        """Tell whether what was named is not there."""
        return bool(_ABSENT.search(str(self)))

    @property
    def is_there(self) -> bool:
        """Tell whether what was to be made is there already."""
        return bool(_THERE.search(str(self)))

    @property
    def zones_available(self) -> list[str]:
        """The zones that Google says have such machines now, as it sometimes does."""
        match = re.search(r"zonesAvailable['\"]?\s*[:=]\s*['\"]?([a-z0-9, -]+)", str(self))
        return re.findall(r"[a-z]+-[a-z]+\d+-[a-z]\b", match[1]) if match else []

    def refusal(self) -> Refused:
        """Say it in a line, with its cure."""
        said = " ".join(str(self).split())
        for pattern, what, cure in _CURES:
            if re.search(pattern, said, re.IGNORECASE):
                return Refused(f"Google Cloud: {what} ({said[:300]}): {cure}")
        return Refused(f"Google Cloud: {said[:500]}")


def gcloud(*words: str) -> Any:
    """Run a command and read its JSON; None where it says nothing.

    Raises:
        GcloudError: It fails.
        Refused: It is not installed.
    """
    command = [executable(), *words, "--format=json", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)  # noqa: S603
    if done.returncode:
        raise GcloudError(done.stderr.strip() or f"`{' '.join(command)}` ends with {done.returncode}")
    return json.loads(done.stdout) if done.stdout.strip() else None


def found(*words: str) -> Any:
    """Run a command that describes something; None where it is not there."""
    try:
        return gcloud(*words)
    except GcloudError as error:
        if error.is_absent:
            return None
        raise


def may_be_used(*words: str) -> bool:
    """Tell whether a command that changes nothing goes well."""
    try:
        gcloud(*words)
    except GcloudError:
        return False
    return True


def set_project() -> str:
    """Name the project that gcloud is set to.

    Raises:
        Refused: It is set to none.
    """
    project = gcloud("config", "get", "project")
    if not project:
        raise Refused("gcloud is set to no project: `gcloud config set project PROJECT`")
    return str(project)


def made(*words: str) -> Any:
    """Run a command that makes something; nothing is wrong if another has made it meanwhile."""
    try:
        return gcloud(*words)
    except GcloudError as error:
        if error.is_there:
            return None
        raise


def gone(*words: str) -> None:
    """Run a command that deletes something; nothing is wrong if it is gone."""
    try:
        gcloud(*words)
    except GcloudError as error:
        if not error.is_absent:
            raise


def executable() -> str:
    """Find gcloud.

    Raises:
        Refused: It is not installed.
    """
    path = shutil.which("gcloud")
    if path is None:
        raise Refused("gcloud is not on the PATH: install the Google Cloud CLI, and `gcloud auth login`")
    return path
