"""The metrics that compare models: the same names for every family, with unit, direction, meaning and source.

The standard error of a metric, where it has one, is named as the metric with `_standard_error` after it.
What a likelihood is stands in its name, so that an exact value and a bound never meet under one.

References:
    Burda et al. Importance Weighted Autoencoders. 2016. https://arxiv.org/abs/1509.00519
    Burda et al. Accurate and Conservative Estimates of MRF Log-Likelihood using Reverse Annealing. 2015.
        https://arxiv.org/abs/1412.8566
    Heusel et al. GANs Trained by a Two Time-Scale Update Rule. 2017. https://arxiv.org/abs/1706.08500
    Binkowski et al. Demystifying MMD GANs. 2018. https://arxiv.org/abs/1801.01401
    Kynkaanniemi et al. Improved Precision and Recall Metric. 2019. https://arxiv.org/abs/1904.06991
    Naeem et al. Reliable Fidelity and Diversity Metrics. 2020. https://arxiv.org/abs/2002.09797
    Meehan et al. A Non-Parametric Test to Detect Data-Copying. 2020. https://arxiv.org/abs/2004.05675
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from gdl_ray.family import LikelihoodKind

STANDARD_ERROR = "_standard_error"
"""Ends the name of a metric's standard error."""


@dataclass(frozen=True, slots=True)
class Metric:
    """What a metric is."""

    unit: str
    """Of its values; empty for shares and other pure numbers."""
    better: Literal["higher", "lower", "neither"]
    """Which of two values speaks for a model; neither where both ends are bad."""
    meaning: str
    """What it measures, in words."""
    source: str = ""
    """Who defined it."""
    is_repeatable: bool = True
    """Whether the same model has the same value again: a measured time has not."""


def bits_per_dim(kind: LikelihoodKind, tight: bool = False) -> str:
    """Name the bits per dimension of test data by what the likelihood is.

    Args:
        kind: of the likelihood.
        tight: whether a model's `tight_samples` were drawn, as an evaluation does, and not the few that
            training can afford: bounds and estimates of both have names of their own.
    """
    return f"test/bits_per_dim_{_spelled(kind, tight)}"


def nats(kind: LikelihoodKind, tight: bool = False) -> str:
    """Name the log-likelihood of test data, in nats an example; arguments as in `bits_per_dim`."""
    return f"test/nats_{_spelled(kind, tight)}"


def _spelled(kind: LikelihoodKind, tight: bool) -> str:
    return f"{kind}_tight" if tight and kind != LikelihoodKind.EXACT else kind


def standard_error(name: str) -> str:
    """Name the standard error of a metric."""
    return f"{name}{STANDARD_ERROR}"


BITS_PER_DIM = tuple(bits_per_dim(kind) for kind in LikelihoodKind)
"""Names of the bits per dimension of test data, of which a family has at most one."""

_SPOKEN = {
    LikelihoodKind.EXACT: "exact",
    LikelihoodKind.LOWER_BOUND: "by a lower bound of the likelihood",
    LikelihoodKind.ESTIMATE: "by an estimate of the likelihood",
}

_DRAWS = {False: "", True: " with many draws"}

METRICS: Mapping[str, Metric] = {
    **{
        bits_per_dim(kind, tight): Metric("bits/dim", "lower", f"code length of test data, {spoken}{draws}")
        for tight, draws in _DRAWS.items()
        for kind, spoken in _SPOKEN.items()
        if not (tight and kind == LikelihoodKind.EXACT)
    },
    **{
        nats(kind, tight): Metric("nats", "higher", f"mean log-likelihood of a test example, {spoken}{draws}")
        for tight, draws in _DRAWS.items()
        for kind, spoken in _SPOKEN.items()
        if not (tight and kind == LikelihoodKind.EXACT)
    },
    "test/log_z_gap_nats": Metric(
        "nats", "neither", "upper less lower estimate of log Z: it is off if far from 0", "Burda 2015"
    ),
    "test/effective_sample_size": Metric("", "higher", "chains that count in the estimate of log Z"),
    "test/bayes_accuracy": Metric("", "higher", "share of test examples that Bayes' rule labels rightly"),
    "samples/frechet_distance": Metric(
        "", "lower", "distance of Gaussians fitted to features of samples and data", "Heusel 2017"
    ),
    "samples/kernel_distance": Metric(
        "", "lower", "squared MMD of features of samples and data", "Binkowski 2018"
    ),
    "samples/precision": Metric("", "higher", "share of samples that look like data", "Kynkaanniemi 2019"),
    "samples/recall": Metric("", "higher", "share of data that samples could be", "Kynkaanniemi 2019"),
    "samples/density": Metric("", "higher", "how thickly data lie where samples do", "Naeem 2020"),
    "samples/coverage": Metric("", "higher", "share of data with a sample near by", "Naeem 2020"),
    "samples/label_fidelity": Metric("", "higher", "share of samples of the class that was asked for"),
    "samples/class_coverage": Metric("", "higher", "how evenly unlabelled samples reach the classes"),
    "samples/copied_share": Metric("", "lower", "share of samples too near a training example"),
    "samples/copying_z": Metric(
        "", "neither", "data-copying test: far below 0 copies, far above underfits", "Meehan 2020"
    ),
    "samples/memorised": Metric("", "lower", "1 where more samples are copies than chance explains, else 0"),
    "latent/probe_accuracy": Metric("", "higher", "accuracy of a linear classifier on latents"),
    "latent/pixel_probe_accuracy": Metric("", "higher", "the same on pixels, to compare with"),
    "latent/active_units": Metric("", "neither", "latent dimensions that depend on the data", "Burda 2016"),
    "latent/smoothness": Metric("", "higher", "straight way over the way that an interpolation takes"),
    "efficiency/examples_per_s": Metric("examples/s", "higher", "training throughput", is_repeatable=False),
    "efficiency/seconds_to_quality": Metric(
        "s", "lower", "training time until a stated quality", is_repeatable=False
    ),
    "efficiency/usd_to_quality": Metric(
        "US$", "lower", "that time on its devices, at a stated price", is_repeatable=False
    ),
    **{
        f"efficiency/samples_per_s_batch_{batch}": Metric(
            "samples/s", "higher", f"sampling throughput, {batch} at once", is_repeatable=False
        )
        for batch in (1, 64)
    },
    **{
        f"efficiency/ms_per_sample_batch_{batch}": Metric(
            "ms", "lower", f"sampling time of each, {batch} at once", is_repeatable=False
        )
        for batch in (1, 64)
    },
    "efficiency/parameters": Metric("", "lower", "parameters of the model"),
    "efficiency/training_memory_mib": Metric("MiB", "lower", "what a training step keeps in memory"),
}
"""Every metric by name; nothing else is compared."""


def table() -> str:
    """Write the table of metrics in Markdown, for people to read beside the figures."""
    rows = [
        f"| {name} | {each.unit} | {each.better} | {each.meaning} | {each.source} |"
        for name, each in METRICS.items()
    ]
    return "\n".join(["| metric | unit | better | meaning | source |", "|---|---|---|---|---|", *rows])
