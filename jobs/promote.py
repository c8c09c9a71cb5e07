"""Move an alias of a registered model to another version: by hand, if it is better, or back again.

python -m jobs.promote digits-vae --to champion --if-better samples/kernel_distance

The endpoint follows within seconds. Every move is written down, with who made it and why: `--history` shows
it, and `--rollback` undoes the last one; again, the one before.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from typing import Any

from gdl_ray import registry, tracking
from gdl_ray.registry import evaluations, promotion
from jobs.options import UsageError


def resolve(reference: str) -> tuple[str, int]:
    """Find the version that NAME, the newest, NAME@NUMBER or NAME@ALIAS means.

    Raises:
        UsageError: if there is none.
        VersionNotFound: if there is no such model or version.
        RegistryUnavailable: if MLflow does not answer.
    """
    name, _, which = reference.partition("@")
    if not which:
        return name, promotion.newest(name)
    if re.fullmatch(r"\d{1,9}", which, re.ASCII):
        if not registry.exists(name, int(which)):
            raise UsageError(f"{name} has no version {which}; the newest is {promotion.newest(name)}")
        return name, int(which)
    version = promotion.alias_of(name, which)
    if not version:
        raise UsageError(f"{name} has no alias {which!r}; its newest version is {promotion.newest(name)}")
    return name, version


def promote(reference: str, alias: str, metric: str, margin: float) -> int:
    """Move the alias to a version, if it is better where that is asked; returns the exit code."""
    name, version = resolve(reference)
    before = promotion.alias_of(name, alias)
    why, values = "by hand", tuple[float, ...]()
    if before == version:
        print(f"jobs.promote: {name}@{version} is {alias} already")
        return 0
    if metric:
        is_better, why, values = _compared(name, before, version, metric, margin)
        if not is_better:
            stays = f"{name}@{before} stays {alias}, not {version}"
            print(f"jobs.promote: {stays if before else f'{name}@{version} is not {alias}'}: {why}")
            return 1
    expected = before if metric else None
    promotion.move(name, alias, version, why, metric, values, expected=expected)
    print(f"jobs.promote: {name}@{version} is {alias}, after {before or 'none'}: {why}")
    return 0


def _compared(
    name: str, before: int, version: int, metric: str, margin: float
) -> tuple[bool, str, tuple[float, ...]]:
    digest = evaluations.common_protocol(name, before, version) if before else ""
    current = _evaluation(name, before, digest) if before else None
    return promotion.compare(metric, margin, current, _evaluation(name, version, digest))


def _evaluation(name: str, version: int, digest: str) -> dict[str, Any]:
    record = registry.read_evaluation(name, version, digest)
    if record is None:
        raise UsageError(
            f"{name}@{version} was never evaluated; do it first: python -m jobs.evaluate {name}@{version}"
        )
    return record


def roll_back(name: str, alias: str) -> int:
    """Undo the last move of an alias; returns the exit code."""
    last = promotion.last_to_undo(name, alias)
    why = f"undoes the move of {last.at} by {last.by}"
    promotion.move(name, alias, last.before, why, undoes=last.key, expected=last.to)
    print(f"jobs.promote: {name}@{last.before} is {alias} again, after {last.to}: {why}")
    return 0


def show(name: str) -> int:
    """Print every move of a model's aliases; returns the exit code."""
    moves = promotion.history(name)
    for each in moves:
        dropped = "" if each.state == "made" else f" ({each.state})"
        print(
            f"{each.at}  {each.alias}  {each.before or 'none'} -> {each.to}{dropped}  {each.by}  {each.why}"
        )
    if not moves:
        print(f"jobs.promote: no move of {name}'s aliases is recorded")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jobs.promote",
        description="Move an alias of a registered model to another version.",
        epilog="Exit codes: 0 the alias is where it was asked to be, 1 the version is not better, 2 usage.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("model", help="registered model: NAME for its newest version, NAME@3 for a version, NAME@ALIAS")
    add("--to", default=registry.CHAMPION, help="alias to move (default: champion, which is served)")
    add("--if-better", default="", metavar="METRIC", help="only if better by this metric of its evaluation")
    add(
        "--margin",
        type=float,
        default=2.0,
        help="with --if-better: by more than so many standard errors of the difference (default: 2)",
    )
    add("--rollback", action="store_true", help="undo the last move of the alias; again, the one before")
    add("--history", action="store_true", help="show what was moved, when, by whom and why")
    return parser


def _run(given: argparse.Namespace) -> int:
    if given.rollback + given.history + bool(given.if_better) > 1:
        raise UsageError("--if-better, --rollback and --history ask for different things: give one of them")
    if not given.margin >= 0:
        raise UsageError(f"--margin {given.margin:g} must be 0 or more standard errors")
    if (given.rollback or given.history) and "@" in given.model:
        name = given.model.partition("@")[0]
        raise UsageError(f"{given.model}: --rollback and --history take a model's name alone, {name}")
    if given.if_better:
        promotion.direction(given.if_better)
    tracking.check()
    if given.rollback:
        return roll_back(given.model, given.to)
    if given.history:
        return show(given.model)
    return promote(given.model, given.to, given.if_better, given.margin)


def main(arguments: Sequence[str]) -> int:
    """Run the job; returns its exit code: 1 if the version is not better, 2 if it cannot be done."""
    given = _parser().parse_args(arguments)
    try:
        return _run(given)
    except (
        UsageError,
        promotion.PromotionError,
        registry.VersionNotFound,
        registry.RegistryUnavailable,
    ) as error:
        print(f"jobs.promote: {error}", file=sys.stderr)
        return 2
    except tracking.Refusal as error:
        print(f"jobs.promote: MLflow refuses: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
