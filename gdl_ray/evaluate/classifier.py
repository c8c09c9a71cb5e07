"""A small convolutional classifier: the features in which samples are compared, and the eye that reads them.

It is trained on the training split of the data at hand, so it needs no weights from elsewhere. A distance in
its features compares with distances in the features of the same weights alone: print their `fingerprint`.
"""

import hashlib
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gdl_ray.data import Dataset, Split, training_batch
from gdl_ray.family import DataSpec
from gdl_ray.nn import logistic
from gdl_ray.nn.dropout import dropout

FEATURES = 32
"""Dimensions of the features."""

_LEAST_WIDTH, _MOST_WIDTH = 32, 64  # channels; doubled where the resolution is halved
_SIDE = 4  # the resolution is halved until no side is longer
_DROPOUT = 0.5
_STEPS, _BATCH = 800, 64
_LEARNING_RATE, _WEIGHT_DECAY = 4e-3, 0.05
_WARMUP_STEPS = 40
_CHUNK = 1024  # examples that are read at once


class Classifier(nn.Module):
    """Maps images of one or three channels and any size to features and to classes."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, spec: DataSpec):
        super().__init__()
        if spec.kind != "image" or spec.classes < 2:
            raise ValueError(f"{spec.name}: a classifier needs images of two classes or more")
        self.levels = spec.levels
        self.convolutions, values = _convolutions(spec)
        self.to_features = nn.Linear(values, FEATURES)
        self.to_logits = nn.Linear(FEATURES, spec.classes)
        # Of the features over the training split.
        self.register_buffer("mean", torch.zeros(FEATURES))
        self.register_buffer("deviation", torch.ones(FEATURES))

    def forward(self, x: Tensor, key: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Compute features as they come, (N, FEATURES), and logits, (N, classes).

        Args:
            x: images, uint8 (N, C, H, W).
            key: noise keys for dropout, int64 (N,); None drops nothing.
        """
        hidden = self.convolutions(logistic.centers(x, self.levels))
        features = F.silu(self.to_features(dropout(hidden, _DROPOUT, key, stream=0)))
        return features, self.to_logits(features)

    def features(self, x: Tensor) -> Tensor:
        """Compute features of images, uint8 (N, C, H, W), in units of the training split: (N, FEATURES)."""
        return self.look_at(x)[0]

    def predict(self, x: Tensor) -> Tensor:
        """Tell the classes of images, uint8 (N, C, H, W): int64 (N,)."""
        return self.look_at(x)[1]

    def look_at(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Compute what `features` does and tell what `predict` does, reading the images once."""
        features, logits = self._read(x)
        return (features - self.mean) / self.deviation, logits.argmax(1)

    def fingerprint(self) -> str:
        """Name these weights in eight characters."""
        digest = hashlib.sha256()
        for tensor in self.state_dict().values():
            digest.update(tensor.cpu().numpy().tobytes())
        return digest.hexdigest()[:8]

    @torch.no_grad()
    def _read(self, x: Tensor) -> tuple[Tensor, Tensor]:
        chunks = [self(chunk.to(self.mean.device)) for chunk in torch.split(x, _CHUNK)]
        features, logits = zip(*chunks, strict=True)
        return torch.cat(features), torch.cat(logits)


def fit_classifier(dataset: Dataset, seed: int = 0) -> Classifier:
    """Train a classifier on the training split, on the CPU: seconds at 8x8 pixels, half a minute at 28x28.

    The weights are a function of the data and the seed; on other machines, or with other numbers of threads,
    to rounding.

    Raises:
        ValueError: if the data are no images, or have no labels.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = Classifier(dataset.spec)
    split = dataset.splits["train"]
    _minimize_cross_entropy(classifier, split, seed)
    _standardize(classifier, split)
    return classifier.eval().requires_grad_(False)


def _minimize_cross_entropy(classifier: Classifier, split: Split, seed: int) -> None:
    optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=_WEIGHT_DECAY, fused=True)
    for step in range(_STEPS):
        optimizer.param_groups[0]["lr"] = _learning_rate(step)
        batch = training_batch(split, seed=seed, step=step, batch_size=_BATCH)
        _, logits = classifier(batch.x, batch.key)
        optimizer.zero_grad()
        torch.autograd.backward(F.cross_entropy(logits, batch.y))
        optimizer.step()


def _learning_rate(step: int) -> float:
    """Rise linearly, then fall as a cosine."""
    falling = (1 + math.cos(math.pi * step / _STEPS)) / 2
    return _LEARNING_RATE * min((step + 1) / _WARMUP_STEPS, falling)


def _standardize(classifier: Classifier, split: Split) -> None:
    features, _ = classifier._read(torch.tensor(split.x))
    classifier.mean.copy_(features.mean(0))
    classifier.deviation.copy_(features.std(0).clamp(min=1e-6))


def _convolutions(spec: DataSpec) -> tuple[nn.Sequential, int]:
    """Images (N, C, H, W) -> values (N, M), and M."""
    channels, height, width = spec.shape
    wider = _LEAST_WIDTH
    layers: list[nn.Module] = [nn.Conv2d(channels, wider, 3, padding=1), nn.SiLU()]
    while max(height, width) > _SIDE:
        channels, wider = wider, min(2 * wider, _MOST_WIDTH)
        layers += [nn.Conv2d(channels, wider, 3, stride=2, padding=1), nn.SiLU()]
        height, width = -(-height // 2), -(-width // 2)
    return nn.Sequential(*layers, nn.Flatten()), wider * height * width
