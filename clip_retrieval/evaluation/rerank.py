"""Re-ranking: scores normalised with statistics of the other queries or items.

    for images, texts in METHODS["csls"].transform(image_features, text_features, [10]):
        i2t, t2i = retrieval_ranks(images, texts, pairs)

A single caption or image cannot be ranked in this way: most methods see all test queries. Their results are therefore
reported apart from plain recall.

Every method here adds a bias to each item, which depends on the query not at all, or only in whether it applies. So
the transformed scores are inner products of features with further dimensions, and `ranks.retrieval_ranks` ranks them
exactly. A bias of the query itself changes nothing: the biases of both sides serve both directions at once. The
statistics are float64, from tiles: memory grows with images + captions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clip_retrieval.evaluation.scores import TIE, Features, check_dimensions, scoring_device, tile_size

Augmented = Iterator[tuple[Tensor, Tensor]]
"""Float64 features of images and captions, (images, dim + d) and (captions, dim + d), for each value of a parameter."""


@dataclass(frozen=True)
class Method:
    """A method of re-ranking.

    Attributes:
        uses: the data that it needs besides the query and the items.
        parameter: the name of its parameter.
        default: the value if there is no val split to choose on: the paper's, or its code's.
        grid: the values to choose from on the val split.
        transform: (image features, text features, values) or, with `needs_bank`, (image features, text features,
            values, bank), to the features to rank for each value.
        directions: the directions that it changes.
    """

    uses: str
    parameter: str
    default: float
    grid: tuple[float, ...]
    transform: Callable[..., Augmented]
    needs_bank: bool = False
    directions: tuple[str, ...] = ("i2t", "t2i")


def dual_softmax(images: Tensor, texts: Tensor, temperatures: Sequence[float]) -> Augmented:
    """The product of the softmaxes over images and over captions, exp(2 s / T) / (sum_i exp(s / T) sum_j exp(s / T)).

    CAMoE (arXiv:2109.04290) multiplies the score itself by the softmax over queries. The second softmax here makes the
    order independent of the scores' zero.
    """
    for temperature, of_images, of_texts in _log_sums(images, texts, temperatures):
        yield _add_biases(images, texts, -temperature / 2 * of_images, -temperature / 2 * of_texts)


def inverted_softmax(images: Tensor, texts: Tensor, temperatures: Sequence[float]) -> Augmented:
    """The softmax over the queries, not over the items (arXiv:1702.03859): exp(s / T) / sum_queries exp(s / T)."""
    for temperature, of_images, of_texts in _log_sums(images, texts, temperatures):
        yield _add_biases(images, texts, -temperature * of_images, -temperature * of_texts)


def csls(images: Tensor, texts: Tensor, ks: Sequence[float]) -> Augmented:
    """Cross-domain similarity local scaling (arXiv:1710.04087): 2 s - the mean score of each side's k neighbours."""
    a, b = _pair(images, texts)
    for k in ks:
        of_images, of_texts = _top_means(a, b, int(k))
        yield _add_biases(images, texts, -of_images / 2, -of_texts / 2)


def distribution_normalization(images: Tensor, texts: Tensor, shares: Sequence[float]) -> Augmented:
    """Subtract a share of the mean feature of each side (arXiv:2302.11084)."""
    device = scoring_device(images, None)
    a, b = images.to(device, torch.float64), texts.to(device, torch.float64)
    for share in shares:
        yield a - share * a.mean(0), b - share * b.mean(0)


def qb_norm(images: Tensor, texts: Tensor, temperatures: Sequence[float], bank: Tensor) -> Augmented:
    """Dynamic inverted softmax with a bank of training captions, (bank, dim), as queries (arXiv:2112.12777).

    Text-to-image only: the sum of the inverted softmax is over the bank. It applies to the captions whose best image is
    also the best image of a caption of the bank (the paper's activation set with k = 1); others keep their scores.
    """
    a, b = _pair(images, texts)
    queries = _features(bank, a.norms.device)
    check_dimensions(a, queries)
    # images that attract the bank, and captions whose best image is one of them
    attracts = torch.zeros(len(a), dtype=torch.bool, device=a.norms.device)
    for _, columns, best in _best_items(queries, a):
        attracts[columns] |= best.any(0)
    is_active = torch.zeros(len(b), dtype=torch.bool, device=a.norms.device)
    for rows, columns, best in _best_items(b, a):
        is_active[rows] |= (best & attracts[columns]).any(1)
    active = is_active.double()[:, None]
    for temperature, _, of_images in _log_sums(bank, images, temperatures):
        yield (
            torch.cat([images.to(active), -temperature * of_images[:, None]], dim=1),
            torch.cat([texts.to(active), active], dim=1),
        )


TEMPERATURES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
METHODS = {
    # 0.01 is CLIP's own temperature; 1 / 30 is the default of MUSE's inverted softmax, 1 / 20 that of QB-Norm's code
    "dual_softmax": Method("all test queries", "temperature", 0.01, TEMPERATURES, dual_softmax),
    "inverted_softmax": Method("all test queries", "temperature", 1 / 30, TEMPERATURES, inverted_softmax),
    "qb_norm": Method(
        "training captions", "temperature", 1 / 20, TEMPERATURES, qb_norm, needs_bank=True, directions=("t2i",)
    ),
    "csls": Method("all test queries", "k", 10, (1, 2, 5, 10, 20, 50), csls),
    "dist_norm": Method(
        "means of all test images and captions", "share", 0.25, (0.125, 0.25, 0.5, 0.75, 1), distribution_normalization
    ),
}
"""The methods of --rerank."""


def _add_biases(images: Tensor, texts: Tensor, of_images: Tensor, of_texts: Tensor) -> tuple[Tensor, Tensor]:
    """Features whose inner products are s(i, j) + of_images[i] + of_texts[j]."""
    ones = torch.ones_like(of_images)[:, None], torch.ones_like(of_texts)[:, None]
    return (
        torch.cat([images.to(of_images), of_images[:, None], ones[0]], dim=1),
        torch.cat([texts.to(of_texts), ones[1], of_texts[:, None]], dim=1),
    )


def _log_sums(images: Tensor, texts: Tensor, temperatures: Sequence[float]) -> Iterator[tuple[float, Tensor, Tensor]]:
    """Yield (T, log sum_texts exp(s / T) (images,), log sum_images exp(s / T) (texts,)) for each temperature T."""
    a, b = _pair(images, texts)
    of_images = [torch.full_like(a.norms, -torch.inf) for _ in temperatures]
    of_texts = [torch.full_like(b.norms, -torch.inf) for _ in temperatures]
    for rows, columns, scores in _exact_tiles(a, b):
        for index, temperature in enumerate(temperatures):
            logits = scores / temperature
            torch.logaddexp(of_images[index][rows], logits.logsumexp(1), out=of_images[index][rows])
            torch.logaddexp(of_texts[index][columns], logits.logsumexp(0), out=of_texts[index][columns])
    yield from zip(temperatures, of_images, of_texts)


def _top_means(a: Features, b: Features, k: int) -> tuple[Tensor, Tensor]:
    """Mean of the k highest scores of each item of a (len(a),) and of b (len(b),); of all if there are fewer."""
    best_a = a.norms.new_full((len(a), min(k, len(b))), -torch.inf)
    best_b = a.norms.new_full((len(b), min(k, len(a))), -torch.inf)
    for rows, columns, scores in _exact_tiles(a, b):
        best_a[rows] = torch.cat([best_a[rows], scores], dim=1).topk(best_a.shape[1], dim=1).values
        best_b[columns] = torch.cat([best_b[columns], scores.T], dim=1).topk(best_b.shape[1], dim=1).values
    return best_a.mean(1), best_b.mean(1)


def _best_items(queries: Features, items: Features) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield tiles (queries, items, mask) whose mask holds the best item of each query, and all items equal to it."""
    best = torch.full_like(queries.norms, -torch.inf)
    for rows, _, scores in _exact_tiles(queries, items):
        best[rows] = torch.maximum(best[rows], scores.amax(1))
    tie = TIE * queries.norms * items.norms.max() / (queries.scale * items.scale)
    for rows, columns, scores in _exact_tiles(queries, items):
        yield rows, columns, scores >= (best - tie)[rows, None]


def _exact_tiles(a: Features, b: Features) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield the float64 scores of a and b in tiles."""
    height, width = tile_size(a.norms.device)
    for top in range(0, len(a), height):
        rows = slice(top, min(top + height, len(a)))
        block = a.exact(rows) / (a.scale * b.scale)
        for left in range(0, len(b), width):
            columns = slice(left, min(left + width, len(b)))
            yield rows, columns, block @ b.exact(columns).T


def _pair(images: Tensor, texts: Tensor) -> tuple[Features, Features]:
    device = scoring_device(images, None)
    a, b = _features(images, device), _features(texts, device)
    check_dimensions(a, b)
    return a, b


def _features(features: Tensor, device: torch.device) -> Features:
    return Features(features, device, "item", str)
