"""`python -m infra up|status|down|backup|restore`: the platform on this machine."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from infra import auth, local, settings
from infra.errors import PlatformError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb.

    Returns:
        0 when it is as asked; 1 when a part of it is not up, or cannot be had; 2 for what cannot be asked;
        130 after Ctrl-C.
    """
    parser = argparse.ArgumentParser(prog="python -m infra", description=local.__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="up|status|down|backup|restore")
    settings.add_options(verbs.add_parser("up", help="start what does not run yet"))
    verbs.add_parser("status", help="say what runs where; exit code 1 unless all of it is up")
    verbs.add_parser("down", help="end it all; data stay")
    copy = verbs.add_parser("backup", help="copy the registry, also while it is used")
    copy.add_argument("folder", type=Path, help="a new folder for it")
    fill = verbs.add_parser("restore", help="fill an empty registry with a backup")
    fill.add_argument("folder", type=Path, help="that `backup` has made")
    settings.add_options(fill)
    asked = parser.parse_args(arguments)
    try:
        return _VERBS[asked.verb](asked)
    except settings.SettingsError as error:
        parser.error(str(error))
    except PlatformError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; `python -m infra down` ends what was started", file=sys.stderr)
        return 130


def _up(asked: argparse.Namespace) -> int:
    home = local.home_dir()
    platform = local.up(home, _settings(asked))
    if platform.shell_file:
        print(f"\nFor `ray job submit` and MLflow's clients:  . {shlex.quote(str(platform.shell_file))}")
        print(f"In a browser, MLflow asks for: {auth.ADMIN}, and the password in {home / auth.PASSWORD_FILE}")
        print(f"Ray's dashboard asks for:      the token in {home / auth.TOKEN_FILE}")
    else:
        print(f"\nFor `ray job submit`:  export RAY_ADDRESS={platform.urls['ray']}")
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


def _status(_: argparse.Namespace) -> int:
    services = local.status(local.home_dir())
    print(f"{'service':<9}{'pid':<9}{'state':<14}address")
    for service in services:
        state = "up" if service.healthy else "no answer" if service.pid else "down"
        print(f"{service.name:<9}{service.pid or '-':<9}{state:<14}{service.url or '-'}")
    return 0 if all(service.healthy for service in services) else 1


def _down(_: argparse.Namespace) -> int:
    home = local.home_dir()
    ended = local.down(home)
    for name, count in ended.items():
        print(f"  {name:<7} ended      {count} process{'es' if count > 1 else ''}")
    print(f"  data stay in {home}" if ended else "  nothing was running")
    return 0


_VERBS = {"up": _up, "status": _status, "down": _down, "backup": _backup, "restore": _restore}


if __name__ == "__main__":
    sys.exit(main())
