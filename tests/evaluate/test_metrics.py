"""The table of metrics."""

from gdl_ray.evaluate.metrics import METRICS, bits_per_dim, nats, standard_error
from gdl_ray.family import LikelihoodKind


def test_every_kind_of_likelihood_has_a_name_of_its_own() -> None:
    names = {name(kind) for kind in LikelihoodKind for name in (bits_per_dim, nats)}
    assert len(names) == 2 * len(LikelihoodKind)
    assert names <= METRICS.keys()
    assert bits_per_dim(LikelihoodKind.LOWER_BOUND) == "test/bits_per_dim_lower_bound"
    assert {METRICS[name].better for name in names if "bits" in name} == {"lower"}
    assert {METRICS[name].better for name in names if "nats" in name} == {"higher"}


def test_no_metric_is_named_as_the_error_of_another() -> None:
    assert not METRICS.keys() & {standard_error(name) for name in METRICS}


def test_measured_times_are_known_not_to_repeat() -> None:
    timed = {name for name, metric in METRICS.items() if not metric.is_repeatable}
    assert all(name.startswith("efficiency/") for name in timed)
    assert not timed & {"efficiency/parameters", "efficiency/training_memory_mib"}
    assert all("s" in METRICS[name].unit for name in timed - {"efficiency/usd_to_quality"})
