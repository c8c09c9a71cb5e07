"""Class labels as vectors."""

import torch
from torch import Tensor, nn


class ClassEmbedding(nn.Module):
    """Looks up a learned vector for each class, and one more for "no label".

    Args:
        classes: number of classes; 0 leaves the vector for "no label" alone.
        width: of the vectors.
    """

    def __init__(self, classes: int, width: int):
        super().__init__()
        self.classes = classes
        self.table = nn.Embedding(classes + 1, width)

    def forward(self, labels: Tensor) -> Tensor:
        """Map labels, int64 of shape (B,), negative where there is none, to vectors of shape (B, width)."""
        vectors: Tensor = self.table(torch.where(labels < 0, self.classes, labels))
        return vectors
