"""Batches of near neighbours: the wished share, by brute force, each pair once, and no false negative."""

import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clip_retrieval.data.batches.hard_negatives import Composer, Duplicates, find_same_bytes
from clip_retrieval.data.captions import normalize_caption
from clip_retrieval.data.dataset import RetrievalDataset
from clip_retrieval.data.images.image_files import ImageArray, ImageFiles
from clip_retrieval.data.mixture import mix


def dataset(captions_of):
    """A dataset with these captions of each image."""
    images = ImageArray(np.zeros((len(captions_of), 2, 2, 3), np.uint8), "test")
    captions = [caption for captions in captions_of for caption in captions]
    owners = np.repeat(np.arange(len(captions_of)), [len(captions) for captions in captions_of])
    return RetrievalDataset("test", "train", images, captions, np.stack([owners, np.arange(len(captions))], axis=1))


def is_alike(data, same_bytes, a, b):
    """Whether two images are the same, or have a caption in common, by brute force."""
    first, pairs = (same_bytes[a], same_bytes[b]), data.pairs.tolist()
    texts = [{normalize_caption(data.captions[c]) for i, c in pairs if same_bytes[i] == image} for image in first]
    return first[0] == first[1] or bool(texts[0] & texts[1])


class Case:
    """A composed epoch, with all that a check by brute force needs."""

    def __init__(self, captions_of, same_bytes, by, size, share, seed, k=None):
        rng = np.random.default_rng(seed)
        self.data, self.same_bytes = dataset(captions_of), np.asarray(same_bytes)
        duplicates = Duplicates.find(self.data, self.same_bytes)
        kept = rng.permutation(len(self.data.pairs))[: len(self.data.pairs) // size * size]
        self.images, captions = self.data.pairs[kept].T
        items = duplicates.image[self.images] if by == "image" else duplicates.caption[captions]
        self.entity = np.unique(items, return_inverse=True)[1]
        self.features = rng.standard_normal((self.entity.max() + 1, 4))
        self.size, self.wanted = size, min(round(share * size), size - 1)

        def find_neighbours(entities):
            scores = self.features[entities] @ self.features[entities].T
            np.fill_diagonal(scores, -np.inf)
            return np.argsort(-scores, axis=1)[:, : k or len(entities)]

        self.batches, self.added = Composer(self.images, self.entity, duplicates, find_neighbours).compose(size, share)

    def count_neighbours(self):
        """Replay each batch; return how many pairs are the nearest usable neighbour of an earlier one."""
        used, found = set(), 0
        for batch in self.batches.tolist():
            members = batch[: self.size - self.wanted]
            used |= set(members)
            for pair in batch[self.size - self.wanted :]:
                nearest = {self.entity_nearest_to(member, members, used) for member in members}
                if self.entity[pair] in nearest:
                    found += 1
                else:  # random: no member has a usable neighbour
                    assert nearest == {None}
                members.append(pair)
                used.add(pair)
        return found

    def entity_nearest_to(self, member, members, used):
        """The entity with an unused pair that is no duplicate of a member, with the highest score."""
        usable = {
            self.entity[pair]
            for pair in range(len(self.images))
            if pair not in used and not self.conflicts(self.next_pair(self.entity[pair], used), members)
        }
        usable.discard(self.entity[member])
        scores = self.features @ self.features[self.entity[member]]
        return max(usable, key=lambda entity: scores[entity], default=None)

    def next_pair(self, entity, used):
        return next(pair for pair in np.flatnonzero(self.entity == entity) if pair not in used)

    def conflicts(self, pair, members):
        return any(is_alike(self.data, self.same_bytes, self.images[pair], self.images[m]) for m in members)


@st.composite
def cases(draw):
    words = st.sampled_from([f"caption {letter}" for letter in "abcdefghijklmnopqrstuvwxyz"])
    captions_of = draw(st.lists(st.lists(words, min_size=1, max_size=3), min_size=4, max_size=16))
    same = np.arange(len(captions_of))
    for copy in draw(st.lists(st.integers(1, len(captions_of) - 1), max_size=3)):
        same[copy] = same[copy - 1]
    pairs = sum(map(len, captions_of))
    size, share = draw(st.integers(2, min(8, pairs))), draw(st.sampled_from([0.0, 0.25, 0.5, 0.8, 1.0]))
    return captions_of, same, draw(st.sampled_from(["image", "text"])), size, share, draw(st.integers(0, 9))


@given(cases())
@settings(max_examples=60, deadline=None)
def test_batches_hold_the_nearest_neighbours_that_are_no_false_negatives(case):
    composed = Case(*case)
    assert sorted(composed.batches.ravel()) == list(range(len(composed.images)))
    assert composed.count_neighbours() == composed.added


@pytest.mark.parametrize("by", ["image", "text"])
@pytest.mark.parametrize("share, k", [(0.1, 8), (0.5, 16), (0.9, 64), (1.0, 64)])
def test_share_is_reached_with_short_lists_of_neighbours(by, share, k):
    captions_of = [[f"{image} {caption}" for caption in range(3)] for image in range(400)]
    case = Case(captions_of, np.arange(400), by, 20, share, 0, k=k)
    wanted = case.wanted * len(case.batches)
    assert wanted * 0.97 <= case.added <= wanted
    assert sorted(case.batches.ravel()) == list(range(len(case.images)))
    images = case.images[case.batches]
    repeats = [20 - len(set(batch)) for batch in images.tolist()]
    assert sum(repeats) < 0.01 * images.size, sum(repeats)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_random_pairs_are_no_false_negatives_either(share):
    captions_of = [[f"caption {image % 150}", f"own {image}"] for image in range(300)]
    same_bytes = np.minimum(np.arange(300), 290)
    case = Case(captions_of, same_bytes, "image", 12, share, 0)
    for batch in case.batches[:40].tolist():  # of 50: the last ones have no choice
        for number, pair in enumerate(batch):
            assert not case.conflicts(pair, batch[:number])


def test_captions_of_equal_images_count_for_each_of_them():
    captions_of = [["a"], ["b"], ["B."], *([f"own {image}"] for image in range(9))]
    duplicates = Duplicates.find(dataset(captions_of), np.array([0, 0, *range(2, 12)]))  # 0 and 1 are one picture
    composer = Composer(
        np.arange(12), np.arange(12), duplicates, lambda entities: np.argsort(entities)[None].repeat(12, 0)
    )
    assert set(composer._first_distinct(duplicates.image[np.array([0, 2, 3])])) == {0, 2}


def test_hard_negatives_are_near_and_random_pairs_are_not():
    case = Case([[str(image)] for image in range(600)], np.arange(600), "image", 30, 0.5, 0)
    unit = case.features / np.linalg.norm(case.features, axis=1, keepdims=True)

    def nearest(batch):
        cosines = unit[case.entity[batch]] @ unit[case.entity[batch]].T - 2 * np.eye(len(batch))
        return np.sort(cosines.max(axis=1)).mean()

    random = np.random.default_rng(1).permutation(600).reshape(-1, 30)
    assert np.mean([nearest(b) for b in case.batches]) > 0.05 + np.mean([nearest(b) for b in random])


@pytest.mark.parametrize(
    "a, b, equal",
    [
        ("A dog.", "a  DOG", True),
        ("a-dog!", "adog", True),
        ("一只狗。", "一只狗", True),
        ("!", "?", False),
        ("a", "b", False),
    ],
)
def test_captions_are_compared_without_case_and_punctuation(a, b, equal):
    assert (normalize_caption(a) == normalize_caption(b)) is equal


def test_equal_files_are_found_across_the_parts_of_a_mixture(tmp_path):
    rng = np.random.default_rng(0)
    for name in "ab":
        Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    shutil.copy(tmp_path / "a.png", tmp_path / "c.png")
    files = ImageFiles([str(tmp_path / f"{name}.png") for name in "bac"])
    data = RetrievalDataset("files", "train", files, ["x", "y", "z"], np.array([(0, 0), (1, 1), (2, 2)]))
    assert find_same_bytes(data).tolist() == [0, 1, 1]
    assert find_same_bytes(dataset([["a"], ["b"]])).tolist() == [0, 1]
    assert find_same_bytes(mix([data, dataset([["a"]]), data], "mixed")).tolist() == [0, 1, 1, 3, 0, 1, 1]
