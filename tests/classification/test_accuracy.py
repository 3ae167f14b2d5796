import numpy as np
import pytest

from clip_retrieval.classification.accuracy import accuracy_report
from clip_retrieval.classification.report import per_class_table, summary
from clip_retrieval.evaluation.ranks import Ranks

NAMES = ["cat", "dog", "猫头鹰", "bee", "fox", "yak"]


def ranks(above, tied=None):
    above = np.array(above)
    tied = np.zeros_like(above) if tied is None else np.array(tied)
    return Ranks(above, tied, np.ones_like(above), np.arange(len(above)))


@pytest.fixture
def report():
    """Hand-computed: four cats (one predicted as dog, two as owl), two dogs (one predicted as cat), one owl."""
    labels = np.array([0, 1, 0, 0, 2, 1, 0])
    predicted = np.array([0, 0, 2, 1, 2, 1, 2])
    return accuracy_report(ranks([0, 1, 4, 5, 0, 0, 2]), predicted, labels, NAMES)


def test_accuracy_over_images_and_over_classes(report):
    assert report["top1"] == pytest.approx(100 * 3 / 7)
    assert report["top5"] == pytest.approx(100 * 6 / 7)
    assert report["mean_per_class"] == pytest.approx((25 + 50 + 100) / 3)


def test_six_classes_have_no_top_10(report):
    assert [name for name in report if name.startswith("top")] == ["top1", "top5"]
    twelve = accuracy_report(ranks([9, 10]), np.array([1, 1]), np.array([0, 0]), [str(i) for i in range(12)])
    assert (twelve["top1"], twelve["top5"], twelve["top10"]) == (0, 0, 50)


def test_most_frequent_confusion_of_each_class(report):
    rows = [(each["label"], each["class"], each["images"], each["top1"]) for each in report["per_class"]]
    assert rows == [(0, "cat", 4, 25), (1, "dog", 2, 50), (2, "猫头鹰", 1, 100)]
    assert [(each["confused_with"], each["confused"]) for each in report["per_class"]] == [
        ("猫头鹰", 50),
        ("cat", 50),
        (None, 0),
    ]


def test_ties_count_as_in_random_order():
    report = accuracy_report(ranks([0, 0, 1], [1, 2, 5]), np.array([0, 0, 0]), np.array([0, 0, 1]), NAMES)
    assert report["top1"] == pytest.approx(100 * (1 / 2 + 1 / 3) / 3)
    assert report["top5"] == pytest.approx(100 * (1 + 1 + 4 / 6) / 3)
    assert report["mean_per_class"] == pytest.approx(100 * (1 / 2 + 1 / 3) / 2 / 2)


def test_table_aligns_chinese_names(report):
    table = per_class_table({**report, "dataset": "animals", "images": 7, "classes": 6})
    assert table.splitlines() == [
        "class   images    top1  most confused with",
        "-" * 42,
        "cat          4   25.00  猫头鹰 (50.0)",
        "dog          2   50.00  cat (50.0)",
        "猫头鹰       1  100.00",
    ]
    line = summary({**report, "dataset": "animals", "images": 7, "classes": 6})
    assert line == "animals: 7 images, 6 classes  top1 42.86  top5 85.71  mean per class 58.33"
