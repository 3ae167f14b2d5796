"""scripts/pair_tasks.py from end to end."""

import json

import pytest

from clip_retrieval.api import load_model
from tests.conftest import read_json


@pytest.fixture
def trained(run, arguments, tmp_path):
    assert run(*arguments, "--max_steps", "3")[0] == 0
    return tmp_path / "logs" / "ex0" / "best.pt"


def cosines(path, images, captions):
    model = load_model(path, "cpu")
    return (model.encode_images(images).double() @ model.encode_texts(captions).double().T).numpy()


def test_sugarcrepe_results_and_table(script, trained, captioned, tmp_path):
    captions = ["a red small thing", "a blue large thing", "a dark round thing"]
    images = [captioned / f"{number}.jpg" for number in range(3)]
    scores = cosines(trained, images, captions)
    choices = [(0, 0, 1), (1, 1, 2), (2, 0, 2), (0, 2, 1)]
    for category, rows in (("add_att", choices[:1]), ("swap_obj", choices[1:])):
        records = {
            str(n): {"filename": f"{i}.jpg", "caption": captions[a], "negative_caption": captions[b]}
            for n, (i, a, b) in enumerate(rows)
        }
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / f"{category}.json").write_text(json.dumps(records))
    code, out, err = script(
        *("pair_tasks", "--task", "sugarcrepe", "--data", tmp_path / "data", "--image_dir", captioned),
        *("--resume", trained, "--num_workers", "0"),
    )
    assert code == 0, err
    results = read_json(trained.parent / "sugarcrepe" / "results.json")
    right = [100.0 * (scores[i, a] > scores[i, b]) for i, a, b in choices]
    expected = [right[0], sum(right[1:]) / 3]
    assert [results["categories"][name]["accuracy"] for name in ("add_att", "swap_obj")] == pytest.approx(expected)
    assert results["mean"] == pytest.approx(sum(expected) / 2) and results["weights"] == str(trained)
    assert "add_att" in out and f"{results['mean']:.2f}" in out


def test_aro_macro_accuracy_leaves_symmetric_relations_out(script, trained, captioned, tmp_path):
    record = {"bbox_x": 0, "bbox_y": 0, "bbox_w": 20, "bbox_h": 18}
    records = [
        record | {"image_path": f"{n}.jpg", "relation_name": relation, "true_caption": a, "false_caption": b}
        for n, (relation, a, b) in enumerate(
            [
                ("on", "a red thing", "a new thing"),
                ("on", "a new thing", "a red thing"),
                ("talking to", "a old", "a new"),
            ]
        )
    ]
    (tmp_path / "visual_genome_relation.json").write_text(json.dumps(records))
    data = ("--data", tmp_path / "visual_genome_relation.json", "--image_dir", captioned)
    code, _, err = script("pair_tasks", "--task", "aro", *data, "--resume", trained, "--output", tmp_path / "out")
    assert code == 0, err
    block = read_json(tmp_path / "out" / "results.json")["categories"]["visual_genome_relation"]
    assert set(block["groups"]) == {"on", "talking to"}
    assert block["macro_accuracy"] == block["groups"]["on"]["accuracy"]
    assert block["accuracy"] == pytest.approx(
        (2 * block["groups"]["on"]["accuracy"] + block["groups"]["talking to"]["accuracy"]) / 3
    )


def test_winoground_scores_by_tag(script, trained, captioned, tmp_path):
    captions = ["a red small thing", "a blue large thing"]
    record = {"image_0": "0.jpg", "image_1": "1.jpg", "caption_0": captions[0], "caption_1": captions[1]}
    (tmp_path / "examples.jsonl").write_text(json.dumps(record | {"collapsed_tag": "Both"}) + "\n")
    data = ("--data", tmp_path, "--image_dir", captioned)
    code, out, err = script("pair_tasks", "--task", "winoground", *data, "--resume", trained)
    assert code == 0, err
    s = cosines(trained, [captioned / "0.jpg", captioned / "1.jpg"], captions)
    text, image = s[0, 0] > s[0, 1] and s[1, 1] > s[1, 0], s[0, 0] > s[1, 0] and s[1, 1] > s[0, 1]
    block = read_json(trained.parent / "winoground" / "results.json")["categories"]["winoground"]
    assert [block[name] for name in ("text", "image", "group")] == [100 * text, 100 * image, 100 * (text and image)]
    assert block["groups"]["Both"]["examples"] == 1 and max(map(len, out.splitlines()[-6:-1])) <= 80


def test_ensemble_and_prefix_are_recorded(script, trained, captioned, tmp_path):
    record = {"filename": "0.jpg", "caption": "a red thing", "negative_caption": "a blue thing"}
    (tmp_path / "add_att.json").write_text(json.dumps({"0": record}))
    options = ("--ensemble", trained, "--caption_prefix", "a photo of ", "--output", tmp_path / "out")
    data = ("--data", tmp_path / "add_att.json", "--image_dir", captioned)
    code, _, err = script("pair_tasks", "--task", "sugarcrepe", *data, "--resume", trained, *options)
    assert code == 0, err
    results = read_json(tmp_path / "out" / "results.json")
    assert results["caption_prefix"] == "a photo of " and len(results["ensemble"]["members"]) == 2
