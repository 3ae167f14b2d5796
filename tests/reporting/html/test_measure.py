"""Top items, scores and similarities agree with the whole float64 matrix."""

import numpy as np
import pytest
import torch

from clip_retrieval.evaluation.ranks import retrieval_ranks
from clip_retrieval.reporting.html.measure import contains, measure


def unit(rows, dim, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(rows, dim, generator=generator), dim=1)


@pytest.fixture
def random():
    """Features of 12 images and 30 captions; caption 29 describes two images, and image 11 has no caption."""
    images, captions = unit(12, 8, 0), unit(30, 8, 1)
    pairs = np.array(sorted([(i % 11, i) for i in range(30)] + [(0, 29)]))
    return images, captions, pairs


def test_directions_equal_the_whole_matrix(random):
    images, captions, pairs = random
    measured = measure(*random, *retrieval_ranks(images, captions, pairs))
    scores = (images.double() @ captions.double().T).numpy()
    relevant = np.zeros_like(scores, bool)
    relevant[pairs[:, 0], pairs[:, 1]] = True
    for one, matrix, matches in ((measured.i2t, scores, relevant), (measured.t2i, scores.T, relevant.T)):
        queries = np.flatnonzero(matches.any(1))
        assert one.ranks.queries.tolist() == queries.tolist()
        for row, query in enumerate(queries):
            top = np.argsort(-matrix[query])[:10]
            assert one.items[row].tolist() == top.tolist()
            assert one.relevant[row].tolist() == matches[query, top].tolist()
            np.testing.assert_allclose(one.scores(row), matrix[query, top])
            best = np.where(matches[query], matrix[query], -2).argmax()
            assert one.best[row] == best and one.best_score[row] == pytest.approx(matrix[query, best])
            assert one.rank[row] == 1 + (matrix[query][~matches[query]] > matrix[query, best]).sum()
            assert one.hardest[row] == pytest.approx(matrix[query, top][~matches[query, top]].max())
    np.testing.assert_allclose(measured.positives, scores[relevant])
    assert measured.negatives.min() >= scores[~relevant].min() - 1e-9 and len(measured.negatives) > 1000


def test_queries_without_negatives_have_no_hardest_one():
    images, captions, pairs = unit(1, 4, 0), unit(3, 4, 1), np.array([[0, 0], [0, 1], [0, 2]])
    measured = measure(images, captions, pairs, *retrieval_ranks(images, captions, pairs))
    assert np.isnan(measured.i2t.hardest).all() and measured.i2t.right.all() and len(measured.negatives) == 0


def test_contains_finds_pairs_of_any_size():
    pairs = np.array([[0, 3], [2, 1]])
    assert contains(pairs, np.array([0, 2, 2, 0]), np.array([3, 1, 3, 900])).tolist() == [True, True, False, False]
    assert not contains(pairs[:0], np.array([0]), np.array([0])).any()
