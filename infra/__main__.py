"""`python -m infra VERB`: the platform on this machine; with `-f stack.yaml`, a cluster in a cloud."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from infra import local, settings, verbs
from infra.errors import PlatformError
from infra.plan import JOB, Job, Refused
from infra.stack import Stack, StackError, load

_EPILOG = """\
exit codes:
  0  it is as asked
  1  a part of the local platform is not up
  2  what was asked cannot be; the message says what can
  3  the cloud refuses, or the plan does: permission, quota, capacity, budget, a job that never fits
  4  something is left behind, or otherwise than the stack file says
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb.

    Returns:
        What `--help` says of exit codes; 130 after Ctrl-C.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["doctor"]:
        from infra import doctor

        return doctor.main(arguments[1:])
    parser = _parser()
    asked = parser.parse_args(arguments)
    try:
        return _run(parser, asked)
    except (StackError, settings.SettingsError) as error:
        return _fail(asked, error, verbs.USAGE)
    except Refused as error:
        return _fail(asked, error, verbs.REFUSED)
    except PlatformError as error:
        return _fail(asked, error, 1)
    except KeyboardInterrupt:
        print(f"\ninterrupted; {_cure(asked)}", file=sys.stderr)
        return 130


def _cure(asked: argparse.Namespace) -> str:
    """Say how to end what was begun, of the stack that it was begun for and of no other."""
    if asked.file is None:
        return "`python -m infra down` ends what was started"
    return f"`python -m infra {asked.verb} -f {asked.file}` goes on, and `down -f {asked.file}` ends it all"


def _run(parser: argparse.ArgumentParser, asked: argparse.Namespace) -> int:
    if asked.verb == "validate" and asked.cluster:
        return verbs.validate_file(asked.cluster, asked.json)
    stack = load(asked.file) if asked.file else Stack(stack="local", cloud="local")
    if stack.cloud != "local":
        _refuse(parser, asked, _OF_LOCAL, "the platform on this machine: leave -f out")
        return verbs.run(asked, stack)
    if asked.verb not in _LOCAL:
        if asked.file:
            parser.error(f"{asked.verb} is for a cluster in a cloud, and {asked.file} says cloud: local")
        parser.error(f"{asked.verb} is for a cluster in a cloud: name its stack file by -f")
    _refuse(parser, asked, _OF_CLOUDS, "a cluster in a cloud: name its stack file by -f")
    return _LOCAL[asked.verb](asked)


def _refuse(
    parser: argparse.ArgumentParser, asked: argparse.Namespace, options: Sequence[str], meant: str
) -> None:
    """End with exit code 2 if an option is given that is meant for something else."""
    for option in options:
        if getattr(asked, option, None) is not None and getattr(asked, option) is not False:
            parser.error(f"--{option.replace('_', '-')} is for {meant}")


def _fail(asked: argparse.Namespace, error: Exception, code: int) -> int:
    if asked.json:
        print(json.dumps({"error": str(error)}, indent=2))
    for line in str(error).splitlines():
        print(f"error: {line}" if not line.startswith(" ") else line, file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    usual = argparse.ArgumentParser(add_help=False)
    usual.add_argument("-f", "--file", type=Path, help="stack file; left out, the platform on this machine")
    usual.add_argument("--json", action="store_true", help="answer as JSON")
    agree = argparse.ArgumentParser(add_help=False)
    agree.add_argument("-y", "--yes", action="store_true", help="do not ask")
    parser = argparse.ArgumentParser(
        prog="python -m infra",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_subparsers(dest="verb", required=True, metavar="VERB").add_parser
    plan = add("plan", parents=[usual], help="say what `up` would do and what it costs; change nothing")
    plan.add_argument("--job", type=_job, help=f"say too whether a job fits, such as {JOB}")
    up = add("up", parents=[usual, agree], help="start what does not run yet, and mend what has changed")
    up.add_argument("--foundation-only", action="store_true", help="make what nodes need, and no node")
    up.add_argument("--restart", action="store_true", help="restart Ray on the head, which ends its jobs")
    settings.add_options(up)
    add("status", parents=[usual], help="say what runs where, since when and at what cost")
    add("tunnel", parents=[usual], help="bring dashboard, MLflow and endpoints of a cluster to this machine")
    down = add("down", parents=[usual, agree], help="end it all; data stay")
    down.add_argument("--delete-data", action="store_true", help="delete the bucket too")
    _add_gc(
        add("gc", parents=[usual, agree], help="find and end what clusters have left behind past their time")
    )
    add("render", parents=[usual], help="show the cluster file of a stack, without asking the cloud")
    copy = add("backup", help="copy the registry of this machine's platform, also while it is used")
    copy.add_argument("folder", type=Path, help="a new folder for it")
    fill = add("restore", help="fill the empty registry of this machine's platform with a backup")
    fill.add_argument("folder", type=Path, help="that `backup` has made")
    settings.add_options(fill)
    for verb in (copy, fill):
        verb.set_defaults(file=None, json=False)
    check = add("validate", parents=[usual], help="check a stack file, or a cluster file")
    check.add_argument("cluster", type=Path, nargs="?", help="a cluster file of Ray")
    add("doctor", help="check that a bucket gives back what is written to it: doctor s3://bucket")
    return parser


def _add_gc(gc: argparse.ArgumentParser) -> None:
    gc.add_argument("--regions", nargs="+", default=[], help="where to look; left out, everywhere")
    gc.add_argument("--all", action="store_true", help="what runs too, of every stack in the account")


def _job(text: str) -> Job:
    try:
        return Job.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _up(asked: argparse.Namespace) -> int:
    with verbs.only_the_answer(asked.json):
        platform = local.up(local.home_dir(), _settings(asked))
    if asked.json:
        print(json.dumps(platform.urls, indent=2))
    else:
        print("", *platform.entrance, sep="\n")
    return 0


def _settings(asked: argparse.Namespace) -> settings.Settings:
    return settings.chosen(asked, local.Platform.load(local.home_dir()).settings)


def _backup(asked: argparse.Namespace) -> int:
    from infra import backup  # here and below, because what copies takes a while to import

    held = backup.backup(local.home_dir(), asked.folder.absolute())
    print(f"{asked.folder} holds {held}")
    return 0


def _restore(asked: argparse.Namespace) -> int:
    from infra import backup

    held = backup.restore(local.home_dir(), asked.folder.absolute(), _settings(asked))
    print(f"{asked.folder} is restored: {held}; `python -m infra up` starts the platform")
    return 0


def _status(asked: argparse.Namespace) -> int:
    services = local.status(local.home_dir())
    if asked.json:
        print(json.dumps([asdict(service) for service in services], indent=2))
    else:
        print(f"{'service':<9}{'pid':<9}{'state':<14}address")
        for service in services:
            state = "up" if service.healthy else "no answer" if service.pid else "down"
            print(f"{service.name:<9}{service.pid or '-':<9}{state:<14}{service.url or '-'}")
    return 0 if all(service.healthy for service in services) else 1


def _down(asked: argparse.Namespace) -> int:
    home = local.home_dir()
    ended = local.down(home)
    if asked.json:
        print(json.dumps({"ended": ended, "leftovers": []}, indent=2))
        return 0
    for name, count in ended.items():
        print(f"  {name:<7} ended      {count} process{'es' if count > 1 else ''}")
    print(f"  data stay in {home}" if ended else "  nothing was running")
    return 0


def _plan(asked: argparse.Namespace) -> int:
    """Say what `up` would start here; the machine is its own cluster."""
    steps = [f"start {each.name}" for each in local.status(local.home_dir()) if not each.healthy]
    if asked.json:
        print(json.dumps({"steps": steps}, indent=2))
    else:
        print("\n".join(steps or ["nothing to do: all of it is up"]))
    return 0


_LOCAL: dict[str, Callable[[argparse.Namespace], int]] = {
    "plan": _plan,
    "up": _up,
    "status": _status,
    "down": _down,
    "backup": _backup,
    "restore": _restore,
}
_OF_LOCAL = ("database", "artifacts", "auth")
_OF_CLOUDS = ("job", "foundation_only", "restart", "delete_data")


if __name__ == "__main__":
    sys.exit(main())
