"""Evaluations from end to end."""

import shutil

import pytest
import torch

from clip_retrieval.data.dataset import RetrievalDataset
from clip_retrieval.data.images.image_files import ImageFiles
from clip_retrieval.log import start_log
from clip_retrieval.run.splits import log_samples
from tests.conftest import read_json
from tests.models.small import small_clip
from tests.test_finetune import BLOCK


@pytest.fixture
def trained(run, arguments, tmp_path):
    assert run(*arguments, "--max_steps", "3")[0] == 0
    return tmp_path / "logs" / "ex0"


def test_checkpoint_alone_is_enough_and_its_run_is_unchanged(run, trained, tmp_path, monkeypatch):
    before = {path: path.read_bytes() for path in trained.iterdir() if path.is_file()}
    monkeypatch.chdir(tmp_path)
    code, out, err = run("--eval", "--resume", trained / "best.pt")
    assert code == 0, err
    assert {path: path.read_bytes() for path in before} == before
    results = read_json(trained / "eval_csv_test" / "results.json")
    assert set(results) >= BLOCK
    assert (results["dataset"], results["split"], results["precision"]) == ("csv", "test", "fp32")
    assert "R@1" in out and "rsum" in out and "eval_csv_test" in out


def test_val_split_and_further_recall_k(run, trained):
    code, _, err = run("--eval", "--resume", trained / "best.pt", "--eval_split", "val", "--recall_k", "3", "1")
    assert code == 0, err
    results = read_json(trained / "eval_csv_val" / "results.json")
    assert results["split"] == "val" and results["images"] == 6
    assert list(results["i2t"]) == ["R@1", "R@3", "R@5", "R@10", "MedR", "MeanR"]
    assert results["rsum"] == pytest.approx(sum(results[d][f"R@{k}"] for d in ("i2t", "t2i") for k in (1, 5, 10)))


def test_other_data_ignore_the_paths_of_the_checkpoint(run, arguments, captioned, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(captioned, moved)
    named = ("--annotations", captioned / "captions.csv", "--image_dir", captioned)
    assert run(*arguments, *named, "--max_steps", "1", "--dataset_root", "/nowhere")[0] == 0
    best = tmp_path / "logs/ex0/best.pt"
    (moved / "22.jpg").unlink()
    code, _, err = run("--eval", "--resume", best, "--dataset_root", moved)
    assert code == 2 and str(moved / "22.jpg") in err
    code, _, err = run("--eval", "--resume", best, "--dataset", "shapes", "--dataset_root", tmp_path)
    assert code == 0 and "shapes test" in (tmp_path / "logs/ex0/eval_shapes_test/log.txt").read_text(), err


def test_batch_size_and_workers_do_not_change_results(run, trained):
    found = []
    for name, extra in {
        "a": ("--eval_batch_size", "1"),
        "b": ("--eval_batch_size", "100", "--num_workers", "2"),
    }.items():
        run(
            "--eval",
            "--resume",
            trained / "best.pt",
            "--checkpoint_path",
            trained.parent,
            "--experiments",
            name,
            *extra,
        )
        found.append(read_json(trained.parent / name / "results.json"))
    assert found[0]["i2t"] == found[1]["i2t"] and found[0]["t2i"] == found[1]["t2i"]


def test_eval_precision_is_recorded(run, trained):
    code, _, err = run("--eval", "--resume", trained / "best.pt", "--eval_precision", "bf16")
    assert code == 0, err
    assert read_json(trained / "eval_csv_test" / "results.json")["precision"] == "bf16"


def test_random_weights_warn_loudly(run, arguments, tmp_path):
    code, _, err = run(*arguments, "--eval")
    assert code == 0 and "THE WEIGHTS ARE RANDOM" in err
    (folder,) = (tmp_path / "logs").iterdir()
    assert folder.name.startswith("eval_") and folder.name.endswith("_csv_test")


def test_resume_with_foreign_weights_equals_pretrained(run, arguments, tmp_path):
    file = tmp_path / "theirs.pt"
    torch.save({"state_dict": {f"module.{name}": v for name, v in small_clip(seed=3).state_dict().items()}}, file)
    results = []
    for name, option in (("resumed", "--resume"), ("pretrained", "--pretrained")):
        code, out, err = run(*arguments, "--eval", option, file, "--experiments", name)
        assert code == 0, err
        assert "RANDOM" not in err
        assert ("not a checkpoint of this tool" in out) == (option == "--resume")
        results.append(read_json(tmp_path / "logs" / name / "results.json"))
    assert results[0]["i2t"] == results[1]["i2t"]


def test_evaluation_into_a_training_run_is_refused(run, trained):
    command = ("--eval", "--resume", trained / "best.pt", "--checkpoint_path", trained.parent, "--experiments", "ex0")
    code, _, err = run(*command)
    assert code == 2 and "holds a training run" in err


def test_resume_auto_evaluates_the_named_run(run, trained):
    command = ("--eval", "--resume", "auto", "--checkpoint_path", trained.parent, "--experiments", "ex0")
    code, _, err = run(*command)
    assert code == 0, err
    assert (trained / "eval_csv_test" / "results.json").is_file()


def test_missing_split_is_named_with_the_data_and_the_option(run, trained, captioned, tmp_path):
    rows = [row for row in (captioned / "captions.csv").read_text().splitlines() if not row.endswith(",test")]
    (tmp_path / "no_test.csv").write_text("\n".join(rows) + "\n")
    data = ("--annotations", tmp_path / "no_test.csv", "--image_dir", captioned)
    code, _, err = run("--eval", "--resume", trained / "best.pt", *data)
    assert code == 2 and "no_test.csv" in err and "--eval_split" in err


def test_weights_from_two_places_are_refused(run, trained, tmp_path):
    code, _, err = run("--eval", "--resume", trained / "best.pt", "--pretrained", tmp_path / "other.pt")
    assert code == 2 and "--resume" in err and "--pretrained" in err


def test_model_config_may_move_after_training(run, arguments, captioned, tmp_path, monkeypatch):
    moved = tmp_path / "m.json"
    shutil.copy(captioned / "small.json", moved)
    assert run(*arguments, "--vision_model", moved, "--max_steps", "1")[0] == 0
    monkeypatch.chdir(tmp_path)
    for spelled in ("m.json", "./m.json", moved):
        code, _, err = run(*arguments, "--vision_model", spelled, "--max_steps", "2", "--resume", "auto")
        assert code == 0, err
    moved.unlink()
    code, _, err = run("--eval", "--resume", tmp_path / "logs/ex0/best.pt")
    assert code == 0, err


def test_contradicting_model_is_refused_with_both_names(run, trained, captioned):
    code, _, err = run("--eval", "--resume", trained / "best.pt", "--vision_model", "ViT-B/16")
    assert code == 2 and "ViT-B/16" in err and "small.json" in err
    code, _, err = run("--eval", "--resume", trained / "best.pt", "--vision_model", captioned / "small.json")
    assert code == 0, err


def test_logged_captions_are_one_line_each(tmp_path, capsys):
    start_log()
    image = tmp_path / "a\nb.jpg"
    log_samples(RetrievalDataset("x", "test", ImageFiles([str(image)]), ["long " * 10_000], [[0, 0]]))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and len(lines[0]) < 510 and lines[0].startswith("  a b.jpg: long ")
