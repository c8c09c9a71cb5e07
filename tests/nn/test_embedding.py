"""Class vectors: one each, and one for no label."""

import torch

from gdl_ray.nn.embedding import ClassEmbedding


def test_each_class_and_no_label_have_vectors_of_their_own() -> None:
    vectors = ClassEmbedding(3, 5)(torch.tensor([0, 1, 2, -1, 0]))
    assert vectors.shape == (5, 5)
    assert len(vectors.unique(dim=0)) == 4
    assert torch.equal(vectors[0], vectors[4])


def test_without_classes_there_is_one_vector() -> None:
    embedding = ClassEmbedding(0, 2)
    assert torch.equal(embedding(torch.tensor([-1])), embedding.table.weight)
