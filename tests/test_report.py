"""--report and scripts/report.py, from end to end."""

import json
import shutil

import pytest

from tests.conftest import read_json


@pytest.fixture
def trained(run, arguments, tmp_path):
    """A finetune with a report."""
    code, out, err = run(*arguments, "--max_steps", "3", "--report")
    assert code == 0 and "report.html" in out, err
    return tmp_path / "logs" / "ex0"


def read(folder):
    return (folder / "report.html").read_text(encoding="utf-8")


def test_finetune_reports_before_and_after_with_curves(trained):
    content = read(trained)
    results = read_json(trained / "results.json")
    assert "ex0 on csv test" in content and "test, before training" in content and "Learning rate" in content
    for block in (results, results["before"]):
        assert f"{block['i2t']['MeanR']:.2f}" in content
    assert "95% bootstrap interval" in content


def test_without_the_option_there_is_no_report(run, arguments, tmp_path):
    assert run(*arguments, "--max_steps", "1")[0] == 0
    assert not (tmp_path / "logs" / "ex0" / "report.html").exists()


def test_new_results_delete_the_report_of_earlier_ones(run, trained):
    for options, exists in ((("--report",), True), ((), False)):
        assert run("--eval", "--resume", trained / "best.pt", *options)[0] == 0
        assert (trained / "eval_csv_test" / "report.html").exists() == exists


def test_overwrite_deletes_the_report_of_the_earlier_run(run, arguments, trained):
    assert run(*arguments, "--max_steps", "1", "--overwrite")[0] == 0
    assert not (trained / "report.html").exists()


def test_without_a_test_split_val_is_reported(run, script, arguments, captioned, tmp_path):
    rows = [row for row in (captioned / "captions.csv").read_text().splitlines() if not row.endswith(",test")]
    (tmp_path / "no_test.csv").write_text("\n".join(rows) + "\n")
    data = ("--annotations", tmp_path / "no_test.csv", "--image_dir", captioned)
    code, _, err = run(*arguments, *data, "--max_steps", "1", "--report")
    assert code == 0, err
    content = read(tmp_path / "logs" / "ex0")
    assert "ex0 on csv val" in content and "val, before training" in content
    (tmp_path / "logs" / "ex0" / "report.html").unlink()
    code, _, err = script("report", tmp_path / "logs" / "ex0", "--device", "cpu")
    assert code == 0 and not err.startswith("error"), err
    content = read(tmp_path / "logs" / "ex0")
    assert "ex0 on csv val" in content and "val, before training" in content


def test_evaluation_writes_a_report_beside_its_results(run, trained):
    code, _, err = run("--eval", "--resume", trained / "best.pt", "--report")
    assert code == 0, err
    content = read(trained / "eval_csv_test")
    assert "ex0 on csv test" in content and "before training" not in content and "Learning rate" not in content


def test_script_reports_a_finetune_as_the_run_itself(script, trained):
    before = read(trained)
    (trained / "report.html").unlink()
    code, out, err = script("report", trained)
    assert code == 0 and str(trained / "report.html") in out, err

    def without_time(content):
        return [line for line in content.splitlines() if "<dl>" not in line]

    assert without_time(read(trained)) == without_time(before)


def test_script_reports_an_evaluation_with_its_data(run, script, trained, captioned, tmp_path):
    shutil.copytree(captioned, tmp_path / "moved")
    command = ("--eval", "--resume", trained / "best.pt", "--eval_split", "val")
    assert run(*command, "--dataset", "csv", "--dataset_root", tmp_path / "moved")[0] == 0
    code, _, err = script("report", trained / "eval_csv_val", "--output", tmp_path / "mine.html")
    assert code == 0, err
    assert "ex0 on csv val" in (tmp_path / "mine.html").read_text(encoding="utf-8")
    assert not (trained / "eval_csv_val" / "report.html").exists()


def test_script_finds_the_checkpoint_of_a_moved_evaluation(run, script, trained, tmp_path):
    assert run("--eval", "--resume", trained / "best.pt")[0] == 0
    trained.rename(tmp_path / "elsewhere")
    code, _, err = script("report", tmp_path / "elsewhere" / "eval_csv_test")
    assert code == 0, err
    assert "elsewhere on csv test" in read(tmp_path / "elsewhere" / "eval_csv_test")


def test_script_reports_an_evaluation_of_pretrained_weights(run, script, arguments, tmp_path):
    assert run(*arguments, "--eval")[0] == 0
    (folder,) = (tmp_path / "logs").iterdir()
    code, _, err = script("report", folder)
    assert code == 0 and "RANDOM" in err
    assert "small.json on csv test" in read(folder)


def test_script_compares_two_runs(run, script, arguments, trained):
    assert run(*arguments, "--max_steps", "2", "--experiments", "ex1")[0] == 0
    code, _, err = script("report", trained, trained.parent / "ex1")
    assert code == 0, err
    content = read(trained)
    assert "ex0 and ex1" in content and "only ex1" in content


def test_script_refuses_two_runs_on_different_data(run, script, trained):
    assert run("--eval", "--resume", trained / "best.pt", "--eval_split", "val")[0] == 0
    code, _, err = script("report", trained, trained / "eval_csv_val")
    assert code == 2 and "not the same" in err and "--eval_split" in err
    code, _, err = script("report", trained, trained / "eval_csv_val", "--eval_split", "val")
    assert code == 0, err


def test_script_refuses_a_folder_without_a_run(script, tmp_path):
    code, _, err = script("report", tmp_path)
    assert code == 2 and "give the folder of a finetune or of an evaluation" in err
    (tmp_path / "options.json").write_text(json.dumps({"versions": {}, "resume": "gone.pt"}))
    code, _, err = script("report", tmp_path)
    assert code == 2 and "gone.pt" in err
