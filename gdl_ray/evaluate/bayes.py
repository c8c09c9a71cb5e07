"""Classification by Bayes' rule: what a model of p(x | y) knows of labels.

    p(y | x) = p(x | y) p(y) / sum over y' of p(x | y') p(y')

Where a family has no exact p(x | y), a bound or an estimate takes its place. The noise of an example is then
the same for every class, so that classes differ by what the model says of them, and not by luck.
"""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from gdl_ray.family import Batch, Likelihood


def log_prior(labels: Tensor, classes: int) -> Tensor:
    """Compute the log of each class's share of labels, int64 (N,): float (classes,)."""
    return (torch.bincount(labels, minlength=classes) / len(labels)).log()


def log_posterior(model: Likelihood, batch: Batch, prior: Tensor, samples: int = 1) -> Tensor:
    """Compute log p(y | x) of every class.

    Args:
        model: a family in evaluation mode.
        batch: examples on the model's device, with its keys for every class; labels are not read.
        prior: log p(y), float (classes,).
        samples: Monte-Carlo samples an example and class.

    Returns:
        Nats, float (B, classes).
    """
    labels = [torch.full_like(batch.y, label) for label in range(len(prior))]
    nats = [model.log_likelihood(replace(batch, y=y), samples) for y in labels]
    return (torch.stack(nats, dim=1) + prior.to(batch.x.device)).log_softmax(1)


def bayes_accuracy(model: Likelihood, batches: Iterable[Batch], prior: Tensor, samples: int = 1) -> float:
    """Measure the share of examples whose likeliest label is theirs.

    Costs as much as the log-likelihood of the examples, once for each class.

    Args:
        model: a family in evaluation mode.
        batches: labelled examples on the model's device, one or more.
        prior: log p(y), float (classes,).
        samples: Monte-Carlo samples an example and class.
    """
    right = [log_posterior(model, batch, prior, samples).argmax(1) == batch.y for batch in batches]
    return torch.cat(right).double().mean().item()
