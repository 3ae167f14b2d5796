"""The facts of a report as plain dataclasses: which queries, hubs and shared captions it shows, and what is in them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clip_retrieval.data.dataset import KeyedImages, RetrievalDataset
from clip_retrieval.errors import printable
from clip_retrieval.evaluation.protocols import read_known_positives
from clip_retrieval.reporting.html.measure import SEED, Direction, Measured, contains

SHOWN = 5  # top items of a query
PER_GROUP = 20  # queries of a group in one direction
HUBS = 10
SHARED = 12  # captions of several images
SHARED_IMAGES = 8  # images of such a caption
LONGEST = 500  # characters of a shown text: a page has more than a thousand


@dataclass(frozen=True)
class Item:
    """An image with its first caption and its name, or a caption (image is None)."""

    image: int | None
    text: str
    name: str


@dataclass(frozen=True)
class Hit:
    """A retrieved item with its cosine. mark is "right", "judged" (only ECCV Caption says right) or "wrong"."""

    item: Item
    score: float
    mark: str


@dataclass(frozen=True)
class Query:
    """A query and its top items.

    Attributes:
        direction: "i2t" or "t2i".
        item: the query.
        groups: why it is shown: "worst", "best", "random", "judged", "won", "lost".
        rank: expected rank of the first relevant item.
        right: whether that is 1.
        tied: number of negatives that score the same as the first relevant item.
        top: the top items, best first.
        best: the first relevant item.
        other_rank, other_top: the same of the other run, for a query that is won or lost.
    """

    direction: str
    item: Item
    groups: tuple[str, ...]
    rank: float
    right: bool
    tied: int
    top: list[Hit]
    best: Hit
    other_rank: float | None = None
    other_top: Sequence[Hit] = ()


@dataclass(frozen=True)
class Hubs:
    """Items that are among the top items of many queries.

    Attributes:
        k: length of the top.
        items: (item, number of queries), most frequent first.
        mean: mean number of queries over all items.
        skewness: of these numbers (Radovanovic et al., 2010); 0 for a symmetric distribution.
        never: percent of the items that no query has in its top.
    """

    k: int
    items: list[tuple[Item, int]]
    mean: float
    skewness: float
    never: float


@dataclass(frozen=True)
class SharedCaption:
    """A caption that occurs with several images: some of them, and their number."""

    text: str
    images: list[Item]
    count: int


@dataclass(frozen=True)
class Facts:
    """Everything that a report shows of the retrieved items.

    Attributes:
        queries: the shown queries, i2t first, group by group.
        hubs: by direction: hub captions of i2t, hub images of t2i.
        shared: captions of several images, the most frequent first, and `shared_count`, the number of all.
        misses: by direction, the queries that are not right.
        explained: by direction, the misses whose first item has the same caption as a relevant one.
        judged: by direction, the misses whose first item is right by ECCV Caption; None without its judgements.
        outcomes: by direction, the number of queries that both runs, only this, only the other, and no run gets right;
            empty without another run.
    """

    queries: list[Query]
    hubs: dict[str, Hubs]
    shared: list[SharedCaption]
    shared_count: int
    misses: dict[str, int]
    explained: dict[str, int]
    judged: dict[str, int] | None
    outcomes: dict[str, tuple[int, ...]]


MakeItem = Callable[[int], Item]


class _Namer:
    """Makes the items of a data set."""

    def __init__(self, dataset: RetrievalDataset):
        self.dataset = dataset
        pairs = dataset.pairs
        rows, first = np.unique(pairs[:, 0], return_index=True)
        self.caption_of = dict(zip(rows.tolist(), pairs[first, 1].tolist()))

    def image(self, index: int) -> Item:
        images = self.dataset.images
        name = images.key(index) if isinstance(images, KeyedImages) else Path(images.name(index)).name
        caption = self.caption_of.get(index)
        text = "an image without a caption" if caption is None else self.dataset.captions[caption]
        return Item(index, shorten(text), shorten(name))

    def caption(self, index: int) -> Item:
        return Item(None, shorten(self.dataset.captions[index]), shorten(f"caption {self.dataset.caption_name(index)}"))

    def items(self, direction: str) -> tuple[int, MakeItem]:
        """The number of items that the queries of a direction retrieve, and the function that makes one."""
        if direction == "i2t":
            return len(self.dataset.captions), self.caption
        return len(self.dataset.images), self.image


def shorten(text: str) -> str:
    """A printable text of at most LONGEST characters; the end of a longer one is cut."""
    return printable(text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…")


def read_judged_pairs(dataset: RetrievalDataset) -> np.ndarray:
    """Read the (image index, caption index) pairs that match by ECCV Caption (Chun et al., 2022), int64 (n, 2).

    Empty unless the data are COCO's test split and eccv-caption is installed.
    """
    positives = read_known_positives("eccv", dataset) if (dataset.name, dataset.split) == ("coco", "test") else None
    pairs = np.concatenate(list((positives or {"": np.empty((0, 2), np.int64)}).values()))
    return np.unique(pairs[pairs.min(axis=1, initial=0) >= 0], axis=0)


def collect(measured: Measured, dataset: RetrievalDataset, other: Measured | None = None) -> Facts:
    """Collect the facts of a run, and of its comparison with another run on the same data."""
    namer, images_of, judged = _Namer(dataset), group_images(dataset), read_judged_pairs(dataset)
    facts = Facts([], {}, *_list_shared(images_of, namer), {}, {}, {} if len(judged) else None, {})
    for name in ("i2t", "t2i"):
        one: Direction = getattr(measured, name)
        another: Direction | None = getattr(other, name) if other else None
        # the shown queries
        pairs = judged if name == "i2t" else judged[:, ::-1]
        facts.queries.extend(_list_queries(name, one, another, pairs, namer))
        # hubs and counts
        count, make_item = namer.items(name)
        facts.hubs[name] = find_hubs(one.items, count, make_item)
        wrong = ~one.right
        facts.misses[name] = int(wrong.sum())
        facts.explained[name] = int((wrong & _shares_caption(one, name, dataset, images_of)).sum())
        if facts.judged is not None:
            facts.judged[name] = int((wrong & _find_judged(one, pairs)[:, 0]).sum())
        if another is not None:
            a, b = one.right, another.right
            facts.outcomes[name] = tuple(int(both.sum()) for both in (a & b, a & ~b, ~a & b, ~a & ~b))
    return facts


def _find_judged(one: Direction, judged: np.ndarray) -> np.ndarray:
    """Whether only the judged pairs (n, 2) of (query, item) say that a top item is right, bool (queries, k)."""
    found = contains(judged, np.repeat(one.ranks.queries, one.items.shape[1]), one.items.ravel())
    return found.reshape(one.items.shape) & ~one.relevant


def _list_queries(
    name: str, one: Direction, another: Direction | None, judged: np.ndarray, namer: _Namer
) -> Iterator[Query]:
    """Yield the shown queries of a direction."""
    _, make_item = namer.items(name)
    _, make_query = namer.items("t2i" if name == "i2t" else "i2t")
    is_judged = _find_judged(one, judged)
    is_judged_too = _find_judged(another, judged) if another else is_judged
    for row, groups in choose(one, is_judged, another).items():
        versus = another if {"won", "lost"} & set(groups) else None
        yield Query(
            direction=name,
            item=make_query(int(one.ranks.queries[row])),
            groups=groups,
            rank=float(one.rank[row]),
            right=bool(one.right[row]),
            tied=int(one.ranks.tied[row]),
            top=_list_hits(one, row, make_item, is_judged[row]),
            best=Hit(make_item(int(one.best[row])), float(one.best_score[row]), "right"),
            other_rank=float(versus.rank[row]) if versus else None,
            other_top=_list_hits(versus, row, make_item, is_judged_too[row]) if versus else (),
        )


def _list_shared(images_of: dict[str, set[int]], namer: _Namer) -> tuple[list[SharedCaption], int]:
    """The captions of the most images, and the number of captions of several images."""
    shared = sorted(((t, i) for t, i in images_of.items() if len(i) > 1), key=lambda entry: -len(entry[1]))
    shown = [
        SharedCaption(shorten(text), [namer.image(i) for i in sorted(images)[:SHARED_IMAGES]], len(images))
        for text, images in shared[:SHARED]
    ]
    return shown, len(shared)


def choose(one: Direction, judged: np.ndarray, other: Direction | None) -> dict[int, tuple[str, ...]]:
    """Choose the rows of the queries to show, with their groups, PER_GROUP of each.

    worst: the highest ranks above 1; best: right, with the largest margin to the best negative; judged: wrong by the
    data set, with a first item that ECCV Caption judges right; won, lost: the largest change of the logarithm of the
    rank; random: of all queries, to see the usual ones.
    """
    margin = np.where(one.right, one.best_score - np.nan_to_num(one.hardest, nan=-1), -np.inf)
    groups: dict[str, Sequence[int] | np.ndarray] = {}
    if other is not None:
        gain = np.log(other.rank) - np.log(one.rank)
        groups["won"] = [row for row in np.argsort(-gain, kind="stable")[:PER_GROUP] if gain[row] > 0]
        groups["lost"] = [row for row in np.argsort(gain, kind="stable")[:PER_GROUP] if gain[row] < 0]
    groups |= {
        "worst": [row for row in np.argsort(-one.rank, kind="stable")[:PER_GROUP] if not one.right[row]],
        "best": [row for row in np.argsort(-margin, kind="stable")[:PER_GROUP] if one.right[row]],
        "judged": np.flatnonzero(~one.right & judged[:, 0])[:PER_GROUP],
        "random": np.random.default_rng(SEED).permutation(len(one.rank))[:PER_GROUP],
    }
    chosen: defaultdict[int, list[str]] = defaultdict(list)
    for name, rows in groups.items():
        for row in rows:
            chosen[int(row)].append(name)
    return {row: tuple(names) for row, names in chosen.items()}


def _list_hits(one: Direction, row: int, make_item: MakeItem, judged: np.ndarray) -> list[Hit]:
    hits = []
    for place, (item, score) in enumerate(zip(one.items[row, :SHOWN].tolist(), one.scores(row))):
        mark = "right" if one.relevant[row, place] else "judged" if judged[place] else "wrong"
        hits.append(Hit(make_item(item), float(score), mark))
    return hits


def find_hubs(items: np.ndarray, count: int, make_item: MakeItem) -> Hubs:
    """Find the most frequent of `count` items among the top items (queries, k)."""
    numbers = np.bincount(items.ravel(), minlength=count)
    frequent = np.argsort(-numbers, kind="stable")[:HUBS]
    deviation = numbers - numbers.mean()
    spread = float(numbers.std())
    return Hubs(
        k=items.shape[1],
        items=[(make_item(int(item)), int(numbers[item])) for item in frequent],
        mean=float(numbers.mean()),
        skewness=float((deviation**3).mean()) / spread**3 if spread else 0.0,
        never=100 * float((numbers == 0).mean()),
    )


def group_images(dataset: RetrievalDataset) -> dict[str, set[int]]:
    """The images of each distinct caption. Case, outer spaces and a final period do not make captions distinct."""
    images_of: defaultdict[str, set[int]] = defaultdict(set)
    for image, caption in dataset.pairs.tolist():
        images_of[_normalize(dataset.captions[caption])].add(image)
    return images_of


def _normalize(caption: str) -> str:
    return caption.casefold().strip(" .")


def _shares_caption(one: Direction, name: str, dataset: RetrievalDataset, images_of: dict[str, set[int]]) -> np.ndarray:
    """Whether the first item of each query has the same caption as a relevant item, bool (queries,)."""
    images, captions = (one.ranks.queries, one.items[:, 0]) if name == "i2t" else (one.items[:, 0], one.ranks.queries)
    empty: set[int] = set()
    pairs = zip(images.tolist(), captions.tolist())
    return np.array([image in images_of.get(_normalize(dataset.captions[c]), empty) for image, c in pairs])
