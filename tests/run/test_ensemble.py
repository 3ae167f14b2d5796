"""The features of several models together."""

import pytest
import torch
from torch.nn.functional import normalize

from clip_retrieval.errors import UserError
from clip_retrieval.run.ensemble import combine


def random_features(dim, seed, items=7):
    return normalize(torch.randn(items, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_scores_are_the_mean_cosine_of_models_of_any_size():
    images, texts = [random_features(4, 1), random_features(9, 2)], [random_features(4, 3), random_features(9, 4)]
    mean = sum(a.double() @ b.double().T for a, b in zip(images, texts)) / 2
    found = combine(images, "scores") @ combine(texts, "scores").T
    torch.testing.assert_close(found.double(), mean, atol=1e-6, rtol=0)


def test_features_are_the_normalised_mean():
    a, b = random_features(5, 1), random_features(5, 2)
    found = combine([a, b], "features")
    torch.testing.assert_close(found, (a + b) / (a + b).norm(dim=1, keepdim=True))


def test_mean_of_features_of_different_sizes_is_refused():
    with pytest.raises(UserError, match="4, 9 dimensions"):
        combine([random_features(4, 1), random_features(9, 2)], "features")


@pytest.mark.parametrize("mode", ["scores", "features"])
def test_a_single_model_is_unchanged(mode):
    a = random_features(5, 1)
    assert combine([a], mode) is a
