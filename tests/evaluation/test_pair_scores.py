"""Scores of pair tasks against hand-computed examples and a loop over the authors' definitions."""

import numpy as np
import torch
from torch.nn.functional import normalize

from clip_retrieval.evaluation.pair_scores import group_accuracies, score_choices, score_winoground, summarize


def features(count, seed, dim=6):
    return normalize(torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_choices_are_those_of_a_loop():
    images, captions = features(9, 0), features(30, 1)
    rng = np.random.default_rng(0)
    image, options = rng.integers(9, size=40), np.stack([rng.permutation(30)[:5] for _ in range(40)])
    values, ties = score_choices(images, captions, image, options)
    for row, (i, (true, *false)) in enumerate(zip(image, options)):
        cosines = (captions.double() @ images[i].double()).numpy()
        assert values[row] == float(cosines[true] > cosines[false].max())
    assert not ties.any() and 0 < values.mean() < 1


def test_tied_captions_count_as_a_random_choice():
    captions = torch.eye(4)[[0, 0, 0, 1]]
    image = torch.eye(4)[:2]
    values, ties = score_choices(image, captions, np.array([0, 0, 0, 1]), np.array([[0, 3], [0, 1], [3, 1], [3, 0]]))
    assert values.tolist() == [1, 0.5, 0, 1] and ties.tolist() == [False, True, False, False]
    values, _ = score_choices(image, captions, np.array([0]), np.array([[0, 1, 2]]))
    assert values.tolist() == [1 / 3]
    assert summarize(torch.tensor([1.0, 0.5]), torch.tensor([False, True])) == {
        "accuracy": 75,
        "examples": 2,
        "ties": 1,
    }


def test_winoground_scores_are_those_of_its_definitions():
    images, captions = features(60, 0), features(60, 1)
    pairs = np.arange(60).reshape(30, 2)
    found = score_winoground(images, captions, pairs, pairs)
    for row, (a, b) in enumerate(pairs):
        s = (images.double() @ captions.double().T).numpy()
        text = s[a, a] > s[a, b] and s[b, b] > s[b, a]
        image = s[a, a] > s[b, a] and s[b, b] > s[a, b]
        assert [found[name][row] for name in ("text", "image", "group")] == [text, image, text and image]
    assert not found["ties"].any() and 0 < found["group"].mean() < found["text"].mean()


def test_equal_captions_of_winoground_are_guessed():
    images, captions = torch.eye(2), torch.ones(2, 2) / 2**0.5
    both = np.array([[0, 1]])
    found = score_winoground(images, captions, both, both)
    assert [float(found[name]) for name in ("text", "image", "group")] == [0.25, 0.25, 0.0625] and found["ties"].all()


def test_group_accuracies_are_means_by_name():
    assert list(group_accuracies(torch.ones(2), ["a\0", "a"])) == ["a", "a\0"]
    found = group_accuracies(torch.tensor([1.0, 0.0, 0.5]), ["b", "a", "b"])
    assert found == {"a": {"accuracy": 0, "examples": 1}, "b": {"accuracy": 75, "examples": 2}}
