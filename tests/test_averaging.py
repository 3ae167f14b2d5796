"""Finetunes with --ema, --swa_start, --patience and --retention_dataset, from end to end."""

import pytest
import torch

from clip_retrieval.run import selection
from tests.conftest import Killed, read_json, read_lines
from tests.test_crash import outputs

AVERAGES = ("--ema", "0.7", "--swa_start", "1", "--lr", "0.01")
RETENTION = ("--retention_dataset", "shapes")


def weights(path):
    return torch.load(path, weights_only=True)["model"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def lines_of(folder, kind):
    return [line for line in read_lines(folder / "metrics.jsonl") if line["kind"] == kind]


def test_best_is_the_better_of_weights_and_averages_on_val(run, arguments, tmp_path):
    code, out, err = run(*arguments, *AVERAGES, "--epochs", "4")
    assert code == 0, err
    folder = tmp_path / "logs/ex0"
    scores = {}
    for kind, steps in (("val", [3, 6, 9, 12]), ("val_ema", [3, 6, 9, 12]), ("val_swa", [12])):
        lines = lines_of(folder, kind)
        assert [line["step"] for line in lines] == steps
        scores |= {(line["step"], kind): line["rsum"] for line in lines}
    results = read_json(folder / "results.json")
    kind = "val" if results["average"] == "none" else f"val_{results['average']}"
    assert results["val"]["rsum"] == scores[results["step"], kind] == max(scores.values())
    assert "(ema weights)" in out and "(swa weights)" in out


@pytest.mark.parametrize("winner", ["none", "ema", "swa"])
def test_best_has_the_weights_that_scored_best(run, arguments, tmp_path, monkeypatch, winner):
    def selection_score(run, found):
        return float(found["average"] == winner and found["step"] == 6)

    monkeypatch.setattr(selection, "selection_score", selection_score)
    assert run(*arguments, *AVERAGES)[0] == 0
    folder = tmp_path / "logs/ex0"
    expected = weights(folder / ("last.pt" if winner == "none" else f"{winner}.pt"))
    assert same(weights(folder / "best.pt"), expected)
    assert read_json(folder / "results.json")["average"] == winner
    others = {"last.pt", "ema.pt", "swa.pt"} - {"last.pt" if winner == "none" else f"{winner}.pt"}
    assert not any(same(expected, weights(folder / name)) for name in others)


def test_swa_is_the_mean_of_the_epochs_from_its_start(run, arguments, tmp_path):
    assert run(*arguments, "--swa_start", "2", "--epochs", "4", "--keep_every", "1", "--lr", "0.01")[0] == 0
    folder = tmp_path / "logs/ex0"
    epochs = [weights(folder / f"epoch_{epoch}.pt") for epoch in (2, 3, 4)]
    for name, value in weights(folder / "swa.pt").items():
        mean = torch.stack([epoch[name].double() for epoch in epochs]).mean(0)
        torch.testing.assert_close(value.double(), mean, atol=1e-6, rtol=1e-5)


def test_average_of_lora_is_merged_in_its_files(run, arguments, tmp_path):
    lora = ("--trainable", "lora", "--lora_targets", "all")
    code, _, err = run(*arguments, *AVERAGES, *lora, "--drop_path", "0.2", "--distill_from", "start")
    assert code == 0, err
    folder = tmp_path / "logs/ex0"
    files = {name: weights(folder / name) for name in ("best.pt", "last.pt", "ema.pt", "start.pt")}
    assert len({tuple(state) for state in files.values()}) == 1 and not any("lora" in name for name in files["ema.pt"])
    assert not same(files["ema.pt"], files["last.pt"]) and not same(files["ema.pt"], files["start.pt"])
    best = read_json(folder / "results.json")
    assert run("--eval", "--resume", folder / "best.pt")[0] == 0
    assert read_json(folder / "eval_csv_test/results.json")["rsum"] == best["rsum"]


def test_run_that_ends_before_the_first_average_says_so(run, arguments, tmp_path):
    code, _, err = run(*arguments, "--swa_start", "2", "--max_steps", "4")
    assert code == 0 and "before epoch 2 did: there is no swa.pt" in err
    assert not (tmp_path / "logs/ex0/swa.pt").exists()


def test_without_averages_no_file_and_no_key_is_added(run, arguments, tmp_path):
    assert run(*arguments)[0] == 0
    folder = tmp_path / "logs/ex0"
    assert not {"ema.pt", "swa.pt"} & {path.name for path in folder.iterdir()}
    assert not {"average", "retention", "retention_before"} & set(read_json(folder / "results.json"))
    assert "averages" not in torch.load(folder / "last.pt", weights_only=True)


def test_overwrite_deletes_the_averages_of_the_earlier_run(run, arguments, tmp_path):
    assert run(*arguments, *AVERAGES)[0] == 0
    assert run(*arguments, "--overwrite")[0] == 0
    assert not {"ema.pt", "swa.pt"} & {path.name for path in (tmp_path / "logs/ex0").iterdir()}


@pytest.mark.parametrize("extra", [(), ("--grad_cache", "4", "--precision", "bf16")], ids=str)
def test_resume_with_averages_is_bit_identical(run, run_killed, arguments, tmp_path, extra):
    command = [*arguments, *AVERAGES, *RETENTION, "--retention_weight", "0.1", "--save_every", "2", *extra]
    command += ["--resume", "auto"]
    code, _, err = run(*command, "--name", "whole")
    assert code == 0, err
    whole = outputs(tmp_path / "logs/whole")
    assert whole["last.pt"]["averages"].keys() == {"ema", "swa"}
    for step in (3, 4, 6):
        name = ("--name", f"killed_{step}")
        run_killed(step, *command, *name)
        code, _, err = run(*command, *name)
        assert code == 0, err
        assert outputs(tmp_path / f"logs/killed_{step}") == whole


def test_averages_may_start_at_a_resume(run, arguments, tmp_path):
    assert run(*arguments, "--epochs", "1")[0] == 0
    code, _, err = run(*arguments, "--resume", "auto", "--ema", "0.5", "--epochs", "2")
    assert code == 0, err
    assert torch.load(tmp_path / "logs/ex0/last.pt", weights_only=True)["averages"]["ema"]["updates"] == 3


def test_no_val_split_keeps_the_averages_and_reports_the_weights(run, arguments, captioned, tmp_path):
    rows = [row for row in (captioned / "captions.csv").read_text().splitlines() if not row.endswith(",val")]
    (tmp_path / "no_val.csv").write_text("\n".join(rows) + "\n")
    data = ("--annotations", tmp_path / "no_val.csv", "--image_dir", captioned)
    code, _, err = run(*arguments, *data, *AVERAGES)
    assert code == 0, err
    assert {"ema.pt", "swa.pt"} <= {path.name for path in (tmp_path / "logs/ex0").iterdir()}
    code, _, err = run(*arguments, *data, "--patience", "2", "--name", "b")
    assert code == 2 and "--patience needs a val split" in err


FLAT = ("--lr", "1e-12", "--epochs", "6", "--patience", "2")  # the weights hardly move: no evaluation beats the first


def test_patience_stops_after_evaluations_without_a_new_best(run, arguments, tmp_path):
    code, out, err = run(*arguments, *FLAT)
    assert code == 0, err
    assert "stopped at step 9: no new best on val in 2 evaluations" in out
    folder = tmp_path / "logs/ex0"
    results = read_json(folder / "results.json")
    assert (results["step"], results["steps"]) == (3, 9)
    assert [line["step"] for line in lines_of(folder, "val")] == [3, 6, 9]
    # a resume of the stopped run stays stopped; with more patience it goes on
    assert run(*arguments, *FLAT, "--resume", "auto")[0] == 0
    assert read_json(folder / "results.json")["steps"] == 9
    assert run(*arguments, *FLAT, "--resume", "auto", "--patience", "3")[0] == 0
    assert read_json(folder / "results.json")["steps"] == 12


def test_early_stop_scores_the_average_of_the_epochs(run, arguments, tmp_path):
    assert run(*arguments, *FLAT, "--swa_start", "1")[0] == 0
    folder = tmp_path / "logs/ex0"
    assert [line["step"] for line in lines_of(folder, "val_swa")] == [9]
    assert torch.load(folder / "last.pt", weights_only=True)["averages"]["swa"]["updates"] == 3


@pytest.mark.parametrize("killed_in", range(1, 5))
def test_patience_after_a_kill_in_an_evaluation_is_the_same(run, arguments, tmp_path, monkeypatch, killed_in):
    command = [*arguments, *FLAT, "--no_eval_first", "--swa_start", "1", "--resume", "auto"]
    assert run(*command, "--name", "whole")[0] == 0
    normal, calls = selection.write_scores, []

    def write_scores(*args):
        calls.append(args)
        normal(*args)
        if len(calls) == killed_in:  # val of three epochs, then val_swa
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(selection, "write_scores", write_scores)
        with pytest.raises(Killed):
            run(*command)
    assert run(*command)[0] == 0
    assert outputs(tmp_path / "logs/ex0") == outputs(tmp_path / "logs/whole")


def test_retention_is_scored_before_during_and_after(run, arguments, tmp_path):
    code, out, err = run(*arguments, *RETENTION)
    assert code == 0, err
    folder = tmp_path / "logs/ex0"
    lines = lines_of(folder, "retention")
    assert [line["step"] for line in lines] == [0, 3, 6]
    results = read_json(folder / "results.json")
    assert results["retention_before"]["rsum"] == lines[0]["rsum"]
    after = {line["step"]: line["rsum"] for line in lines}[results["step"]]
    assert results["retention"]["rsum"] == after
    assert results["retention"]["dataset"] == "shapes" and results["retention"]["split"] == "test"
    table = out[out.rindex("R@1") :]
    assert "before, shapes test" in table and "\n        shapes test" in table


def test_retention_does_not_change_training(run, arguments, tmp_path):
    assert run(*arguments)[0] == 0
    assert run(*arguments, *RETENTION, "--name", "watched")[0] == 0
    logs = tmp_path / "logs"
    assert same(weights(logs / "ex0/last.pt"), weights(logs / "watched/last.pt"))


@pytest.mark.parametrize("weight, best", [("0", 6), ("10", 3)])
def test_retention_weight_decides_best(run, arguments, tmp_path, monkeypatch, weight, best):
    normal = selection.score_split

    def score_split(run, split, **kwargs):
        encoded, block, ranks = normal(run, split, **kwargs)
        rises = split is run.val  # val improves from epoch to epoch, what is retained falls
        return encoded, block | {"rsum": 100.0 + run.progress.step * (1 if rises else -1)}, ranks

    monkeypatch.setattr(selection, "score_split", score_split)
    code, _, err = run(*arguments, *RETENTION, "--retention_weight", weight)
    assert code == 0, err
    assert read_json(tmp_path / "logs/ex0/results.json")["step"] == best


@pytest.mark.parametrize(
    "extra, message",
    [
        (("--retention_root", "x"), "--retention_root needs --retention_dataset"),
        (("--retention_weight", "1"), "--retention_weight needs --retention_dataset or --zero_shot_eval"),
        (("--patience", "1", "--eval_every", "0"), "--patience 1 counts evaluations"),
        (("--decay_fraction", "0.5"), "--decay_fraction 0.5 needs --schedule wsd"),
        (("--swa_start", "3"), "--swa_start 3 is after the last epoch"),
        (("--retention_dataset", "unknown"), "unknown"),
    ],
)
def test_options_without_effect_are_refused(run, arguments, extra, message):
    code, _, err = run(*arguments, *extra)
    assert code == 2 and message in err and "Traceback" not in err
