"""Scores (inner products) of images and captions: exact in float64, fast in float32 with a proven error bound."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from clip_retrieval.device import disable_tf32
from clip_retrieval.errors import NotFiniteError, UserError

TIE = 1e-10  # scores of a query closer than this times |query| |item| are equal


class Features:
    """The features of images or captions: as given, in float32 for the fast product, and their float64 norms.

    `float32`, `norms` and `exact` are multiplied by `scale`, a power of two (so without rounding) that keeps every
    product within the range of float32 for features of any magnitude. For usual lengths it is 1, and float32 features
    are not copied.

    kind ("image", "caption") and name(row) are the words for an item in messages. Raises UserError for features that
    are not a floating-point matrix, NotFiniteError for a feature that is not finite.
    """

    def __init__(self, features: Tensor | np.ndarray, device: torch.device, kind: str, name: Callable[[int], str]):
        self.kind = kind
        self.features = _as_tensor(features, kind).to(device)
        count, self.dim = self.features.shape
        low, high = (float(bound) for bound in torch.aminmax(self.features))
        largest = max(-low, high)
        if not (math.isfinite(low) and math.isfinite(high)):
            self._raise_not_finite(name)
        exponent = math.frexp(largest)[1] + math.ceil(math.log2(self.dim) / 2) if largest else 0
        self.scale = 1.0 if abs(exponent) <= 20 else 2.0 ** -min(max(exponent, -1020), 1020)
        copied = self.scale != 1 or self.features.dtype != torch.float32
        self.float32 = torch.empty_like(self.features, dtype=torch.float32) if copied else self.features
        self.norms = torch.empty(count, dtype=torch.float64, device=device)
        step = self.chunk()
        for rows in (slice(start, start + step) for start in range(0, count, step)):
            exact = self.exact(rows)
            self.norms[rows] = torch.linalg.vector_norm(exact, dim=1)
            if copied:
                self.float32[rows] = exact

    def __len__(self) -> int:
        return len(self.norms)

    def exact(self, rows: slice | Tensor) -> Tensor:
        """The scaled features of these rows in float64, (rows, dim)."""
        exact = self.features[rows].double()
        return exact if self.scale == 1 else exact * self.scale

    def chunk(self) -> int:
        """Number of features to convert to float64 at a time; on a CPU they fit the cache."""
        return max(1, (2**20 if self.norms.device.type == "cpu" else 2**26) // self.dim)

    def _raise_not_finite(self, name: Callable[[int], str]) -> None:
        row = next(i for i, feature in enumerate(self.features) if not feature.isfinite().all())
        item = "" if name(row) == str(row) else f' ("{name(row)}")'
        raise NotFiniteError(f"{self.kind} {row}{item}: feature is not finite and cannot be scored")


def exact_scores(left: Features, i: Tensor, right: Features, j: Tensor) -> Tensor:
    """Compute the float64 scores of left[i] with right[j], (len(i),)."""
    chunks = zip(i.split(left.chunk()), j.split(left.chunk()))
    return torch.cat([(left.exact(a) * right.exact(b)).sum(1) for a, b in chunks])


@dataclass
class Tile:
    """A block of images x captions: float32 scores (rows, columns), with -inf at the relevant pairs."""

    rows: slice
    columns: slice
    positives: tuple[Tensor, Tensor]
    """(row, column) of the relevant pairs, relative to the tile."""
    scores: Tensor
    space: Tensor
    """Scratch memory of the same shape. The next tile overwrites both."""


def fast_tiles(
    images: Features, texts: Features, image: Tensor, text: Tensor, size: tuple[int, int], deal: slice = slice(None)
) -> Iterator[Tile]:
    """Yield all scores in tiles of `size` (images, captions); image, text (P,) are the relevant pairs.

    `deal` selects some of the tiles, for processes that share them.
    """
    # sort the relevant pairs by tile
    height, width = min(size[0], len(images)), min(size[1], len(texts))
    across = math.ceil(len(texts) / width)
    number, order = (image // height * across + text // width).sort()
    image, text = image[order], text[order]
    numbers = torch.arange(math.ceil(len(images) / height) * across + 1, device=number.device)
    starts = torch.searchsorted(number, numbers).tolist()
    # score one tile at a time in the same memory
    memory = images.float32.new_empty(2, height * width)
    for index, (start, end) in list(enumerate(pairwise(starts)))[deal]:
        top, left = index // across * height, index % across * width
        rows, columns = slice(top, min(top + height, len(images))), slice(left, min(left + width, len(texts)))
        shape = rows.stop - top, columns.stop - left
        scores, space = memory[:, : math.prod(shape)].view(2, *shape)
        with disable_tf32():
            torch.mm(images.float32[rows], texts.float32[columns].T, out=scores)
        positives = image[start:end] - top, text[start:end] - left
        scores[positives] = -torch.inf
        yield Tile(rows, columns, positives, scores, space)


def check_dimensions(images: Features, texts: Features) -> None:
    """Raise UserError unless both have the same number of dimensions."""
    if images.dim != texts.dim:
        raise UserError(
            f"image features have {images.dim} dimensions and text features {texts.dim}: both must be equal"
        )


def rounding_bound(dim: int) -> tuple[float, float]:
    """Return (relative, absolute): a float32 score is within relative * |image| |text| + absolute of the exact one.

    With u = 2**-24, summing dim products in any order, fused or not, multiplies each product by at most dim factors
    (1 + e), |e| <= u; rounding the two inputs to float32 adds two more. So the error is at most
    gamma(dim + 2) * sum |x_k y_k| <= gamma(dim + 2) |x| |y|, with gamma(n) = n u / (1 - n u) (Higham, Accuracy and
    Stability of Numerical Algorithms, section 3.1, and Cauchy-Schwarz). Two more factors cover the rounding of the
    norms and of the margin itself. Each underflow, in an input, a product or a sum, adds an error of at most 2**-126,
    even if the hardware flushes subnormal numbers to zero. There are at most 4 dim of them, each multiplied by a number
    of about 1 (at most 2**26, see Features.scale).
    """
    steps = (dim + 4) * 2.0**-24
    return steps / (1 - steps), dim * 2.0**-96


def score_margin(queries: Features, items: Features) -> Tensor:
    """float64 (queries,): float32 scores of a query that are closer than this to a threshold are undecided."""
    # Twice the tie tolerance: once for ties, once for the last bits of the float64 scores.
    relative, absolute = rounding_bound(queries.dim)
    return queries.norms * items.norms.max() * (relative + 2 * TIE) + absolute


def scoring_device(features: Tensor | np.ndarray, device: torch.device | str | None) -> torch.device:
    """The given device, or by default that of the features; the CPU instead of MPS, which has no float64."""
    if device is None:
        device = features.device if isinstance(features, Tensor) else "cpu"
    device = torch.device(device)
    return torch.device("cpu") if device.type == "mps" else device


def tile_size(device: torch.device) -> tuple[int, int]:
    """Images x captions of a tile. CPU: fits the last-level cache. GPU: large enough to hide kernel launches."""
    return (1024, 1024) if device.type == "cpu" else (8192, 8192)


def _as_tensor(features: Tensor | np.ndarray, kind: str) -> Tensor:
    """The features as a detached floating-point tensor (items, dim). Raises UserError for anything else."""
    if isinstance(features, np.ndarray) and features.dtype.kind == "f":
        known = features.dtype.itemsize in (2, 4, 8)
        native = features.dtype.newbyteorder("=") if known else np.float64
        features = torch.from_numpy(np.require(features, native, ("C", "W")))
    if not isinstance(features, Tensor) or not features.is_floating_point():
        raise UserError(f"{kind} features have dtype {features.dtype}: expected floating-point numbers")
    if features.ndim != 2 or 0 in features.shape:
        shape = tuple(features.shape)
        raise UserError(f"{kind} features have shape {shape}: expected (items, dimensions), none of them 0")
    return features.detach()
