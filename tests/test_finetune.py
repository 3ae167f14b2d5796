"""Finetunes from end to end, with a small model and a small dataset."""

import json
import shutil

import pytest
import torch

from clip_retrieval.evaluation.metrics import report
from clip_retrieval.reporting.ranks_file import read_ranks
from tests.conftest import read_json, read_lines

BLOCK = {"model", "decoder", "dataset", "split", "precision", "images", "captions"}
BLOCK |= {"i2t", "t2i", "mean_recall", "rsum", "seconds"}


def test_run_writes_its_documented_files(run, arguments, tmp_path):
    code, out, err = run(*arguments, "--keep_every", "1")
    assert code == 0, err
    folder = tmp_path / "logs" / "ex0"
    files = {path.name for path in folder.iterdir()}
    expected = {"options.json", "log.txt", "metrics.jsonl", "tensorboard", "last.pt", "best.pt", "results.json"}
    assert files == expected | {"ranks.npz", "epoch_1.pt", "epoch_2.pt"}
    assert any((folder / "tensorboard").iterdir())

    # results.json
    results = read_json(folder / "results.json")
    assert set(results) >= BLOCK
    assert (results["split"], results["images"], results["captions"]) == ("test", 6, 15)
    for name, split in (("val", "val"), ("before", "test")):
        assert set(results[name]) - {"intervals"} == BLOCK
        assert results[name]["split"] == split
    for block in (results, results["val"], results["before"]):
        assert list(block["i2t"]) == list(block["t2i"]) == ["R@1", "R@5", "R@10", "MedR", "MeanR"]
        recalls = [block[d][k] for d in ("i2t", "t2i") for k in ("R@1", "R@5", "R@10")]
        assert block["rsum"] == pytest.approx(sum(recalls))
        assert block["mean_recall"] == pytest.approx(sum(recalls) / 6)

    # intervals and ranks of the reported evaluations, but not of each epoch
    assert "intervals" not in results["val"]
    for block in (results, results["before"]):
        low, high = block["intervals"]["t2i"]["MeanR"]
        assert low <= block["t2i"]["MeanR"] <= high
    ranks = read_ranks(folder / "ranks.npz").ranks
    assert report(ranks["i2t"], ranks["t2i"])["t2i"] == results["t2i"]

    # options.json, log and metrics.jsonl
    options = read_json(folder / "options.json")
    assert options["batch_size"] == 10 and options["versions"]["torch"] and "cpu" in options["device_used"]
    assert "10 = 1 x 10" in out and "35 captions" in out and "a " in out
    kinds = [(line["kind"], line["step"]) for line in read_lines(folder / "metrics.jsonl")]
    first, second = ([("train", step) for step in steps] for steps in ((1, 2, 3), (4, 5, 6)))
    assert kinds == [("before", 0), *first, ("val", 3), *second, ("val", 6), ("test", 6)]


def test_checkpoints_have_the_documented_entries(run, arguments, tmp_path, captioned):
    run(*arguments)
    folder = tmp_path / "logs" / "ex0"
    last = torch.load(folder / "last.pt", weights_only=True)
    best = torch.load(folder / "best.pt", weights_only=True)
    assert {"model", "model_config", "preprocess", "options", "epoch", "step"} <= set(best) <= set(last) | {"val"}
    assert {"optimizer", "scaler", "random", "sampler"} <= set(last)
    assert (last["epoch"], last["step"]) == (2, 6)
    assert last["options"]["dataset_root"] == str(captioned)
    assert all(value.dtype == torch.float32 for value in last["model"].values())


def test_without_a_test_split_val_gets_intervals_and_ranks(run, arguments, captioned, tmp_path):
    rows = [row for row in (captioned / "captions.csv").read_text().splitlines() if not row.endswith(",test")]
    (tmp_path / "no_test.csv").write_text("\n".join(rows) + "\n")
    data = ("--annotations", tmp_path / "no_test.csv", "--image_dir", captioned)
    code, _, err = run(*arguments, *data, "--epochs", "1")
    assert code == 0, err
    folder = tmp_path / "logs" / "ex0"
    results = read_json(folder / "results.json")
    assert results["split"] == "val" and results["val"]["intervals"] == results["intervals"]
    ranks = read_ranks(folder / "ranks.npz").ranks
    assert report(ranks["i2t"], ranks["t2i"])["i2t"] == results["i2t"]


def test_keep_weights_only_leaves_the_optimizer_out_of_numbered_checkpoints(run, arguments, tmp_path):
    code, _, err = run(*arguments, "--keep_every", "1", "--keep_steps", "6", "--keep_weights_only")
    assert code == 0, err
    folder = tmp_path / "logs" / "ex0"
    last = torch.load(folder / "last.pt", weights_only=True)
    assert "optimizer" in last
    for name in ("epoch_1.pt", "epoch_2.pt", "step_6.pt"):
        kept = torch.load(folder / name, weights_only=True)
        assert not {"optimizer", "random", "sampler"} & set(kept)
    assert all(torch.equal(value, last["model"][key]) for key, value in kept["model"].items())
    code, _, err = run("--eval", "--resume", folder / "epoch_1.pt", "--device", "cpu", "--num_workers", "0")
    assert code == 0, err


def test_best_epoch_on_val_is_reported(run, arguments, tmp_path):
    run(*arguments, "--epochs", "4")
    folder = tmp_path / "logs" / "ex0"
    results = read_json(folder / "results.json")
    val = [line for line in read_lines(folder / "metrics.jsonl") if line["kind"] == "val"]
    best = max(val, key=lambda line: line["rsum"])
    assert results["val"]["rsum"] == best["rsum"]
    assert results["step"] == best["step"] == torch.load(folder / "best.pt", weights_only=True)["step"]
    code, _, _ = run("--eval", "--resume", folder / "best.pt", "--device", "cpu")
    again = read_json(folder / "eval_csv_test" / "results.json")
    assert code == 0 and {k: again[k] for k in ("i2t", "t2i", "rsum")} == {
        k: results[k] for k in ("i2t", "t2i", "rsum")
    }


def test_log_lines_have_the_metrics_of_a_step(run, arguments, tmp_path):
    _, out, _ = run(*arguments, "--display", "3")
    lines = [line for line in out.splitlines() if " step " in line and "pairs/s" in line]
    assert len(lines) == 2
    for words in (
        "epoch 1",
        "step 3/6",
        "loss ",
        "lr ",
        "scale ",
        "i2t ",
        "t2i ",
        "pairs/s",
        "data ",
        " trained, ",
        " left",
    ):
        assert words in lines[0]
    train = [line for line in read_lines(tmp_path / "logs/ex0/metrics.jsonl") if line["kind"] == "train"]
    assert [line["step"] for line in train] == [3, 6]
    assert {"loss", "lr", "logit_scale", "i2t_accuracy", "t2i_accuracy", "epoch"} <= set(train[0])


@pytest.mark.parametrize(
    "extra",
    [
        ("--loss", "siglip"),
        ("--loss", "margin"),
        ("--loss", "triplet"),
        ("--distill_from", "start", "--distill_kind", "feature", "--grad_cache", "3", "--freeze_vision"),
        ("--drop_path", "0.2", "--patch_dropout", "0.5", "--grad_cache", "3"),
        ("--augment", "rand", "--crop_scale", "0.5", "--word_dropout", "0.3", "--freeze_text"),
        ("--label_smoothing", "0.1", "--i2t_weight", "0.3", "--temperature", "0.05"),
        ("--trainable", "linear_projection"),
        ("--trainable", "adaptor"),
        ("--loss", "margin", "--trainable", "adaptor"),
        ("--freeze_vision",),
        ("--freeze_text",),
        ("--trainable", "lora", "--lora_targets", "all", "--lora_dropout", "0.1"),
        ("--trainable", "lora", "--freeze_text", "--precision", "bf16", "--grad_checkpointing"),
        ("--trainable", "bitfit"),
        ("--unlocked_image_blocks", "1", "--unlocked_text_blocks", "0", "--grad_checkpointing"),
        ("--layer_decay", "0.65", "--lr_head", "1e-2"),
        ("--accum_freq", "2"),
        ("--grad_cache", "3"),
        ("--decoder", "fast"),
        ("--trainable", "linear_projection", "--no_feature_cache"),
        ("--augment", "crop"),
        ("--use_augment",),
        ("--caption_sampling", "one"),
        ("--grad_clip", "0.1"),
        ("--precision", "bf16"),
        ("--num_workers", "2"),
    ],
    ids=" ".join,
)
def test_each_variant_trains_and_its_checkpoint_evaluates_the_same(run, arguments, tmp_path, extra):
    code, _, err = run(*arguments, *extra, "--max_steps", "3", "--no_eval_first")
    assert code == 0, err
    folder = tmp_path / "logs" / "ex0"
    results = read_json(folder / "results.json")
    assert "before" not in results
    code, _, err = run("--eval", "--resume", folder / "best.pt", "--device", "cpu")
    assert code == 0, err
    assert read_json(folder / "eval_csv_test" / "results.json")["t2i"] == results["t2i"]


@pytest.mark.parametrize("model", ["small.json", "resnet.json"])
def test_grad_checkpointing_does_not_change_the_weights(run, arguments, tmp_path, captioned, model):
    weights = []
    for name, extra in (("plain", ()), ("recomputed", ("--grad_checkpointing",))):
        arguments_of_model = [*arguments, "--vision_model", captioned / model, "--max_steps", "2", "--no_eval_first"]
        assert run(*arguments_of_model, "--experiments", name, *extra)[0] == 0
        weights.append(torch.load(tmp_path / "logs" / name / "last.pt", weights_only=True)["model"])
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, msg=name)


def test_workers_do_not_change_the_weights(run, arguments, tmp_path):
    weights = []
    for workers in ("0", "2"):
        extra = ("--augment", "crop", "--num_workers", workers, "--experiments", f"workers{workers}")
        run(*arguments, *extra, "--no_eval_first")
        weights.append(torch.load(tmp_path / f"logs/workers{workers}/last.pt", weights_only=True)["model"])
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_seed_determines_the_weights(run, arguments, tmp_path):
    weights = {}
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        run(*arguments, "--seed", seed, "--experiments", name, "--no_eval_first")
        weights[name] = torch.load(tmp_path / f"logs/{name}/last.pt", weights_only=True)["model"]["visual.proj"]
    assert torch.equal(weights["a"], weights["b"]) and not torch.equal(weights["a"], weights["c"])


def test_eval_every_and_max_steps(run, arguments, tmp_path):
    run(*arguments, "--epochs", "5", "--eval_every", "2")
    val = [line["step"] for line in read_lines(tmp_path / "logs/ex0/metrics.jsonl") if line["kind"] == "val"]
    assert val == [6, 12, 15]
    run(*arguments, "--max_steps", "4", "--eval_every", "0", "--overwrite")
    lines = read_lines(tmp_path / "logs/ex0/metrics.jsonl")
    assert [line["step"] for line in lines if line["kind"] == "val"] == [4]
    assert max(line["step"] for line in lines) == 4


def test_small_split_shrinks_the_batch_with_a_warning(run, arguments, tmp_path):
    code, out, err = run(*arguments, "--batch_size", "256")
    assert code == 0 and "--batch_size 256 becomes 35" in err and "35 = 1 x 35" in out


def test_long_warmup_is_clamped_with_one_warning(run, arguments, tmp_path):
    code, _, err = run(*arguments, "--warmup", "500")
    assert code == 0 and err.count("--warmup 500") == 1
    train = [line for line in read_lines(tmp_path / "logs/ex0/metrics.jsonl") if line["kind"] == "train"]
    assert [line["lr"] for line in train] == pytest.approx([1e-3 * step / 6 for step in range(1, 7)])


def test_default_warmup_of_a_short_run_is_a_tenth_of_it_without_a_warning(run, arguments, tmp_path):
    at = arguments.index("--warmup")
    command = [*arguments[:at], *arguments[at + 2 :], "--epochs", "7", "--schedule", "constant"]
    for name, extra in (("typed", ["--warmup", "2"]), ("default", []), ("auto", ["--warmup", "auto"])):
        code, _, err = run(*command, *extra, "--no_eval_first", "--eval_every", "0", "--experiments", name)
        assert code == 0 and "--warmup" not in err
    logs = [read_lines(tmp_path / f"logs/{name}/metrics.jsonl") for name in ("typed", "default", "auto")]
    assert logs[0] == logs[1] == logs[2]  # 21 steps
    assert [line["lr"] for line in logs[1][:3]] == pytest.approx([5e-4, 1e-3, 1e-3])


def test_data_without_splits_are_trained_on_and_not_scored(run, arguments, tmp_path, captioned):
    rows = (captioned / "captions.csv").read_text().splitlines()
    unsplit = tmp_path / "unsplit.csv"
    unsplit.write_text("\n".join(row.rsplit(",", 1)[0] for row in rows) + "\n")
    code, _, err = run(*arguments, "--annotations", unsplit, "--image_dir", captioned, "--max_steps", "2")
    assert code == 0, err
    assert "no val split" in err and "no test split" in err
    folder = tmp_path / "logs" / "ex0"
    assert not (folder / "best.pt").exists()
    results = read_json(folder / "results.json")
    assert "i2t" not in results and "val" not in results and results["steps"] == 2
    code, _, err = run("--eval", "--resume", folder / "last.pt", "--device", "cpu")
    assert code == 0, err
    assert read_json(folder / "eval_csv_all" / "results.json")["split"] == "all"


def test_non_finite_loss_stops_the_run_and_keeps_the_checkpoint(run, arguments, tmp_path, monkeypatch):
    from clip_retrieval.training import trainer as module

    normal = module.Trainer.step

    def step(self, batch, number, rate):
        if number == 5:
            self.model.clip.visual.proj.data[0, 0] = float("nan")
        return normal(self, batch, number, rate)

    monkeypatch.setattr(module.Trainer, "step", step)
    code, _, err = run(*arguments, "--display", "100")
    assert code == 3
    assert "step 5" in err and err.strip().count("\n") == 0 and "--resume auto" in err
    assert torch.load(tmp_path / "logs/ex0/last.pt", weights_only=True)["step"] == 3


def test_non_finite_weights_are_not_saved(run, arguments, tmp_path):
    code, _, err = run(*arguments, "--lr", "1e18", "--warmup", "0", "--max_steps", "1")
    assert code == 3 and "not finite" in err and "--resume auto" in err
    assert not (tmp_path / "logs/ex0/last.pt").exists()


def test_training_seconds_do_not_depend_on_display(run, arguments, tmp_path):
    run(*arguments, "--display", "1000")
    assert read_json(tmp_path / "logs/ex0/results.json")["seconds"]["training"] > 0.05


def test_options_json_has_the_typed_options(run, arguments, tmp_path):
    run(*arguments, "--weight_decay", "0.05", "--max_steps", "1")
    assert json.loads((tmp_path / "logs/ex0/options.json").read_text())["weight_decay"] == 0.05


def test_image_cache_is_reused_and_does_not_change_results(run, arguments, tmp_path):
    cache = tmp_path / "cache"
    weights, results = [], []
    for name, extra in (("plain", ()), ("cached", ("--image_cache", cache)), ("again", ("--image_cache", cache))):
        code, out, err = run(*arguments, *extra, "--experiments", name)
        assert code == 0, err
        weights.append(torch.load(tmp_path / "logs" / name / "last.pt", weights_only=True)["model"])
        results.append(read_json(tmp_path / f"logs/{name}/results.json")["i2t"])
        assert ("building" in out) == (name == "cached")
    assert len(list(cache.glob("*.pixels"))) == 3 and results[0] == results[1] == results[2]
    for other in weights[1:]:
        assert all(torch.equal(value, other[key]) for key, value in weights[0].items())


def test_decoder_is_recorded_in_results_and_checkpoint(run, arguments, tmp_path):
    code, _, err = run(*arguments, "--decoder", "fast", "--max_steps", "1", "--no_eval_first")
    assert code == 0, err
    assert read_json(tmp_path / "logs/ex0/results.json")["decoder"] == "fast"
    code, _, err = run("--eval", "--resume", tmp_path / "logs/ex0/last.pt")
    assert code == 0, err
    assert read_json(tmp_path / "logs/ex0/eval_csv_test/results.json")["decoder"] == "fast"


def test_eval_steps_and_keep_steps(run, arguments, tmp_path):
    code, _, err = run(*arguments, "--eval_steps", "2", "--keep_steps", "4", "--eval_every", "0")
    assert code == 0, err
    folder = tmp_path / "logs/ex0"
    val = [line for line in read_lines(folder / "metrics.jsonl") if line["kind"] == "val"]
    assert [line["step"] for line in val] == [2, 4, 6]
    assert all({"loss", "i2t_accuracy", "t2i_accuracy"} <= line.keys() for line in val)
    assert [path.name for path in folder.glob("*_*.pt")] == ["step_4.pt"]
    assert torch.load(folder / "step_4.pt", weights_only=True)["step"] == 4


def test_chinese_clip_intervals_of_minus_one_are_off(run, arguments, tmp_path):
    off = ("--valid-step-interval", "--valid-epoch-interval", "--save-step-frequency", "--save-epoch-frequency")
    code, _, err = run(*arguments, *(word for name in off for word in (name, "-1")))
    assert code == 0, err
    folder = tmp_path / "logs/ex0"
    assert [line["step"] for line in read_lines(folder / "metrics.jsonl") if line["kind"] == "val"] == [6]
    assert not list(folder.glob("*_*.pt"))


def test_in_batch_accuracy_is_optional(run, arguments, tmp_path):
    lines = {}
    for name, extra in (("with", ["--report-training-batch-acc"]), ("without", ["--no_report_training_batch_acc"])):
        code, out, err = run(*arguments, *extra, "--experiments", name, "--max_steps", "2", "--no_eval_first")
        assert code == 0, err
        lines[name] = next(line for line in read_lines(tmp_path / f"logs/{name}/metrics.jsonl"))
        assert ("accuracy i2t" in next(line for line in out.splitlines() if "step 1/2" in line)) == (name == "with")
    assert "i2t_accuracy" in lines["with"] and "i2t_accuracy" not in lines["without"]


@pytest.mark.parametrize("is_broken", [False, True])
def test_run_with_loader_processes_ends(start, captioned, arguments, tmp_path, is_broken):
    data = captioned
    if is_broken:
        data = tmp_path / "data"
        shutil.copytree(captioned, data)
        (data / "13.jpg").write_bytes(b"no image")
    process = start(*arguments, "--dataset_root", data, "--num_workers", "2", "--max_steps", "4", "--no_eval_first")
    _, err = process.communicate(timeout=60)
    assert process.returncode == (2 if is_broken else 0), err
    assert ("13.jpg" in err) == is_broken


def test_own_rates_and_layer_decay_leave_the_logged_rate(run, arguments, tmp_path):
    run(*arguments, "--max_steps", "3", "--no_eval_first", "--lr_text", "5e-3", "--layer_decay", "0.5")
    last = torch.load(tmp_path / "logs/ex0/last.pt", weights_only=True)
    logged = [line["lr"] for line in read_lines(tmp_path / "logs/ex0/metrics.jsonl") if line["kind"] == "train"]
    assert logged[:2] == [5e-4, 1e-3]  # a warmup of two steps to --lr
    groups = last["optimizer"]["param_groups"]
    factors = [factor * 0.5**depth for factor in (1, 5) for depth in range(4)]
    assert sorted({group["lr"] / logged[-1] for group in groups}) == pytest.approx(sorted(factors))


@pytest.mark.parametrize(
    "extra, words",
    [
        (("--lora_rank", "4"), "--lora_rank needs --trainable lora"),
        (("--optimizer", "lion", "--eps", "1e-8"), "--eps 1e-08 has no effect with --optimizer lion"),
        (("--optimizer", "muon", "--trainable", "bitfit"), "--trainable bitfit trains none; use adamw"),
        (("--freeze_vision", "--unlocked_image_blocks", "1"), "--unlocked_image_blocks and --freeze_vision"),
        (("--trainable", "adaptor", "--unlocked_text_blocks", "1"), "--unlocked_text_blocks has no effect"),
    ],
)
def test_contradicting_choices_of_weights_are_refused(run, arguments, extra, words):
    code, _, err = run(*arguments, *extra)
    assert code == 2 and words in err
