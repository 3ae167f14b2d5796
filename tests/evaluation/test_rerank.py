"""Re-ranked scores against matrices of float64 scores that are transformed as the papers write them."""

import numpy as np
import pytest
import torch

from clip_retrieval.evaluation import rerank
from clip_retrieval.evaluation.ranks import retrieval_ranks
from clip_retrieval.evaluation.rerank import METHODS
from clip_retrieval.options import RERANKINGS

IMAGES, CAPTIONS, BANK, DIM = 30, 70, 50, 8


@pytest.fixture(params=[np.float32, np.float64])
def case(request):
    """L2-normalised images, captions (some of them equal) and a bank, with a hub among the images, and the pairs."""
    rng = np.random.default_rng(3)
    texts = rng.normal(size=(CAPTIONS, DIM))
    texts[5], texts[6], texts[40] = texts[11], texts[11], texts[2]
    images = texts[np.arange(IMAGES) * 2] + rng.normal(size=(IMAGES, DIM))
    images[3] = texts.mean(0) + 0.05 * images[3]  # the nearest image of many captions
    images[8] = images[9]
    features = [images, texts, rng.normal(size=(BANK, DIM))]
    features = [(a / np.linalg.norm(a, axis=1, keepdims=True)).astype(request.param) for a in features]
    pairs = np.stack([np.minimum(np.arange(CAPTIONS) // 2, IMAGES - 1), np.arange(CAPTIONS)], axis=1)
    return (*(torch.from_numpy(a) for a in features), pairs)


def counts(scores, relevant, tie=1e-9):
    """(above, tied, positives) of each row of a score matrix, as `Ranks` defines them."""
    rows = []
    for row, positive in zip(scores, relevant):
        best = row[positive].max()
        above, equal = row > best + tie, np.abs(row - best) <= tie
        rows.append([above[~positive].sum(), equal[~positive].sum(), equal[positive].sum()])
    return np.array(rows).T


def assert_ranks(case, name, value, expected, *bank):
    """expected(scores, query_axis) is the transformed matrix (images, captions) for queries along this axis."""
    images, texts, _, pairs = case
    relevant = np.zeros((IMAGES, CAPTIONS), bool)
    relevant[tuple(pairs.T)] = True
    scores = images.double().numpy() @ texts.double().numpy().T
    ((a, b),) = METHODS[name].transform(images, texts, [value], *bank)
    found = dict(zip(("i2t", "t2i"), retrieval_ranks(a, b, pairs, tile=(7, 9))))
    for direction in METHODS[name].directions:
        matrix = expected(scores, 0 if direction == "i2t" else 1)
        wanted = counts(matrix, relevant) if direction == "i2t" else counts(matrix.T, relevant.T)
        ranks = found[direction]
        np.testing.assert_array_equal(np.stack([ranks.above, ranks.tied, ranks.positives]), wanted)


def softmax(scores, temperature, axis):
    exponential = np.exp(scores / temperature)
    return exponential / exponential.sum(axis, keepdims=True)


@pytest.fixture(params=[4, 1000])
def tile(request, monkeypatch):
    monkeypatch.setattr(rerank, "tile_size", lambda device: (request.param, request.param + 1))


@pytest.mark.parametrize("temperature", [0.05, 0.5])
def test_inverted_softmax_normalises_over_the_queries(case, tile, temperature):
    assert_ranks(case, "inverted_softmax", temperature, lambda s, queries: np.log(softmax(s, temperature, queries)))


@pytest.mark.parametrize("temperature", [0.05, 0.5])
def test_dual_softmax_is_the_product_of_both_softmaxes(case, tile, temperature):
    def expected(s, queries):
        return np.log(softmax(s, temperature, 0) * softmax(s, temperature, 1))

    assert_ranks(case, "dual_softmax", temperature, expected)


@pytest.mark.parametrize("k", [1, 10, 500])
def test_csls_subtracts_the_mean_of_the_nearest(case, tile, k):
    def expected(s, queries):
        r_image = np.sort(s, axis=1)[:, ::-1][:, :k].mean(1, keepdims=True)
        r_text = np.sort(s, axis=0)[::-1][:k].mean(0, keepdims=True)
        return 2 * s - r_image - r_text

    assert_ranks(case, "csls", k, expected)


def test_dist_norm_subtracts_a_share_of_the_means(case):
    a, b = (features.double().numpy() for features in case[:2])
    expected = (a - 0.25 * a.mean(0)) @ (b - 0.25 * b.mean(0)).T
    assert_ranks(case, "dist_norm", 0.25, lambda s, queries: expected)


@pytest.mark.parametrize("temperature", [0.05, 0.5])
def test_qb_norm_applies_to_captions_near_the_banks_images(case, tile, temperature):
    images, bank = case[0].double().numpy(), case[2].double().numpy()
    of_bank = bank @ images.T
    attracts = (of_bank >= of_bank.max(1, keepdims=True) - 1e-9).any(0)

    def expected(s, queries):
        is_best = s >= s.max(0) - 1e-9
        active = (is_best & attracts[:, None]).any(0)
        assert 0 < active.sum() < CAPTIONS  # both kinds occur
        bias = np.log(np.exp(of_bank / temperature).sum(0))[:, None]
        return s / temperature - np.where(active, bias, 0)

    assert_ranks(case, "qb_norm", temperature, expected, case[2])


def test_extreme_temperatures_stay_finite(case):
    for name in ("dual_softmax", "inverted_softmax"):
        for augmented in METHODS[name].transform(case[0], case[1], [1e-4, 1e4]):
            assert all(features.isfinite().all() for features in augmented)


def test_options_offer_the_methods():
    assert tuple(METHODS) == RERANKINGS
