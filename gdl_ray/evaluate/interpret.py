"""What a model's latents tell of the data, and what its samples reach of the classes.

References:
    Alain, Bengio. Understanding Intermediate Layers Using Linear Classifier Probes. 2016.
        https://arxiv.org/abs/1610.01644
    Burda, Grosse, Salakhutdinov. Importance Weighted Autoencoders. 2015. https://arxiv.org/abs/1509.00519
    Karras, Laine, Aila. A Style-Based Generator Architecture for GANs. 2018. https://arxiv.org/abs/1812.04948
    White. Sampling Generative Networks. 2016. https://arxiv.org/abs/1609.04468
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gdl_ray.family import UNLABELLED, Latent

_ACTIVE = 0.01  # variance over the data (Burda et al., section 4.2)
_PROBED = 10_000  # training examples that a probe reads at most
_STEPS = 16
_NO_ARC = 1e-3  # sine of an angle


@dataclass(frozen=True, slots=True)
class Smoothness:
    """How evenly what is decoded changes on the way from one example to another."""

    straightness: float
    """Distance of the ends over the length of the way, in features, in [0, 1]; 1 if there is no detour."""
    largest_step: float
    """Largest step over the mean one, from 1, if all are as long, to the number of steps: one jump."""


def linear_probe(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
    """Measure how well a linear map of latents tells the class (Alain and Bengio).

    That is a logistic regression on standardised values, of at most the first 10,000 training examples. On
    raw pixels it is what latents must beat.

    Args:
        train: latents of training examples, (N, D).
        train_labels: their classes, int64 (N,).
        test: latents of other examples, (M, D).
        test_labels: their classes, int64 (M,).

    Returns:
        Share of the other examples whose class it tells, in [0, 1].
    """
    # Imported here: they take longer than all else that a worker imports.
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    probe.fit(train[:_PROBED].double().cpu().numpy(), train_labels[:_PROBED].cpu().numpy())
    return float(probe.score(test.double().cpu().numpy(), test_labels.cpu().numpy()))


def active_units(latents: Tensor, threshold: float = _ACTIVE) -> int:
    """Count latent dimensions that move with x: whose E[z | x], (N, D), varies by more than a threshold.

    The variance is that over examples (Burda et al., section 4.2). Where noise hides a dimension's value
    from the decoder, its mean stays at the prior's.
    """
    return int((latents.double().var(0) > threshold).sum())


@torch.no_grad()
def smoothness(model: Latent, features: Callable[[Tensor], Tensor], x: Tensor) -> Smoothness:
    """Measure ways through the latent space from each example of a first half to one of a second.

    As for perceptual path length (Karras et al., section 4.1), steps are measured in features of what is
    decoded; put in relation to each other, they compare between families whose latents have other scales.
    The ways are arcs (White, section 2.1), for straight lines between Gaussian latents leave the shell on
    which these lie. Labels are left out: latents must tell all.

    Args:
        model: a family in evaluation mode.
        features: maps images to features, (N, D), such as those of a classifier.
        x: examples as in Batch, on the model's device, 2 or more.

    Returns:
        Means over the pairs; pairs that are decoded to one image count as straight.
    """
    half = len(x) // 2
    nobody = torch.full((half,), UNLABELLED, device=x.device)
    start, end = (model.encode(part, nobody) for part in (x[:half], x[half : 2 * half]))
    seen = torch.stack([features(model.decode(z, nobody)).double() for z in arc(start, end, _STEPS + 1)])
    steps = seen.diff(dim=0).norm(dim=2)
    moves = steps.sum(0) > 0
    length = torch.where(moves, steps.sum(0), 1)
    straightness = torch.where(moves, (seen[-1] - seen[0]).norm(dim=1) / length, 1)
    largest = torch.where(moves, steps.amax(0) / length * _STEPS, 1)
    return Smoothness(straightness.mean().item(), largest.mean().item())


def arc(start: Tensor, end: Tensor, steps: int) -> Tensor:
    """Go from latents to others, (B, D) each, at an even pace of angle (White, section 2.1).

    Returns:
        Both ends and what lies between them, (steps, B, D); a straight line where there is no arc, or many.
    """
    share = torch.linspace(0, 1, steps, device=start.device)[:, None, None]
    cosine = torch.nn.functional.cosine_similarity(start, end, dim=1).clamp(-1, 1)
    angle = cosine.acos()[:, None]
    way = (((1 - share) * angle).sin() * start + (share * angle).sin() * end) / angle.sin()
    return torch.where(angle.sin() < _NO_ARC, torch.lerp(start, end, share), way)


def class_coverage(predicted: Tensor, classes: int) -> float:
    """Measure how many classes samples reach, those that are rare for less than one.

    It is the perplexity of the classes, exp of their entropy, over their number: 1 if all are as frequent,
    m / classes if samples are spread evenly over m of them. Compare it with that of the data.

    Args:
        predicted: what a classifier takes samples for, int64 (N,), in [0, classes - 1].
        classes: how many there are.

    Returns:
        Share of the classes, from 1 / classes to 1.
    """
    share = torch.bincount(predicted, minlength=classes).double() / len(predicted)
    return float(torch.special.entr(share).sum().exp() / classes)
