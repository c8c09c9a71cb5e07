"""Runs in MLflow: an experiment per dataset, a run per training job, whose metrics outlive failures."""

import io
import json
import logging
import math
import os
import tempfile
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import Any
from urllib.parse import urlencode

# MLflow's own retries last minutes; who calls here knows better how long to wait.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # what people train is theirs to tell
# The job says itself, in a line, where the run and the model are.
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")

from mlflow import MlflowClient
from mlflow.entities import Dataset as LoggedDataset
from mlflow.entities import DatasetInput, InputTag, Metric, Param
from mlflow.exceptions import MlflowException, RestException
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NOTE
from PIL import Image
from requests import HTTPError, RequestException
from requests.exceptions import RetryError

from gdl_ray.data import Dataset
from gdl_ray.evaluate import metrics

logging.getLogger("mlflow").setLevel(logging.WARNING)

SAMPLES = "samples"
"""Key under which every run logs its sample grids."""
PARENT = "GDL_RAY_PARENT_RUN"
"""Environment variable that names the run which a job's own run is a child of."""

# MLflow 3 shows runs and their curves first, rather than traces of language models.
_TRAINING_PAGE = {"mlflow.experimentKind": "custom_model_development"}
_NOTE = f"""Runs on one dataset: every family's metrics have the same names, so that runs compare.

To compare, tick runs and choose *Compare*: its scatter plot sets one metric against another, such as \
`samples/frechet_distance` against `efficiency/samples_per_s_batch_64`. The images of a run are its samples, \
with the same seeds at every step. A standard error has its metric's name and `_standard_error`.

{metrics.table()}

`train/...` and `validation/...` are of the training itself: `validation/bits_per_dim`, lower is better, \
chooses the checkpoint of a run.
"""
_PICTURE_S = 60.0  # how long a picture may hold the metrics after it up
PATIENCE_S = 600.0  # how long the end of a run waits for a server that does not answer


class RegistryUnavailable(Exception):  # noqa: N818  (a state of the world, as QueueFull)
    """The MLflow server does not answer."""


Refusal = MlflowException
"""The MLflow server answers that it will not do it: to whom is not logged in, or may not."""


def tracking_uri() -> str:
    """Read where MLflow is from MLFLOW_TRACKING_URI.

    Raises:
        RegistryUnavailable: if it is not set.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if not uri:
        raise RegistryUnavailable(
            "MLFLOW_TRACKING_URI is not set; `python -m infra up` starts a server and sets it for jobs"
        )
    return uri


def check() -> None:
    """Ask whether the MLflow server answers.

    Raises:
        RegistryUnavailable: if not within five seconds.
    """
    uri = tracking_uri()
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=5):  # noqa: S310  (the user's own address)
            pass
    except (OSError, ValueError) as error:
        raise RegistryUnavailable(
            f"no MLflow server answers at MLFLOW_TRACKING_URI={uri} ({error}); "
            f"start it, or correct the address"
        ) from error


def start_run(
    name: str, dataset: Dataset, params: Mapping[str, str], tags: Mapping[str, str]
) -> tuple[str, str]:
    """Start a run in the experiment of its dataset; returns its id, and the address of its page.

    Where GDL_RAY_PARENT_RUN names a run, it is that one's child, and MLflow shows it below.
    """
    parent = os.environ.get(PARENT, "")
    return _start(name, dataset, params, {**tags, **({MLFLOW_PARENT_RUN_ID: parent} if parent else {})})


def start_parent(
    name: str, dataset: Dataset, params: Mapping[str, str], tags: Mapping[str, str]
) -> tuple[str, str]:
    """Start a run that others are children of; returns its id, and the address of its page.

    Processes that have the id in GDL_RAY_PARENT_RUN start its children. `end_run` ends it.
    """
    return _start(name, dataset, params, tags)


def _start(
    name: str, dataset: Dataset, params: Mapping[str, str], tags: Mapping[str, str]
) -> tuple[str, str]:
    client = MlflowClient(tracking_uri())
    experiment = _experiment(client, dataset.spec.name)
    run_id: str = client.create_run(experiment, run_name=name, tags=dict(tags)).info.run_id
    client.log_batch(run_id, params=[Param(key, value) for key, value in params.items()])
    inputs = [_describe_data(dataset)]
    try:
        client.log_inputs(run_id, inputs)
    except RestException:  # another job was writing the same dataset
        client.log_inputs(run_id, inputs)
    return run_id, _page(experiment, run_id)


def end_run(run_id: str, status: str = "FINISHED") -> None:
    """End a run: FINISHED, FAILED or KILLED."""
    MlflowClient(tracking_uri()).set_terminated(run_id, status)


def resume_run(run_id: str) -> str | None:
    """Open a run again; returns the address of its page, or None if the server has no such run."""
    client = MlflowClient(tracking_uri())
    try:
        experiment = client.get_run(run_id).info.experiment_id
        client.update_run(run_id, "RUNNING")
    except RestException as error:
        if error.get_http_status_code() == 404:  # type: ignore[no-untyped-call]
            return None
        raise
    return _page(experiment, run_id)


def _page(experiment: str, run_id: str) -> str:
    return f"{tracking_uri()}/#/experiments/{experiment}/runs/{run_id}"


def comparison_page(run_ids: Sequence[str]) -> str:
    """Tell the address of MLflow's page that lays runs of one experiment side by side.

    Raises:
        RegistryUnavailable: if the server does not answer.
    """
    experiment = ask(MlflowClient(tracking_uri()).get_run, run_ids[0]).info.experiment_id
    query = urlencode({"runs": json.dumps(list(run_ids)), "experiments": json.dumps([experiment])})
    return f"{tracking_uri()}/#/compare-runs?{query}"


def _experiment(client: MlflowClient, name: str) -> str:
    """Find or make an experiment; returns its id."""
    if found := client.get_experiment_by_name(name):
        if MLFLOW_RUN_NOTE not in found.tags:
            client.set_experiment_tag(found.experiment_id, MLFLOW_RUN_NOTE, _NOTE)
        return str(found.experiment_id)
    try:
        return str(client.create_experiment(name, tags={**_TRAINING_PAGE, MLFLOW_RUN_NOTE: _NOTE}))
    except RestException:  # another job was faster
        found = client.get_experiment_by_name(name)
        if found is None:
            raise
        return str(found.experiment_id)


def _describe_data(dataset: Dataset) -> DatasetInput:
    logged = LoggedDataset(
        name=dataset.spec.name,
        digest=dataset.digest[:16],
        source_type="gdl_ray",
        source=json.dumps({"name": dataset.spec.name, "sha256": dataset.digest}),
        profile=json.dumps({name: len(split) for name, split in dataset.splits.items()}),
    )
    return DatasetInput(logged, [InputTag(key="mlflow.data.context", value="training")])


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What MLflow knows of a run."""

    id: str
    name: str
    params: Mapping[str, str]
    tags: Mapping[str, str]
    metrics: Mapping[str, float]
    """Newest values."""
    dataset: str
    """Digest of the data, as MLflow shows it; empty where none was logged."""
    splits: Mapping[str, int]
    """Examples in each split of the data."""


def run_facts(run_id: str) -> RunFacts:
    """Look up a run.

    Raises:
        RegistryUnavailable: if the server does not answer.
    """
    run = ask(MlflowClient(tracking_uri()).get_run, run_id)
    logged = run.inputs.dataset_inputs[0].dataset if run.inputs and run.inputs.dataset_inputs else None
    return RunFacts(
        id=run_id,
        name=run.info.run_name,
        params=run.data.params,
        tags=run.data.tags,
        metrics=run.data.metrics,
        dataset=logged.digest if logged else "",
        splits=json.loads(logged.profile) if logged else {},
    )


def history(run_id: str, metric: str) -> list[tuple[int, int, float]]:
    """Read the curve of a metric: step, time in ms and value, in the order of steps; empty if there is none.

    Raises:
        RegistryUnavailable: if the server does not answer.
    """
    points = ask(MlflowClient(tracking_uri()).get_metric_history, run_id, metric)
    return sorted((each.step, each.timestamp, each.value) for each in points)


def log_metrics(run_id: str, metrics: Mapping[str, float]) -> None:
    """Log metrics of what a run has made, at its last step; a value that is the newest already is left out.

    Raises:
        RegistryUnavailable: if the server does not answer.
    """
    known = {name: history(run_id, name) for name in run_facts(run_id).metrics}
    step = max((points[-1][0] for points in known.values()), default=0)
    now_ms = int(time.time() * 1000)
    new = [
        Metric(name, value, now_ms, step)
        for name, value in metrics.items()
        if name not in known or repr(known[name][-1][2]) != repr(float(value))  # NaN is NaN here
    ]
    ask(MlflowClient(tracking_uri()).log_batch, run_id, metrics=new)


def log_files(run_id: str, folder: str, files: Mapping[str, bytes]) -> None:
    """Write artifacts of a run, replacing those of the same name.

    Args:
        run_id: of the run.
        folder: among its artifacts.
        files: contents by name.

    Raises:
        RegistryUnavailable: if the server does not answer.
    """
    with tempfile.TemporaryDirectory() as scratch:
        for name, content in files.items():
            (Path(scratch) / name).write_bytes(content)
        ask(MlflowClient(tracking_uri()).log_artifacts, run_id, scratch, folder)


def read_file(run_id: str, folder: str, name: str) -> bytes | None:
    """Read an artifact of a run; None if it has no such file.

    Raises:
        RegistryUnavailable: if the server does not answer.
    """
    client = MlflowClient(tracking_uri())
    path = f"{folder}/{name}"
    if path not in [item.path for item in ask(client.list_artifacts, run_id, folder)]:
        return None
    with tempfile.TemporaryDirectory() as scratch:
        return Path(ask(client.download_artifacts, run_id, path, scratch)).read_bytes()


class Run:
    """The log of a run, delivered in order by a thread of its own: whoever logs does not wait.

    While the server is away, reports wait. A metric of a step that the server has is not written again: what
    a restarted worker or driver repeats is dropped.

    Args:
        uri: address of the MLflow server.
    """

    def __init__(self, uri: str) -> None:
        self._client = MlflowClient(uri)
        self._id = ""
        self._known: dict[str, set[int]] = {}  # steps that the server has, by metric
        self._pictured: set[int] = set()
        self._last_step = 0
        self._lost = 0
        self._reports: Queue[Callable[[], None]] = Queue()

    def open(self, run_id: str) -> None:
        """Begin to deliver, to a run that was started."""
        self._id = run_id
        self._reports.put(self._ask_what_is_known)
        Thread(target=self._deliver, name="metrics", daemon=True).start()

    def log(self, step: int, metrics: Mapping[str, float], samples_png: bytes | None = None) -> None:
        """Log the metrics, and perhaps a sample grid, of one step."""
        now_ms = int(time.time() * 1000)
        self._reports.put(partial(self._write, step, now_ms, metrics, samples_png))

    def log_final(self, metrics: Mapping[str, float]) -> None:
        """Log metrics of the finished model, at the last step that was logged."""
        now_ms = int(time.time() * 1000)
        self._reports.put(lambda: self._write(self._last_step, now_ms, metrics))

    def finish(self, status: str = "FINISHED", limit_s: float = PATIENCE_S) -> int:
        """End the run when all is delivered, or time is up; returns how many reports could not be.

        Args:
            status: FINISHED, FAILED or KILLED.
            limit_s: how long to wait for a server that is away.
        """
        with self._reports.all_tasks_done:
            waiting = self._reports.all_tasks_done.wait_for
            is_delivered = waiting(lambda: not self._reports.unfinished_tasks, timeout=limit_s)
        with suppress(MlflowException, RequestException):  # a run that stays open can be gone on with
            persist(partial(self._client.set_terminated, self._id, status), limit_s if is_delivered else 0)
        return self._lost + self._reports.unfinished_tasks

    def _deliver(self) -> None:
        while True:
            write = self._reports.get()
            try:
                write()
            except Exception:  # the next report may fare better; this one is counted
                logging.getLogger(__name__).exception("a report could not be logged")
                self._lost += 1
            self._reports.task_done()

    def _ask_what_is_known(self) -> None:
        run = persist(partial(self._client.get_run, self._id))
        for name in run.data.metrics:
            history = persist(partial(self._client.get_metric_history, self._id, name))
            self._known[name] = {each.step for each in history}
        self._last_step = max((step for steps in self._known.values() for step in steps), default=0)

    def _write(
        self, step: int, now_ms: int, metrics: Mapping[str, float], samples_png: bytes | None = None
    ) -> None:
        """Write what is not known of a step; its picture only if its metrics, where it has some, were not."""
        new = {name: value for name, value in metrics.items() if step not in self._known.get(name, ())}
        self._last_step = max(step, self._last_step)
        if metrics and not new:
            return
        # The same batch sent twice, because an answer was lost, is one: MLflow goes by time, step and value.
        batch = [Metric(name, value, now_ms, step) for name, value in new.items()]
        persist(partial(self._client.log_batch, self._id, metrics=batch))
        for name in new:
            self._known.setdefault(name, set()).add(step)
        if samples_png and step not in self._pictured:
            picture = Image.open(io.BytesIO(samples_png))
            log = partial(self._client.log_image, self._id, picture, key=SAMPLES, step=step)
            persist(partial(log, synchronous=True), _PICTURE_S)
            self._pictured.add(step)


def persist(call: Callable[[], Any], limit_s: float = math.inf) -> Any:
    """Repeat a call until the server answers, for so long; a refusal is raised at once."""
    deadline = time.monotonic() + limit_s
    while True:
        try:
            return call()
        except (MlflowException, RequestException, RegistryUnavailable) as error:
            if _is_refusal(error) or time.monotonic() > deadline:
                raise
            time.sleep(1)


def _is_refusal(error: Exception) -> bool:
    """Whether the server answered that it will not do it, rather than that it cannot now."""
    status = 0
    if isinstance(error, MlflowException):
        status = error.get_http_status_code()  # type: ignore[no-untyped-call]
    elif isinstance(error, HTTPError) and error.response is not None:
        status = error.response.status_code
    return 400 <= status < 500 and status != 429


def ask(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Make one call.

    Raises:
        RegistryUnavailable: if the server does not answer, or with an error of its own.
    """
    try:
        return call(*args, **kwargs)
    except (MlflowException, RequestException) as error:
        if _is_refusal(error):
            raise
        if isinstance(error, (RestException, HTTPError)) or isinstance(error.__context__, RetryError):
            raise RegistryUnavailable(f"MLflow at {tracking_uri()} answers with an error: {error}") from error
        raise RegistryUnavailable(f"no MLflow server answers at {tracking_uri()}: {error}") from error
