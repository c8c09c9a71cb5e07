"""`python -m infra up|status|down`: the platform on this machine."""

import argparse
import sys
from collections.abc import Sequence

from infra import local


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb.

    Returns:
        0 when the platform is as asked; 1 when a part of it is not up; 130 after Ctrl-C.
    """
    parser = argparse.ArgumentParser(prog="python -m infra", description=local.__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="up|status|down")
    verbs.add_parser("up", help="start what does not run yet")
    verbs.add_parser("status", help="say what runs where; exit code 1 unless all of it is up")
    verbs.add_parser("down", help="end it all; data stay")
    verb = parser.parse_args(arguments).verb
    try:
        return {"up": _up, "status": _status, "down": _down}[verb]()
    except local.PlatformError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; `python -m infra down` ends what was started", file=sys.stderr)
        return 130


def _up() -> int:
    platform = local.up(local.home_dir())
    print(f"\nFor `ray job submit`:  export RAY_ADDRESS={platform.urls['ray']}")
    return 0


def _status() -> int:
    services = local.status(local.home_dir())
    print(f"{'service':<9}{'pid':<9}{'state':<14}address")
    for service in services:
        state = "up" if service.healthy else "no answer" if service.pid else "down"
        print(f"{service.name:<9}{service.pid or '-':<9}{state:<14}{service.url or '-'}")
    return 0 if all(service.healthy for service in services) else 1


def _down() -> int:
    home = local.home_dir()
    ended = local.down(home)
    for name, count in ended.items():
        print(f"  {name:<7} ended      {count} process{'es' if count > 1 else ''}")
    print(f"  data stay in {home}" if ended else "  nothing was running")
    return 0


if __name__ == "__main__":
    sys.exit(main())
