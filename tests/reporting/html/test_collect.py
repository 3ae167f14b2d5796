"""A report shows the right queries, hubs and shared captions."""

from dataclasses import replace

import numpy as np
import pytest

from clip_retrieval.data.dataset import RetrievalDataset
from clip_retrieval.evaluation import protocols
from clip_retrieval.reporting.html.collect import PER_GROUP, SHOWN, collect, find_hubs, group_images, read_judged_pairs
from clip_retrieval.reporting.html.collect import _Namer as Namer
from tests.reporting.html.conftest import HOSTILE_NAME, make_run


def test_worst_queries_come_first_with_their_ranks(photos):
    run = make_run(photos, noise=0.8)
    measured = run.measure()
    facts = collect(measured, photos)
    worst = [query for query in facts.queries if query.direction == "t2i" and "worst" in query.groups]
    expected = sorted((rank for rank in measured.t2i.rank if rank > 1), reverse=True)[:PER_GROUP]
    assert [query.rank for query in worst] == expected and len(worst) > 5
    assert not any(query.right for query in worst)
    assert facts.misses["t2i"] == (measured.t2i.rank > 1).sum()


def test_best_queries_are_right_with_the_largest_margins(photos):
    measured = make_run(photos, noise=0.3).measure()
    best = [query for query in collect(measured, photos).queries if query.direction == "i2t" and "best" in query.groups]
    margins = [query.best.score - next(hit.score for hit in query.top if hit.mark == "wrong") for query in best]
    assert all(query.right for query in best) and margins == sorted(margins, reverse=True)
    assert len(best) == min(PER_GROUP, measured.i2t.right.sum())


def test_items_have_marks_names_and_texts(photos):
    facts = collect(make_run(photos, noise=0.5).measure(), photos)
    for query in facts.queries:
        assert len(query.top) == SHOWN and query.top[0].score >= query.top[-1].score
        assert query.right == (query.rank == 1) == (query.top[0].mark == "right")
        item = query.best.item
        if query.direction == "t2i":
            assert item.text == photos.captions[2 * item.image] and item.name == photos.images.key(item.image)
    assert Namer(photos).image(3).name.endswith(HOSTILE_NAME.rpartition("/")[2])


def test_won_and_lost_compare_the_ranks_of_two_runs(photos):
    good, bad = make_run(photos, noise=0.3).measure(), make_run(photos, noise=1.5).measure()
    facts = collect(good, photos, bad)
    won = [query for query in facts.queries if "won" in query.groups]
    assert won and all(query.rank < query.other_rank and len(query.other_top) == SHOWN for query in won)
    assert all(query.rank > query.other_rank for query in facts.queries if "lost" in query.groups)
    both, only_good, only_bad, none = facts.outcomes["t2i"]
    assert both + only_good == good.t2i.right.sum() and both + only_bad == bad.t2i.right.sum()
    assert both + only_good + only_bad + none == 48
    swapped = collect(bad, photos, good)
    assert swapped.outcomes["t2i"] == (both, only_bad, only_good, none)


def test_hubs_are_counted_over_all_queries():
    hubs = find_hubs(np.array([[0, 2], [2, 1], [2, 0]]), 5, str)
    assert hubs.items[:3] == [("2", 3), ("0", 2), ("1", 1)] and (hubs.k, hubs.mean) == (2, 6 / 5)
    assert hubs.never == 40
    numbers = np.array([2, 1, 3, 0, 0])
    assert hubs.skewness == pytest.approx(((numbers - 1.2) ** 3).mean() / numbers.std() ** 3)


def test_captions_of_several_images_ignore_case_and_period(photos):
    captions = ["A dog.", "a cat", "a dog ", "a bird"]
    dataset = RetrievalDataset("x", "test", photos.images, captions, np.array([[0, 0], [1, 1], [2, 2], [3, 3], [4, 3]]))
    assert group_images(dataset) == {"a dog": {0, 2}, "a cat": {1}, "a bird": {3, 4}}


def test_misses_with_the_caption_of_another_image_are_explained(photos):
    run = make_run(photos, noise=0.1)
    run.features.captions[[10, 20]] = run.features.captions[[20, 10]]  # two dogs in the snow, exchanged
    from clip_retrieval.evaluation.ranks import retrieval_ranks

    run = replace(run, ranks=retrieval_ranks(run.features.images, run.features.captions, photos.pairs))
    facts = collect(run.measure(), photos)
    assert facts.explained["t2i"] == 2 and facts.shared_count == 1
    assert [item.image for item in facts.shared[0].images] == [5, 10] and facts.shared[0].count == 2


def test_eccv_judgements_mark_items_of_coco_test(photos, tmp_path, monkeypatch):
    pairs = {(i, c) for i in range(24) for c in range(48)}  # everything is right by these judges
    (tmp_path / "data").mkdir()
    for name, side in (("image_to_caption", 0), ("caption_to_image", 1)):
        lists = {}
        for pair in sorted(pairs):
            lists.setdefault(str(100 + pair[side]), []).append(100 + pair[1 - side])
        (tmp_path / "data" / f"eccv_{name}.json").write_text(str(lists).replace("'", '"'))
    spec = type("Spec", (), {"submodule_search_locations": [str(tmp_path)]})
    monkeypatch.setattr(protocols.importlib.util, "find_spec", lambda name: spec)
    ids = {"image_ids": range(100, 124), "text_ids": range(100, 148)}
    measured = make_run(photos, noise=1.5).measure()
    assert collect(measured, photos).judged is None  # not COCO
    facts = collect(measured, replace(photos, name="coco", **ids))
    assert facts.judged == facts.misses
    assert all(hit.mark in ("right", "judged") for query in facts.queries for hit in query.top)
    assert any("judged" in query.groups for query in facts.queries)


def test_eccv_package_files_are_read(photos):
    pytest.importorskip("eccv_caption")
    dataset = replace(photos, name="coco", image_ids=[373119, *range(23)], text_ids=[560256, 646721, *range(46)])
    assert read_judged_pairs(dataset).tolist() == [[0, 0], [0, 1]]
