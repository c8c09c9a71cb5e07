"""The discretized logistic distribution over ordered levels.

A level x in [0, L - 1] is the bin of width 2 / L around 2 (x + 1/2) / L - 1 on [-1, 1]; the first and the
last bin take the tails. So P(x) = sigmoid(upper) - sigmoid(lower), for the bin's standardised edges.

References:
    Salimans, Karpathy, Chen, Kingma. PixelCNN++. 2017. https://arxiv.org/abs/1701.05517 (section 2.1)
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def log_prob(x: Tensor, mean: Tensor, log_scale: Tensor, levels: int) -> Tensor:
    """Compute log P(x) in nats.

    Args:
        x: levels in [0, levels - 1], any shape.
        mean: location on the scale of [-1, 1], broadcast against x.
        log_scale: log of the logistic's scale, broadcast against x.
        levels: number of levels.
    """
    precision = torch.exp(-log_scale)
    lower = (2 / levels * x - 1 - mean) * precision
    width = 2 / levels * precision
    upper = lower + width
    # sigmoid(b) - sigmoid(a) = sigmoid(b) sigmoid(-a) (1 - exp(a - b)): no cancellation at any scale.
    log_upper = F.logsigmoid(upper)
    log_lower = F.logsigmoid(-lower)
    interior = log_upper + log_lower + torch.log(-torch.expm1(-width))
    return torch.where(x == 0, log_upper, torch.where(x == levels - 1, log_lower, interior))


def sample(u: Tensor, mean: Tensor, log_scale: Tensor, levels: int) -> Tensor:
    """Turn uniforms in (0, 1) into levels by the inverse of the distribution function: uint8, shape of u."""
    return quantize(mean + torch.exp(log_scale) * torch.logit(u), levels)


def quantize(y: Tensor, levels: int) -> Tensor:
    """Find the level whose bin holds each point of the real line: uint8."""
    return ((y + 1) * (levels / 2)).floor().clamp(0, levels - 1).to(torch.uint8)


def centers(x: Tensor, levels: int) -> Tensor:
    """Map levels to the centres of their bins in (-1, 1): float32."""
    return (x.float() + 0.5) * (2 / levels) - 1


def marginal(counts: Tensor | None, shape: tuple[int, ...], levels: int) -> Tensor:
    """Start a decoder at the mean of the data, with a scale of a tenth of half their range.

    Args:
        counts: how often each level occurs at each dimension, (dims, levels); None puts the means at 0.
        shape: of an image, (C, H, W).
        levels: number of levels.

    Returns:
        Mean and log-scale of each value, (2 C, H, W).
    """
    mean = torch.zeros(shape)
    if counts is not None:
        share = counts / counts.sum(1, keepdim=True)
        mean = (share @ centers(torch.arange(levels), levels)).view(shape)
    return torch.cat([mean, torch.full(shape, math.log(0.1))])
