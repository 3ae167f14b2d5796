"""A user's own photographs: data without splits, broken and missing files, and paths that do not exist."""

import shutil

import pytest
from PIL import Image

from clip_retrieval.command_line import parse
from clip_retrieval.errors import run_with_exit_code
from clip_retrieval.evaluate import evaluate
from clip_retrieval.finetune import finetune
from clip_retrieval.run.merge import check_early, settle
from tests.conftest import read_json

HELD_OUT = ("--val_fraction", "0.25", "--test_fraction", "0.25")


@pytest.fixture
def photographs(captioned, tmp_path):
    """A folder with photos.csv of 26 images, without splits, and the model config."""
    folder = tmp_path / "photographs"
    shutil.copytree(captioned, folder)
    rows = (folder / "captions.csv").read_text().splitlines()
    (folder / "captions.csv").unlink()
    (folder / "photos.csv").write_text("\n".join(row.rpartition(",")[0] for row in rows) + "\n")
    return folder


@pytest.fixture
def own(photographs, tmp_path):
    """Arguments of a short finetune on the photographs, without --dataset."""
    return [
        *("--annotations", photographs / "photos.csv", "--vision_model", photographs / "small.json"),
        *("--max_steps", "2", "--batch_size", "6", "--lr", "1e-3", "--warmup", "1", "--num_workers", "0"),
        *("--device", "cpu", "--checkpoint_path", tmp_path / "logs"),
    ]


def test_without_splits_nothing_is_measured_and_the_run_says_so(run, own, tmp_path):
    code, _, err = run(*own)
    assert code == 0 and "NOTHING IS MEASURED" in err and "--val_fraction" in err
    results = read_json(tmp_path / "logs/ex0/results.json")
    assert "split" not in results and "i2t" not in results


def test_held_out_fractions_choose_the_best_and_are_scored(run, own, tmp_path):
    code, _, err = run(*own, *HELD_OUT)
    assert code == 0 and "NOTHING" not in err, err
    results = read_json(tmp_path / "logs/ex0/results.json")
    assert results["split"] == "test" and results["val"]["split"] == "val"
    code, _, err = run("--eval", "--resume", tmp_path / "logs/ex0/best.pt")
    assert code == 0 and "WAS TRAINED ON" not in err
    evaluated = read_json(tmp_path / "logs/ex0/eval_csv_test/results.json")
    assert evaluated["split"] == "test" and evaluated["i2t"] == results["i2t"]


def test_rows_that_were_trained_on_are_never_called_test(run, own, photographs, tmp_path):
    assert run(*own)[0] == 0
    last = tmp_path / "logs/ex0/last.pt"
    code, out, err = run("--eval", "--resume", last)
    assert code == 0 and "WAS TRAINED ON 26 OF THESE 26 IMAGES" in err
    results = read_json(tmp_path / "logs/ex0/eval_csv_all/results.json")
    assert results["split"] == "all" and results["images_trained_on"] == 26
    assert "\nall " in out and "\ntest " not in out

    code, _, err = run(*own, "--eval", "--pretrained", last)
    assert code == 0 and "WAS TRAINED ON 26 OF THESE 26 IMAGES" in err

    # another table with some of the images
    rows = (photographs / "photos.csv").read_text().splitlines()
    (photographs / "some.csv").write_text("\n".join(rows[:41]) + "\n")
    code, _, err = run("--eval", "--resume", last, "--annotations", photographs / "some.csv", *HELD_OUT)
    assert code == 0 and "WAS TRAINED ON" in err
    assert read_json(tmp_path / "logs/ex0/eval_csv_test/results.json")["split"] == "train"


def test_other_images_are_not_called_trained(run, own, photographs, tmp_path):
    assert run(*own)[0] == 0
    other = tmp_path / "other"
    shutil.copytree(photographs, other)
    code, _, err = run("--eval", "--resume", tmp_path / "logs/ex0/last.pt", "--annotations", other / "photos.csv")
    assert code == 0 and "WAS TRAINED ON" not in err
    assert read_json(tmp_path / "logs/ex0/eval_csv_all/results.json")["split"] == "all"


def test_unknown_training_data_are_mentioned(run, own, photographs, tmp_path):
    assert run(*own)[0] == 0
    moved = photographs.rename(tmp_path / "moved")
    code, _, err = run("--eval", "--resume", tmp_path / "logs/ex0/last.pt", "--annotations", moved / "photos.csv")
    assert code == 0 and "it is unknown whether" in err


def test_broken_and_missing_photographs_are_skipped(run, own, photographs, tmp_path):
    (photographs / "0.jpg").write_bytes((photographs / "0.jpg").read_bytes()[:300])
    (photographs / "1.jpg").unlink()
    code, _, err = run(*own)
    assert code == 2 and "--skip_broken" in err
    code, _, err = run(*own, "--skip_broken", "--overwrite", "--max_steps", "12")
    assert code == 0 and "1 of 26 images is left out, missing: the first is" in err, err
    assert "images could not be used, replaced by others" in err and "0.jpg" in err


@pytest.mark.parametrize("extra", [HELD_OUT, ("--freeze_vision",), ("--image_cache", "cache")])
def test_broken_photographs_are_left_out_before_images_are_encoded(run, own, photographs, tmp_path, monkeypatch, extra):
    monkeypatch.chdir(tmp_path)
    for number in range(0, 26, 3):
        (photographs / f"{number}.jpg").write_bytes(b"\xff\xd8 broken")
    code, _, err = run(*own, "--skip_broken", *extra)
    assert code == 0 and "images are left out, broken: " in err, err


def test_skip_broken_counts_in_the_results(run, own, photographs, tmp_path):
    (photographs / "3.jpg").write_bytes(b"")
    code, _, err = run(*own, "--eval", "--skip_broken")
    assert code == 0, err
    (folder,) = (tmp_path / "logs").iterdir()
    assert read_json(folder / "results.json")["images"] == 25


@pytest.mark.parametrize("workers", ["0", "2"])
def test_check_data_lists_every_problem(script, photographs, workers):
    table = photographs / "photos.csv"
    code, out, err = script("check_data", "--annotations", table, "--num_workers", workers)
    assert code == 0 and "26 images" in out and "no problems" in out, err
    (photographs / "3.jpg").write_bytes((photographs / "3.jpg").read_bytes()[:200])
    (photographs / "5.jpg").unlink()
    (photographs / "more.csv").write_text(table.read_text() + "7.jpg,\n")
    code, out, err = script("check_data", "--annotations", photographs / "more.csv", "--num_workers", workers)
    lines = out.splitlines()
    assert code == 2 and "3 problems" in err and "--skip_broken" in err
    assert sum(f"{photographs / '3.jpg'}: not a readable image" in line for line in lines) == 1
    assert sum(f"{photographs / '5.jpg'}: no such image" in line for line in lines) == 1
    assert sum(f"{photographs / '7.jpg'}: its caption is empty" in line for line in lines) == 1


def test_check_data_reads_every_split_of_any_data_set(script, captioned, tmp_path):
    code, out, err = script("check_data", "--dataset", "shapes", "--dataset_root", tmp_path, "--num_workers", "0")
    assert code == 0 and all(f"shapes {split}" in out for split in ("train", "val", "test")), err
    code, out, err = script("check_data", "--dataset", "karpathy", "--dataset_root", tmp_path)
    assert code == 2 and "dataset_*.json" in out and "1 problem;" in err
    code, out, _ = script("check_data", "--dataset", "csv", "--dataset_root", captioned, "--num_workers", "0")
    assert code == 0 and "csv val: 6 images" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--annotations gone.csv", ["--annotations gone.csv", "no such file"]),
        ("--annotations photos.csv --image_dir gone", ["--image_dir gone", "no such folder"]),
        ("--dataset csv --dataset_root gone", ["gone: no such folder", "--dataset_root"]),
        ("--dataset csv --dataset_root empty", ["empty: holds no", "--dataset_root", "--annotations"]),
        ("--annotations photos.csv --zero_shot_eval x --zero_shot_root gone", ["--zero_shot_root gone"]),
        ("--train_data gone/{0..3}.tar", ["gone/0.tar"]),
        ("--annotations missing.csv", ["1 of 2 images is missing"]),
        ("--eval --annotations header.csv", ["no column caption"]),
        ("--dataset webdataset --val_fraction 0.1", ["--val_fraction", "streamed"]),
        ("--annotations photos.csv --val_fraction 0.6 --test_fraction 0.5", ["--val_fraction and --test_fraction"]),
    ],
)
def test_paths_are_checked_before_the_model_is_built(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "photos.csv").write_text("image,caption\na.png,one\n")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "missing.csv").write_text("image,caption\na.png,one\nb.png,two\n")
    (tmp_path / "header.csv").write_text("image,text\na.png,one\n")

    def fail(*_):
        raise AssertionError("the model is built")

    monkeypatch.setattr("clip_retrieval.run.prepare.load_model", fail)
    monkeypatch.setattr("clip_retrieval.run.ensemble.load_model", fail)

    def main():
        typed = parse(arguments.split())
        check_early(typed, {})
        return evaluate(typed) if typed.get("eval") else finetune(typed)

    code, err = run_with_exit_code(main), capsys.readouterr().err
    assert code == 2 and all(word in err for word in words), err


def test_a_csv_or_tsv_as_annotations_implies_its_format():
    def implied(*layers):
        return settle(*({"annotations": "a/photos.CSV"} | layer for layer in layers)).data.dataset

    assert implied({}) == implied({"annotations": "x.tsv"}) == implied({"annotations": "x.csv.gz"}) == ("csv",)
    assert implied({"dataset": "coco"}, {}) == ("csv",)  # the checkpoint's data set cannot have such a file
    assert implied({"annotations": "x.json"}) == ("coco",)
    assert implied({"dataset": "flickr30k"}) == implied({"dataset": "flickr30k"}, {}) == ("flickr30k",)
