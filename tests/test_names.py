"""Names of folders, images, classes and outputs that are not UTF-8, or contain line breaks and escapes, work."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from clip_retrieval.command_line import parse
from tests.conftest import ROOT

STRANGE = os.fsdecode(b"caf\xe9 \xff\x1b[31m\n")
TINY = ("--pretrained", "none", "--device", "cpu", "--num_workers", "0")


def picture(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(path, "png")


def is_clean(text):
    """Whether `text` has no control characters."""
    return all(character.isprintable() or character in "\n\t" for character in text)


@pytest.fixture
def strange(tmp_path, captioned):
    """A folder with a strange name: classes, images, and a COCO file that lists them."""
    root = tmp_path / STRANGE
    for number, name in enumerate(("cat", STRANGE, os.fsdecode(b"\xfe"))):
        for image in range(2):
            picture(root / "classes" / name / f"{image}{STRANGE}.png", 2 * number + image)
    images = [{"id": number, "file_name": f"{number}{STRANGE}.png"} for number in range(8)]
    for image in images:
        picture(root / "images" / image["file_name"], image["id"])
    annotations = [{"id": n, "image_id": n, "caption": f"a dark thing {n} \x1b[2J \ud83d"} for n in range(8)]
    (root / "captions.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    (root / "small.json").write_bytes((captioned / "small.json").read_bytes())
    return root


@pytest.fixture
def arguments(strange):
    data = ("--dataset", "coco", "--annotations", strange / "captions.json", "--image_dir", strange / "images")
    return [*("--vision_model", strange / "small.json"), *data, *TINY]


def test_zero_shot_with_strange_names(script, strange):
    model = ("--vision_model", strange / "small.json", *TINY)
    data = ("--data", strange / "classes", "--template", os.fsdecode(b"a \xff photo of {}"))
    code, out, err = script("zero_shot", *model, *data, "--output", strange / "out")
    assert code == 0 and is_clean(out + err), err
    results = json.loads((strange / "out" / "results.json").read_bytes())
    assert results["data_root"] == str(strange / "classes") and results["images"] == 6
    assert [each["class"] for each in results["per_class"]] == ["caf\ufffd \ufffd\x1b[31m", "cat", "\ufffd"]
    assert is_clean((strange / "out" / "results.txt").read_text(encoding="utf-8"))
    assert json.loads((strange / "out" / "options.json").read_bytes())["zero_shot_eval"] == str(strange / "classes")


def test_zero_shot_demo_with_strange_names(script, strange):
    model = ("--vision_model", strange / "small.json", *TINY)
    labels = ("--labels", os.fsdecode(b"c\xe9t,dog"), "--show_prediction", "--output", strange / "figures")
    code, out, err = script("zero_shot_demo", *model, "--img_dir", strange / "classes" / STRANGE, *labels)
    assert code == 0 and is_clean(out + err), err
    with Image.open(strange / "figures" / f"zero_shot_{STRANGE}.png") as figure:
        assert figure.width > 500


def test_evaluation_with_strange_names(run, arguments, strange):
    code, out, err = run("--eval", *arguments, "--checkpoint_path", strange / "logs", "--experiments", STRANGE)
    assert code == 0 and is_clean(out + err), err
    folder = strange / "logs" / STRANGE
    assert json.loads((folder / "results.json").read_bytes())["images"] == 8
    assert json.loads((folder / "options.json").read_bytes())["image_dir"] == str(strange / "images")
    assert is_clean((folder / "log.txt").read_text(encoding="utf-8"))
    code, _, err = run("--eval", "--config", folder / "options.json", "--experiments", "again")
    assert code == 0, err


def test_finetune_with_strange_names(run, arguments, strange):
    training = ("--batch_size", "4", "--epochs", "1", "--checkpoint_path", strange / "logs", "--experiments", STRANGE)
    code, out, err = run(*arguments, *training)
    assert code == 0 and is_clean(out + err), err
    folder = strange / "logs" / STRANGE
    assert (folder / "last.pt").is_file() and (folder / "metrics.jsonl").read_text()
    assert list((folder / "tensorboard").iterdir()) and str(parse(["--name", STRANGE])["experiments"]) == STRANGE


def test_feature_files_with_strange_names(script, arguments, strange):
    names = {name: strange / f"{name}{STRANGE}" for name in ("f", "p.jsonl", "scores.json", "e.json", "table.md")}
    code, out, err = script("extract_features", *arguments, "--output", names["f"])
    assert code == 0 and is_clean(out + err), err
    pair = [names["f"] / f"{kind}_features.npy" for kind in ("image", "text")]
    code, out, err = script("make_topk_predictions", "--image_feats", pair[0], "--text_feats", pair[1],
                            "--device", "cpu", "--output", names["p.jsonl"])  # fmt: skip
    assert code == 0, err
    line = json.loads(names["p.jsonl"].read_text().splitlines()[0])
    assert sorted(line["image_ids"]) == list(range(8))  # the ids of the captions file, not the names
    code, out, err = script("evaluate_predictions", names["p.jsonl"], names["p.jsonl"], names["scores.json"])
    assert code == 0 and json.loads(names["scores.json"].read_text())["score"] == 100, err
    code, out, err = script("evaluate_features", "--image_features", pair[0], "--text_features", pair[1],
                            "--pairs", names["f"] / "pairs.npy", "--results", names["e.json"])  # fmt: skip
    assert code == 0, err
    code, out, err = script("results_table", names["e.json"], "--output", names["table.md"])
    assert code == 0 and names["table.md"].read_text() == out, err


def test_exports_with_strange_names(script, arguments, strange):
    data = arguments[2:8]
    code, out, err = script("export_tsv", *data, "--ids", "name", "--output", strange / "tsv")
    assert code == 0 and is_clean(out + err), err
    code, out, err = script("build_lmdb", "--data_dir", strange / "tsv", "--splits", "train")
    assert code == 0, err
    code, out, err = script("export_shards", *data, "--output", strange / "shards")
    assert code == 0 and (strange / "shards" / "train-00000.tar").is_file(), err


def test_errors_in_an_ascii_terminal(strange):
    """Messages and names are printed without UTF-8 support."""
    environment = os.environ | {"PYTHONIOENCODING": "ascii:strict"}
    gold = strange / "gold_texts.jsonl"
    gold.write_text('{"text_id": 1, "image_ids": ["\\udcff"]}')
    command = [sys.executable, ROOT / "scripts" / "transform_ir_annotation_to_tr.py", "--input"]
    for path, code in ((gold, 0), (strange / "missing", 2)):
        done = subprocess.run([*command, path], capture_output=True, env=environment)
        output = (done.stdout + done.stderr).decode("ascii")
        assert done.returncode == code and "caf" in output and "Traceback" not in output
