"""search.py TEXT PHOTOS: exact results, and the definition of a query of several parts."""

import json

import numpy as np
import pytest

from clip_retrieval.api import load_model
from clip_retrieval.errors import UserError
from clip_retrieval.search.index import open_index, read_table
from clip_retrieval.search.query import combine, top_k
from clip_retrieval.search.source import INDEX_FOLDER, choose_source
from tests.search.conftest import paint, read_entries


def random_features(count, dim, seed=0):
    features = np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def brute_force(features, query, k):
    scores = (features.astype(np.float64) * query.astype(np.float64)).sum(1)
    rows = np.lexsort((np.arange(len(scores)), -scores))[:k]
    return rows, scores[rows]


@pytest.mark.parametrize("k", [1, 10, 999, 5000])
@pytest.mark.parametrize("spread", [1, 1e-4, 1e-7, 0])
def test_top_k_equals_brute_force_in_float64(k, spread):
    """A small spread makes neighbours closer than the rounding of float32."""
    features = random_features(1, 64) + spread * random_features(3000, 64, seed=1)
    features = (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float32)
    features[700] = features[20]  # a copy ranks behind its original
    query = combine(random_features(2, 64, seed=2))
    rows, scores = top_k(features, query, k)
    expected, expected_scores = brute_force(features, query, k)
    assert rows.tolist() == expected.tolist() and scores.tolist() == expected_scores.tolist()


def test_query_is_mean_of_positives_minus_mean_of_negatives():
    positives, negatives = random_features(3, 16), random_features(2, 16, seed=1)
    features = random_features(50, 16, seed=2)
    _, scores = top_k(features, combine(positives, negatives), 50)
    cosines = features.astype(np.float64) @ positives.T.astype(np.float64)
    against = features.astype(np.float64) @ negatives.T.astype(np.float64)
    np.testing.assert_allclose(scores, np.sort(cosines.mean(1) - against.mean(1))[::-1], atol=1e-6)


def test_features_that_are_not_finite_are_refused():
    features = random_features(5, 8)
    features[3, 2] = np.nan
    with pytest.raises(UserError, match="not finite"):
        top_k(features, features[0], 2)


def test_empty_index_has_no_results():
    rows, scores = top_k(np.empty((0, 8), np.float32), np.ones(8, np.float32), 3)
    assert len(rows) == len(scores) == 0


def test_json_of_text_image_and_negatives_equals_the_definition(indexed, script, models):
    model = load_model(models / "small.json", "cpu", pretrained=str(models / "a.pt"))
    image = indexed / "trip" / "4.png"
    options = ("--image", image, "--not", "a blue car", "--not", "people", "--top_k", 3, "--json")
    code, out, err = script("search", "a red house", indexed, *options)
    assert code == 0, err
    positives = np.concatenate([model.encode_texts(["a red house"]), model.encode_images([image])])
    query = positives.mean(0) - model.encode_texts(["a blue car", "people"]).numpy().mean(0)
    _, features = read_entries(indexed)
    scores = {name: float(feature @ query) for name, feature in features.items()}
    content = json.loads(out)
    assert content["photos"] == str(indexed)
    assert [each["name"] for each in content["results"]] == sorted(scores, key=scores.get, reverse=True)[:3]
    for each in content["results"]:
        assert abs(each["score"] - scores[each["name"]]) < 1e-5 and each["path"] == str(indexed / each["name"])


def test_empty_negative_text_changes_nothing(indexed, script):
    found = [script("search", "a red house", indexed, "--json", *extra) for extra in ((), ("--not", " "))]
    assert found[0] == found[1] and found[0][0] == 0


def test_image_alone_finds_itself_first(indexed, script):
    code, out, err = script("search", "--image", indexed / "3.jpg", indexed, "--top_k", 1)
    assert code == 0 and out.split() == ["1.0000", str(indexed / "3.jpg")], err


def test_command_word_and_order_of_options_do_not_matter(indexed, script):
    outputs = {
        script("search", *words)[1]
        for words in (
            ("a house", indexed, "--top_k", 2),
            ("query", "a house", indexed, "--top_k", 2),
            ("a house", "--top_k", 2, indexed),
            ("--top-k", 2, "a house", indexed),
        )
    }
    assert len(outputs) == 1 and len(outputs.pop().splitlines()) == 2


def test_phone_photographs_are_upright(photos, index, script):
    from PIL import Image

    upright = Image.open(photos / "0.jpg").convert("RGB")
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned right by 90 degrees
    turned.save(photos / "phone.png", exif=exif)
    assert index()[0] == 0
    entries, features = read_entries(photos)
    assert (entries["phone.png"]["width"], entries["phone.png"]["height"]) == upright.size
    np.testing.assert_allclose(features["phone.png"], features["0.jpg"], atol=1e-6)


def test_moved_checkpoint_is_named_and_given(photos, script, models, tmp_path):
    checkpoint = tmp_path / "best.pt"
    checkpoint.write_bytes((models / "a.pt").read_bytes())
    model = ("--vision_model", models / "small.json", "--device", "cpu")
    code, _, err = script("search", "index", photos, "--resume", checkpoint, *model, "--num_workers", 0)
    assert code == 0, err
    checkpoint.rename(tmp_path / "moved.pt")
    code, _, err = script("search", "a house", photos)
    assert code == 2 and "best.pt: no such checkpoint, from which the index was made" in err and "--resume" in err
    assert script("search", "a house", photos, "--resume", tmp_path / "moved.pt", *model)[0] == 0
    code, _, err = script("search", "a house", photos, "--resume", models / "b.pt", *model)
    assert code == 2 and "with other weights" in err and err.count("\n") == 1


def test_photographs_move_with_their_index(indexed, script, tmp_path):
    indexed.rename(tmp_path / "elsewhere")
    code, out, err = script("search", "a house", tmp_path / "elsewhere", "--top_k", 1)
    assert code == 0 and str(tmp_path / "elsewhere") in out, err


def test_bad_usage_is_one_line(indexed, script, tmp_path):
    paint(tmp_path / "empty" / "a.jpg", 0)
    for words, message in (
        ((indexed,), "give a text or --image"),
        (("a", "b", indexed), "a text in quotes"),
        (("a", ""), "PHOTOS or --index is empty"),
        (("index", indexed, "--index", ""), "PHOTOS or --index is empty"),
        (("a", tmp_path / "empty"), f"has no index in {tmp_path / 'empty' / INDEX_FOLDER}"),
        (("a", indexed, "--top_k", 0), "--top_k 0: must be at least 1"),
        (("--image", tmp_path / "none.jpg", indexed), f"--image {tmp_path / 'none.jpg'}: no such file"),
        (("serve", indexed, "--host", "999.1.1.1"), "choose another --host"),
        (("index", indexed, tmp_path), "one folder at a time"),
        (("index", tmp_path / "none"), "no such folder"),
        (("serve", indexed, "--port", 99999), "--port 99999"),
    ):
        code, _, err = script("search", *words)
        assert code == 2 and message in err and err.count("\n") == 1, (words, err)


def test_lines_are_parsed_when_they_are_used(index, photos):
    (photos / "broken.jpg").write_text("no image")
    paint(photos / 'a, "problem": 1.jpg', 8)
    assert index()[0] == 0
    folder = photos / INDEX_FOLDER
    opened, table = open_index(folder, photos), read_table(folder / "index.jsonl")
    assert list(opened.entries) == [entry for entry in table.entries if entry.problem is None]
    assert len(opened.entries) == 7 and opened.entries[-1] == opened.entries[6] == opened.entries[5:][1]

    # a name outside the folder is refused when it would be shown
    lines = (folder / "index.jsonl").read_text().splitlines()
    place = next(place for place, line in enumerate(lines) if "trip/4.png" in line)
    lines[place] = lines[place].replace("trip/4.png", "../../secret.png")
    (folder / "index.jsonl").write_text("\n".join(lines))
    opened = open_index(folder, photos)
    with pytest.raises(UserError, match=f"line {place + 1}: no valid name"):
        list(opened.entries)
    # other numbers of lines and features
    (folder / "index.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    with pytest.raises(UserError, match="not the features of"):
        open_index(folder, photos)
    for content in ("", "\n", "{", "[]\n", "{}"):
        (folder / "index.jsonl").write_text(content)
        with pytest.raises(UserError, match=r"index.jsonl") as error:
            open_index(folder, photos)
        assert "\n" not in str(error.value)


def test_paths_of_the_model_are_absolute_in_the_index(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "exported").mkdir()
    source = choose_source({"vision_model": "local-dir:exported", "device": "cpu"}, None)
    assert source["options"] == {"vision_model": f"local-dir:{tmp_path}/exported"}
    assert choose_source({"vision_model": "ViT-B/32"}, None)["options"] == {"vision_model": "ViT-B/32"}
