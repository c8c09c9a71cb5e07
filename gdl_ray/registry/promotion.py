"""Promotion: moving an alias to a version, with a record of who did it, when and why, that can be undone.

A move is written down before it is made, as a tag of the registered model, and marked as made after. If the
process ends in between, the next move finds out from where the alias is whether it was made: nothing is lost.
"""

import getpass
import json
import math
import os
import secrets
import socket
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from gdl_ray.evaluate.metrics import METRICS, standard_error
from gdl_ray.registry.card import flat, spelled
from gdl_ray.registry.versions import OWN, VersionNotFound, look_up, registered
from gdl_ray.tracking import ask, tracking_uri

UNDER_WAY_S = 60.0
"""A move that was planned less long ago may yet be made by the process that planned it."""

_MOVE = f"{OWN}move."
_MEMORISED = "samples/memorised"


class PromotionError(Exception):
    """A move cannot be made, or results cannot be compared; the message says why, and what to do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Move:
    """A move of an alias."""

    alias: str
    before: int
    """The version that it named; 0 for none."""
    to: int
    why: str
    by: str
    """Who asked for it, as user@machine."""
    at: str
    """UTC, to the millisecond."""
    state: Literal["planned", "made", "dropped"] = "planned"
    undoes: str = ""
    """Key of the move that this one undoes; empty if it is no rollback."""
    metric: str = ""
    """What the versions were compared by; empty if by nothing."""
    values: tuple[float, ...] = ()
    """Of the metric: of the version before, and of the new one."""
    key: str = ""
    """Names the move among those of its model."""


def newest(name: str) -> int:
    """Find the newest version of a registered model of any kind.

    Raises:
        VersionNotFound: if there is no such model, or it has none.
        RegistryUnavailable: if the server does not answer.
    """
    versions = ask(MlflowClient(tracking_uri()).search_model_versions, f"name='{name}'")
    found = max((int(each.version) for each in versions), default=0)
    if not found:
        raise _unknown(name)
    return found


def _unknown(name: str) -> VersionNotFound:
    known = ", ".join(sorted(registered())) or "none yet"
    return VersionNotFound(f"no model {name!r} is registered: choose from {known}")


def alias_of(name: str, alias: str) -> int:
    """Find the version that an alias names; 0 if it names none.

    Raises:
        VersionNotFound: if there is no such model.
        RegistryUnavailable: if the server does not answer.
    """
    return int(_model(name).aliases.get(alias, 0))


def move(
    name: str,
    alias: str,
    version: int,
    why: str,
    metric: str = "",
    values: tuple[float, ...] = (),
    undoes: str = "",
    expected: int | None = None,
) -> Move | None:
    """Move an alias to a version, and write down why; None if it is there already.

    What killed processes have left is settled.

    Args:
        name: of the registered model.
        alias: to move.
        version: where it is to be.
        why: in words.
        metric: what the versions were compared by.
        values: of the metric: of the version before, and of the new one.
        undoes: the move that this one undoes.
        expected: where the alias was when this was decided, 0 for nowhere; None to move it from anywhere.

    Raises:
        VersionNotFound: if there is no such version.
        PromotionError: if the alias is not where it is expected, or MLflow does not take it.
        RegistryUnavailable: if the server does not answer.
    """
    look_up(name, version)
    _settle_all(name)
    before = alias_of(name, alias)
    if expected is not None and before != expected:
        raise PromotionError(
            f"{name}'s {alias} was version {expected or 'none'} when this move was decided, and is "
            f"{before or 'none'} now: somebody else has moved it; see --history, and decide again"
        )
    if before == version:
        return None
    now = datetime.now(UTC)
    planned = Move(
        alias=alias,
        before=before,
        to=version,
        why=why,
        by=_who(),
        at=now.isoformat(timespec="milliseconds"),
        undoes=undoes,
        metric=metric,
        values=values,
        key=f"{int(now.timestamp() * 1000):013d}-{secrets.token_hex(2)}",
    )
    _write(name, planned)
    try:
        ask(MlflowClient(tracking_uri()).set_registered_model_alias, name, alias, str(version))
    except MlflowException as error:
        _write(name, replace(planned, state="dropped"))
        raise PromotionError(f"--to {alias}: {error.message}") from error
    return _settle(name, planned, version)


def history(name: str) -> list[Move]:
    """List the moves of a model's aliases, the oldest first.

    Raises:
        VersionNotFound: if there is no such model.
        RegistryUnavailable: if the server does not answer.
    """
    return _moves(_model(name))


def _moves(model: Any) -> list[Move]:
    keys = sorted(key for key in model.tags if key.startswith(_MOVE))
    return [_read(key.removeprefix(_MOVE), model.tags[key]) for key in keys]


def last_to_undo(name: str, alias: str) -> Move:
    """Find the move that a rollback undoes: the last one that was made and is not undone.

    What killed processes have left is settled.

    Raises:
        PromotionError: if there is none, the alias is not where it left it, or another move is under way.
        VersionNotFound: if there is no such model.
        RegistryUnavailable: if the server does not answer.
    """
    _settle_all(name)
    stack = _not_undone([each for each in history(name) if each.alias == alias])
    now = alias_of(name, alias)
    if not stack:
        raise PromotionError(f"no move of {name}'s {alias} is left to undo")
    last = stack[-1]
    if last.to != now:
        raise PromotionError(
            f"{name}'s {alias} is version {now or 'none'}, and the last recorded move took it to {last.to}: "
            f"it was moved by other means; name its place, as jobs.promote {name}@{last.before or last.to}"
        )
    if not last.before:
        raise PromotionError(
            f"version {last.to} is the first {alias} of {name}, and there is none to go back to: "
            f"name another, as jobs.promote {name}@NUMBER"
        )
    return last


def _not_undone(moves: Sequence[Move]) -> list[Move]:
    """List the moves of one alias that were made and are not undone, the oldest first."""
    stack: list[Move] = []
    for each in moves:
        if each.state == "planned":
            raise PromotionError(
                f"a move of {each.alias} from {each.before or 'none'} to {each.to} began at {each.at} and "
                f"may be under way: try again in a minute"
            )
        if each.state == "made" and each.undoes:
            stack = [move for move in stack if move.key != each.undoes]
        elif each.state == "made":
            stack.append(each)
    return stack


def compare(
    metric: str, margin: float, current: Mapping[str, Any] | None, candidate: Mapping[str, Any]
) -> tuple[bool, str, tuple[float, ...]]:
    """Compare the evaluations of two versions. One whose samples are copies is never better.

    Args:
        metric: one of METRICS, with a standard error in both records.
        margin: standard errors of the difference that the candidate must be better by, 0 or more. The errors
            count as independent, so that versions measured on the same examples are judged with caution.
        current: record of the version that the alias names; None if it names none, and any is better.
        candidate: record of the version that may take its place.

    Returns:
        Whether the candidate is better by the margin, why in words, and both values, the current one first;
        no values where none were compared.

    Raises:
        PromotionError: if the results do not compare.
    """
    better = direction(metric)
    if candidate["metrics"].get(_MEMORISED):
        return False, f"its samples are copies of training images ({_MEMORISED} is 1)", ()
    new, new_error = _value(metric, candidate, "new")
    if current is None:
        return True, f"there was none to compare it with by {metric}", ()
    _check_protocols(current, candidate)
    old, old_error = _value(metric, current, "current")
    gain = new - old if better == "higher" else old - new
    error = math.hypot(old_error, new_error)
    is_better = gain > margin * error
    values = f"{metric} {spelled(new, new_error)} against {spelled(old, old_error)} ({better} is better)"
    need = f"{margin:g} standard errors of the difference, {margin * error:.2g}"
    return is_better, f"{values}: better by {gain:.3g}, and it must be by more than {need}", (old, new)


def direction(metric: str) -> Literal["higher", "lower"]:
    """Tell which of two values of a metric is better.

    Raises:
        PromotionError: if there is no such metric, or both of its ends are bad.
    """
    better = METRICS[metric].better if metric in METRICS else "neither"
    if better == "neither":
        known = ", ".join(name for name, each in METRICS.items() if each.better != "neither")
        raise PromotionError(f"--if-better {metric} is not known to be better one way: choose from {known}")
    return better


def _check_protocols(current: Mapping[str, Any], candidate: Mapping[str, Any]) -> None:
    before, now = set(flat(current["protocol"])), set(flat(candidate["protocol"]))
    if before == now and current["protocol_digest"] == candidate["protocol_digest"]:
        return
    old, new = (dict(field.split("=", 1) for field in fields) for fields in (before - now, now - before))
    fields = [f"{name}: {old.get(name, '-')}, then {new.get(name, '-')}" for name in sorted(old | new)]
    raise PromotionError(
        f"results of different protocols do not compare ({'; '.join(fields) or 'their digests differ'}): "
        f"evaluate both versions in the same way"
    )


def _value(metric: str, record: Mapping[str, Any], which: str) -> tuple[float, float]:
    """Read a metric and its standard error."""
    metrics = record["metrics"]
    if metric in metrics and standard_error(metric) in metrics:
        return metrics[metric], metrics[standard_error(metric)]
    lacks = "only its value, and no standard error to judge by" if metric in metrics else "no value of it"
    known = ", ".join(_comparable(metrics)) or "nothing, as none of its metrics has a standard error"
    raise PromotionError(f"--if-better {metric}: the {which} version has {lacks}; choose from {known}")


def _comparable(metrics: Mapping[str, float]) -> list[str]:
    """List the metrics that versions can be compared by: those with a direction and a standard error."""
    known = (name for name, each in METRICS.items() if each.better != "neither")
    return [name for name in known if name in metrics and standard_error(name) in metrics]


def _model(name: str) -> Any:
    try:
        return ask(MlflowClient(tracking_uri()).get_registered_model, name)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            raise _unknown(name) from error
        raise


def _settle_all(name: str) -> None:
    """Settle the moves that killed processes have left planned; those that may be under way stay.

    The next move of the same alias tells where it was by then; after the last one, the alias does.
    """
    model = _model(name)
    latest = datetime.now(UTC) - timedelta(seconds=UNDER_WAY_S)
    was_at = {alias: int(version) for alias, version in model.aliases.items()}
    for each in reversed(_moves(model)):
        if each.state == "planned" and datetime.fromisoformat(each.at) <= latest:
            _settle(name, each, was_at.get(each.alias, 0))
        was_at[each.alias] = each.before


def _settle(name: str, planned: Move, now: int) -> Move:
    """Mark a planned move as made if the alias was then where it was to go, and as dropped if not."""
    settled = replace(planned, state="made" if now == planned.to else "dropped")
    if settled.state == "made":
        reason = f"{planned.at} by {planned.by}, from {planned.before or 'none'}: {planned.why}"
        tag = f"{OWN}promoted.{planned.alias}"
        ask(MlflowClient(tracking_uri()).set_model_version_tag, name, str(planned.to), tag, reason)
    _write(name, settled)
    return settled


def _write(name: str, record: Move) -> None:
    fields = asdict(record)
    key = fields.pop("key")
    ask(MlflowClient(tracking_uri()).set_registered_model_tag, name, f"{_MOVE}{key}", json.dumps(fields))


def _read(key: str, text: str) -> Move:
    fields = json.loads(text)
    return Move(**{**fields, "values": tuple(fields["values"]), "key": key})


def _who() -> str:
    try:
        user = os.environ.get("MLFLOW_TRACKING_USERNAME") or getpass.getuser()
    except (KeyError, OSError):  # a container may run as a number without a name
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"
