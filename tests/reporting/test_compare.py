"""Comparison of two evaluations against plain loops, and evaluations that do not match."""

import json

import numpy as np
import pytest

from clip_retrieval.data.dataset import RetrievalDataset
from clip_retrieval.data.images.image_files import ImageFiles
from clip_retrieval.errors import UserError
from clip_retrieval.evaluation.metrics import report
from clip_retrieval.evaluation.ranks import retrieval_ranks
from clip_retrieval.files import write_json
from clip_retrieval.reporting.compare import compare, comparison_table
from clip_retrieval.reporting.ranks_file import write_ranks

IMAGES, EACH = 12, 3
PAIRS = np.stack([np.arange(IMAGES * EACH) // EACH, np.arange(IMAGES * EACH)], axis=1)


def evaluate(folder, noise, root="/data", images=range(IMAGES), ids=True, seed=0):
    """Ranks of features with noise, on some of the images; the gallery is all of them. Returns the ranks."""
    rng = np.random.default_rng(seed)
    truth = np.random.default_rng(9).normal(size=(IMAGES, 4))
    captions = truth.repeat(EACH, axis=0) + noise * rng.normal(size=(IMAGES * EACH, 4))
    kept = [row for row in range(len(PAIRS)) if PAIRS[row, 0] in images]
    numbers = {image: number for number, image in enumerate(images)}
    pairs = np.array([(numbers[PAIRS[row, 0]], number) for number, row in enumerate(kept)])
    dataset = RetrievalDataset(
        "photos",
        "test",
        ImageFiles([f"{root}/photos/{image}.jpg" for image in images]),
        [f"caption {row}" for row in kept],
        pairs,
        text_ids=[100 + row for row in kept] if ids else None,
    )
    ranks = retrieval_ranks(truth[list(images)], captions[kept], pairs)
    folder.mkdir()
    write_ranks(folder / "ranks.npz", dataset, *ranks)
    return ranks


def test_differences_equal_a_plain_loop(tmp_path):
    a, b = evaluate(tmp_path / "a", 2.0), evaluate(tmp_path / "b", 1.0, root="/elsewhere", seed=1)
    found = compare(tmp_path / "a", tmp_path / "b", queries=2)
    assert (found["a"], found["b"]) == (report(*a), report(*b))
    assert found["queries"] == {"i2t": IMAGES, "t2i": len(PAIRS)}

    rng = np.random.default_rng(0)
    differences = []
    for _ in range(1000):
        drawn = rng.integers(IMAGES, size=IMAGES)
        rows = (drawn, (drawn[:, None] * EACH + np.arange(EACH)).ravel())
        blocks = [report(*(ranks[row] for ranks, row in zip(side, rows))) for side in (a, b)]
        differences.append(blocks[1]["t2i"]["R@5"] - blocks[0]["t2i"]["R@5"])
    difference = found["difference"]["t2i"]["R@5"]
    assert difference["value"] == report(*b)["t2i"]["R@5"] - report(*a)["t2i"]["R@5"]
    assert difference["interval"] == pytest.approx(np.quantile(differences, [0.025, 0.975]))
    share = min(np.mean(np.array(differences) <= 1e-9), np.mean(np.array(differences) >= -1e-9))
    assert difference["p"] == pytest.approx(min(1, 2 * share))

    hits = [[rank < 5 for rank in side[1].above] for side in (a, b)]
    assert found["won"]["t2i"]["R@5"] == sum(y and not x for x, y in zip(*hits))
    assert found["lost"]["t2i"]["R@5"] == sum(x and not y for x, y in zip(*hits))
    ranks = [side[1].above + 1 for side in (a, b)]
    factor = np.maximum(ranks[0] / ranks[1], ranks[1] / ranks[0])
    row = int(factor.argmax())
    assert found["changed"]["t2i"][0] == {"id": str(100 + row), "a": ranks[0][row], "b": ranks[1][row]}
    assert max(map(len, comparison_table(found | {"changed": {}}).splitlines())) <= 80


def test_equal_evaluations_do_not_differ(tmp_path):
    for name in "ab":
        evaluate(tmp_path / name, 1.0)
    found = compare(tmp_path / "a", tmp_path / "b" / "ranks.npz")
    assert found["difference"]["rsum"] == {"value": 0, "interval": [0, 0], "p": 1}
    assert set(found["won"]["i2t"].values()) == {0}


def test_common_queries_are_matched_by_id(tmp_path, caplog):
    order = [7, 3, 1, 0, 5, 10]
    (whole, whole_t2i), (part, _) = evaluate(tmp_path / "a", 1.0), evaluate(tmp_path / "b", 1.0, images=order)
    found = compare(tmp_path / "a", tmp_path / "b", queries=99)
    assert found["queries"] == {"i2t": 6, "t2i": 18}
    rank_of = {f"{image}.jpg": rank for image, rank in zip(order, part.above.tolist())}
    assert {row["id"].split("/")[-1]: row["b"] - 1 for row in found["changed"]["i2t"]} == rank_of
    captions = np.isin(PAIRS[:, 0], order)
    assert found["a"] == report(whole[np.sort(order)], whole_t2i[captions])
    assert "of 12 images and 6 images, only the 6" in caplog.text


def forget_texts(path):
    """The file of an older version."""
    with np.load(path) as arrays:
        np.savez(path, **{name: array for name, array in arrays.items() if name != "t2i_texts"})


def test_data_that_two_readers_name_differently_match_by_their_captions(tmp_path):
    """Such as files, and shards that hold them in another order under other names."""
    order = np.random.default_rng(4).permutation(IMAGES)
    a, _ = evaluate(tmp_path / "a", 1.0), evaluate(tmp_path / "b", 1.0, images=order, ids=False)
    expected = compare(tmp_path / "a", tmp_path / "b")
    with np.load(tmp_path / "b/ranks.npz") as arrays:
        shards = dict(arrays)
    shards["i2t_ids"] = np.array([f"shard.tar, {row:04}.jpg" for row in range(IMAGES)])
    np.savez(tmp_path / "b/ranks.npz", **shards)
    assert compare(tmp_path / "a", tmp_path / "b") == expected and expected["a"] == report(*a)
    assert expected["queries"] == {"i2t": IMAGES, "t2i": len(PAIRS)}

    # a caption of two images is matched by the other captions of its image
    with np.load(tmp_path / "a/ranks.npz") as arrays:
        files = dict(arrays)
    row = int(np.flatnonzero(shards["t2i_texts"] == files["t2i_texts"][0])[0])
    other = int(np.flatnonzero(shards["t2i_texts"] == files["t2i_texts"][EACH])[0])
    files["t2i_texts"][EACH] = files["t2i_texts"][0]
    shards["t2i_texts"][other] = shards["t2i_texts"][row]
    np.savez(tmp_path / "a/ranks.npz", **files)
    np.savez(tmp_path / "b/ranks.npz", **shards)
    assert compare(tmp_path / "a", tmp_path / "b") == expected

    # captions that belong together in one evaluation only
    shards["t2i_images"] = np.roll(shards["t2i_images"], 1)
    np.savez(tmp_path / "b/ranks.npz", **shards)
    with pytest.raises(UserError, match="captions match several images"):
        compare(tmp_path / "a", tmp_path / "b")


def test_evaluations_without_common_queries_are_refused(tmp_path):
    evaluate(tmp_path / "a", 1.0, images=[0, 1, 2])
    evaluate(tmp_path / "b", 1.0, images=[3, 4, 5])
    with pytest.raises(UserError, match="no image or caption in common"):
        compare(tmp_path / "a", tmp_path / "b")
    evaluate(tmp_path / "c", 1.0, images=[0, 1, 2], ids=False)
    evaluate(tmp_path / "d", 1.0, images=[1, 2], ids=False)
    for name in "cd":
        forget_texts(tmp_path / name / "ranks.npz")
    with pytest.raises(UserError, match=r"captions without ids.* evaluate both again"):
        compare(tmp_path / "c", tmp_path / "d")
    write_json(tmp_path / "results.json", {})
    with pytest.raises(UserError, match="no such file; evaluate"):
        compare(tmp_path / "results.json", tmp_path / "a")


def test_script_prints_and_writes(script, tmp_path):
    for name, noise in (("a", 2.0), ("b", 1.0)):
        evaluate(tmp_path / name, noise)
    code, out, err = script("compare", "a", "b", "--queries", "3", "--output", "out.json")
    assert code == 0, err
    assert "12 images, 36 captions" in out and "t2i R@10" in out and out.count(".jpg") == 3
    assert len(json.loads((tmp_path / "out.json").read_text())["changed"]["t2i"]) == 3
    code, _, err = script("compare", "a", "missing.npz")
    assert code == 2 and "missing.npz" in err and err.count("\n") == 1
