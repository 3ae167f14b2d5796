"""Top-k accuracy from ranks, in percent.

Each image is a query, the classes are the items, and the image's own class is the only relevant item. Ties are resolved
as in `evaluation.ranks`: the value is the expectation over a random order of equal scores, so a model that gives all
classes the same score gets chance accuracy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from clip_retrieval.evaluation.metrics import recall_at
from clip_retrieval.evaluation.ranks import Ranks

TOP_K = (1, 5, 10)


def accuracy_report(
    ranks: Ranks, predicted: np.ndarray, labels: np.ndarray, class_names: Sequence[str]
) -> dict[str, Any]:
    """Compute accuracy over all images and for each class.

    Args:
        ranks: rank of each image's own class among all classes, (images,).
        predicted: int (images,), the best-scoring class.
        labels: int (images,), the image's own class.
        class_names: (classes,).

    Returns:
        {"top1", "top5", "top10" (no k above the number of classes), "mean_per_class" (unweighted mean of the classes'
        top1), "per_class": [{"label", "class", "images", "top1", "confused_with", "confused"}, ...]}. confused_with is
        the most frequent wrong prediction for the class (None if all are right), confused its percentage of the class's
        images. Classes without images are skipped.
    """
    report: dict[str, Any] = {f"top{k}": recall_at(ranks, k) for k in TOP_K if k <= len(class_names)}
    # group the images by class
    order = np.argsort(labels, kind="stable")
    starts = np.flatnonzero(np.diff(labels[order], prepend=-1))
    per_class: list[dict[str, Any]] = []
    for rows in np.split(order, starts[1:]):
        label = int(labels[rows[0]])
        confusions = np.bincount(predicted[rows], minlength=len(class_names))
        confusions[label] = 0
        worst = int(confusions.argmax())
        per_class.append(
            {
                "label": label,
                "class": class_names[label],
                "images": len(rows),
                "top1": recall_at(ranks[rows], 1),
                "confused_with": class_names[worst] if confusions[worst] else None,
                "confused": 100 * int(confusions[worst]) / len(rows),
            }
        )
    mean = sum(each["top1"] for each in per_class) / len(per_class)
    return {**report, "mean_per_class": mean, "per_class": per_class}
