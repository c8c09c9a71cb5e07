"""What is measured of serving: Prometheus metrics, exported with Ray's own at each node's metrics port.

How many series there are is bounded. A model counts under its name from the moment that it is loaded here,
which only a name of the registry can be; any other that a client may think of counts as `other`. Operations
and kinds of problems are constants of the code, statuses those of HTTP. In a replica of Serve, Ray adds the
labels deployment, replica and application; without Ray, what is counted goes nowhere.

Ray exports `ray_` before each name and `_total` behind a counter's. Of a histogram it keeps the buckets, and
for its sum adds up their middles: quantiles can be trusted, means cannot.
"""

from collections import Counter
from typing import Any

from ray.serve import metrics

from gdl_ray.engine import Load

OTHER = "other"
"""Label of a model that was never loaded here."""
REQUEST_BOUNDS_S = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0]
"""Upper bounds of the buckets of a duration: from the fastest answer of a small model to the longest wait."""


def _labels(*names: str) -> Any:
    """Name the labels of a metric; Ray's annotation, but not Ray, allows one alone."""
    return names


class Meter:
    """Counts what happens in one replica, in whose constructor it is made; any thread may call it."""

    def __init__(self) -> None:
        self._loaded: Counter[str] = Counter()
        """How many versions of each model are loaded; 0 once all have gone."""
        per_model = _labels("model")
        self._samples = metrics.Counter("gdl_ray_samples", "Samples drawn.", per_model)
        self._requests = metrics.Counter(
            "gdl_ray_requests", "Requests answered.", _labels("model", "operation", "status")
        )
        self._errors = metrics.Counter(
            "gdl_ray_errors", "Requests answered with a problem.", _labels("model", "kind")
        )
        self._request_s = metrics.Histogram(
            "gdl_ray_request_seconds",
            "Seconds from a request to the end of its answer.",
            REQUEST_BOUNDS_S,
            _labels("model", "operation"),
        )
        self._preview_s = metrics.Histogram(
            "gdl_ray_first_preview_seconds",
            "Seconds from a request to its first preview.",
            REQUEST_BOUNDS_S,
            per_model,
        )
        self._queue = metrics.Gauge("gdl_ray_queue_samples", "Samples that wait for a slot.", per_model)
        self._active = metrics.Gauge("gdl_ray_active_slots", "Samples under way.", per_model)
        self._slots = metrics.Gauge("gdl_ray_slots", "Samples that may be under way.", per_model)
        self._step_s = metrics.Gauge("gdl_ray_step_seconds", "Seconds a step of the engine.", per_model)
        self._models = metrics.Gauge("gdl_ray_models_loaded", "Versions of models in memory.")
        self._loads = metrics.Counter("gdl_ray_model_loads", "Versions of models loaded.", per_model)
        self._swaps = metrics.Counter("gdl_ray_swaps", "Versions that took over from another.", per_model)
        self._models.set(0)

    def answered(
        self, model: str, operation: str, status: int, seconds: float, kind: str | None = None
    ) -> None:
        """Count a request, whatever its answer was.

        Args:
            model: as the client named it; empty where it named none.
            operation: one of the code's own words, such as `sample`, never a client's.
            status: of the HTTP answer.
            seconds: from the request to the end of its answer.
            kind: of the problem that was answered, if one was.
        """
        name = self._label(model)
        self._requests.inc(1, {"model": name, "operation": operation, "status": str(int(status))})
        self._request_s.observe(seconds, {"model": name, "operation": operation})
        if kind is not None:
            self._errors.inc(1, {"model": name, "kind": kind})

    def sampled(self, model: str, n: int) -> None:
        """Count samples that were drawn, n of 1 or more."""
        self._samples.inc(n, {"model": self._label(model)})

    def previewed(self, model: str, seconds: float) -> None:
        """Count a first preview, so many seconds after its request."""
        self._preview_s.observe(seconds, {"model": self._label(model)})

    def loaded(self, model: str) -> None:
        """Count a version that was loaded; the name is one of the registry."""
        self._loaded[model] += 1
        self._loads.inc(1, {"model": model})
        self._models.set(self._loaded.total())

    def unloaded(self, model: str) -> None:
        """Count a version that was let go; with the last of a model, its gauges fall to 0."""
        self._loaded[model] -= 1
        self._models.set(self._loaded.total())
        if not self._loaded[model]:
            self.observe(model)

    def swapped(self, model: str) -> None:
        """Count a version that took over from another."""
        self._swaps.inc(1, {"model": model})

    def observe(self, model: str, *loads: Load) -> None:
        """Show how busy the engines of a model are: one for each of its versions that are loaded."""
        tags = {"model": self._label(model)}
        self._queue.set(sum(load.waiting for load in loads), tags)
        self._active.set(sum(load.active for load in loads), tags)
        self._slots.set(sum(load.slots for load in loads), tags)
        self._step_s.set(max((load.step_s for load in loads), default=0.0), tags)

    def _label(self, model: str) -> str:
        return model if model in self._loaded else OTHER
