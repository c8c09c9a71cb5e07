"""Evaluations: what a version was measured to be under a written protocol, beside its run and on its page.

A record is a JSON object: `protocol`, an object that says how it was measured; `protocol_digest`, equal where
protocols are; `metrics`, values by name, each standard error under its metric's name and `_standard_error`.
A version has a record for each protocol; its tags, its card and its run's metrics are of the newest.
"""

import json
import logging
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from mlflow import MlflowClient

from gdl_ray.evaluate.metrics import METRICS, STANDARD_ERROR
from gdl_ray.registry import card
from gdl_ray.registry.versions import OWN, SCORES, VersionNotFound, look_up
from gdl_ray.tracking import (
    PATIENCE_S,
    RunFacts,
    ask,
    log_files,
    log_metrics,
    persist,
    read_file,
    run_facts,
    tracking_uri,
)

FOLDER = "evaluation"
"""Of the run's artifacts that an evaluation writes."""

_PROTOCOL = f"{OWN}protocol"  # tag of a version: digest of the protocol of its newest evaluation
_RUN_PROTOCOL = "protocol_digest"  # the same as a tag of its run, beside `dataset_digest`

log = logging.getLogger(__name__)


def run_of(name: str, version: int) -> RunFacts:
    """Look up the run that trained a version.

    Raises:
        VersionNotFound: if there is none, or it has no run.
        RegistryUnavailable: if the server does not answer.
    """
    run_id = look_up(name, version).run_id
    if not run_id:
        raise VersionNotFound(f"{name} version {version} was registered without a run")
    return run_facts(run_id)


def write_evaluation(name: str, version: int, record: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
    """Write an evaluation down as the version's newest; the same again changes nothing.

    The record comes last: where it is, all the rest is. Records of other protocols stay.

    Args:
        name: of the registered model.
        version: its number.
        record: as described above.
        files: pictures and tables that go with it, by name.

    Raises:
        VersionNotFound: if there is no such version, or it has no run.
        RegistryUnavailable: if the server does not answer for ten minutes.
    """
    persist(partial(_write, name, version, record, files), PATIENCE_S)


def _write(name: str, version: int, record: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
    run = run_of(name, version)
    before = read_evaluation(name, version)
    log_files(run.id, FOLDER, files)
    log_metrics(run.id, record["metrics"])
    MlflowClient(tracking_uri()).set_tag(run.id, _RUN_PROTOCOL, record["protocol_digest"])
    _tag(name, version, record, before)
    _refresh_card(name, version, record)
    text = json.dumps(record, indent=2, sort_keys=True)
    log_files(run.id, FOLDER, {_file(version, record["protocol_digest"]): text.encode()})


def _refresh_card(name: str, version: int, record: Mapping[str, Any]) -> None:
    text = card.with_numbers(look_up(name, version).description or "", card.evaluated(record))
    if len(text) > card.LIMIT:  # people have written much on it
        log.warning(
            "the card of %s version %d stays: with the new numbers it has %d characters, and MLflow keeps %d",
            name,
            version,
            len(text),
            card.LIMIT,
        )
        return
    MlflowClient(tracking_uri()).update_model_version(name, str(version), text)


def _tag(name: str, version: int, record: Mapping[str, Any], before: Mapping[str, Any] | None) -> None:
    """Have the version's tags say what its record does, and nothing of its former one."""
    client = MlflowClient(tracking_uri())
    wanted = {metric: repr(value) for metric, value in record["metrics"].items() if _is_tag(metric)}
    wanted[_PROTOCOL] = record["protocol_digest"]
    known = look_up(name, version).tags
    former = set(before["metrics"]) if before else set()
    for key in former & known.keys() - wanted.keys():
        client.delete_model_version_tag(name, str(version), key)
    for key, value in wanted.items():
        if known.get(key) != value:
            client.set_model_version_tag(name, str(version), key, value)


def _is_tag(metric: str) -> bool:
    """Whether a metric is written on the version: measured times differ from one evaluation to the next."""
    known = METRICS.get(metric.removesuffix(STANDARD_ERROR))
    return metric.startswith(SCORES) and (known is None or known.is_repeatable)


def read_evaluation(name: str, version: int, digest: str = "") -> dict[str, Any] | None:
    """Read a version's evaluation under a protocol; None where it has none.

    Args:
        name: of the registered model.
        version: its number.
        digest: of the protocol; empty for that of the newest evaluation.

    Raises:
        VersionNotFound: if there is no such version, or it has no run.
        RegistryUnavailable: if the server does not answer.
    """
    run = run_of(name, version)
    digest = digest or _newest(name, version)
    content = read_file(run.id, FOLDER, _file(version, digest)) if digest else None
    record: dict[str, Any] | None = None if content is None else json.loads(content)
    return record


def common_protocol(name: str, current: int, candidate: int) -> str:
    """Find the protocol to compare two versions by, of those that both were measured under.

    The candidate's newest comes first, then the current one's, then any.

    Returns:
        Its digest; empty if they have none in common.

    Raises:
        VersionNotFound: if there is no such version, or it has no run.
        RegistryUnavailable: if the server does not answer.
    """
    shared = _protocols(name, current) & _protocols(name, candidate)
    wanted = (_newest(name, candidate), _newest(name, current), *sorted(shared))
    return next((digest for digest in wanted if digest in shared), "")


def _protocols(name: str, version: int) -> set[str]:
    """List the digests of the protocols that a version has records of."""
    items = ask(MlflowClient(tracking_uri()).list_artifacts, run_of(name, version).id, FOLDER)
    pattern = f"{FOLDER}/{_file(version, '(.+)')}"
    return {found[1] for item in items if (found := re.fullmatch(pattern, item.path))}


def _newest(name: str, version: int) -> str:
    """Read under which protocol a version was measured last; empty if it never was."""
    return str(look_up(name, version).tags.get(_PROTOCOL, ""))


def _file(version: int, digest: str) -> str:
    return f"evaluation-v{version}-{digest}.json"
