"""How often the right class comes first: accuracy from ranks. Percent.

An image is a query, the classes are the items, and the image's own class is the one that is relevant. So ties are
those of `evaluation.ranks`: a class that scores the same as the right one takes the image with the chance that a
random order gives it, and a model that gives all classes the same score gets chance.
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
    """Accuracy over all images, and of each class.

    Args:
        ranks: of each image, its own class being what is relevant, (images,).
        predicted: int (images,), the class that scores best.
        labels: int (images,), the image's own class.
        class_names: (classes,).

    Returns:
        {"top1", "top5", "top10" (those of at most as many as there are classes), "mean_per_class" (the mean of the
        classes' top1: a class counts the same whatever the number of its images), "per_class": [{"label", "class",
        "images", "top1", "confused_with", "confused"}, ...]}. confused_with is the class that most of a class's
        images are taken for instead, None where there are none, and confused the percent of its images. Classes
        without images are left out.
    """
    found: dict[str, Any] = {f"top{k}": recall_at(ranks, k) for k in TOP_K if k <= len(class_names)}
    order = np.argsort(labels, kind="stable")
    starts = np.flatnonzero(np.diff(labels[order], prepend=-1))
    per_class = []
    for rows in np.split(order, starts[1:]):
        label = int(labels[rows[0]])
        of_class = Ranks(ranks.above[rows], ranks.tied[rows], ranks.positives[rows])
        taken_for = np.bincount(predicted[rows], minlength=len(class_names))
        taken_for[label] = 0
        most = int(taken_for.argmax())
        per_class.append(
            {
                "label": label,
                "class": class_names[label],
                "images": len(rows),
                "top1": recall_at(of_class, 1),
                "confused_with": class_names[most] if taken_for[most] else None,
                "confused": 100 * int(taken_for[most]) / len(rows),
            }
        )
    mean = sum(each["top1"] for each in per_class) / len(per_class)
    return {**found, "mean_per_class": mean, "per_class": per_class}
