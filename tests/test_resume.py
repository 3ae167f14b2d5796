"""A stopped run resumes to the results of an undisturbed run."""

import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from clip_retrieval.data.readers import csv_file
from clip_retrieval.models.checkpoint import Checkpoint
from tests.conftest import Killed, read_json, read_lines


def ending(folder):
    last = torch.load(folder / "last.pt", weights_only=True)
    return last["model"], last["optimizer"]["state"], read_lines(folder / "metrics.jsonl"), results(folder)


def results(folder):
    content = read_json(folder / "results.json")
    return {k: content.get(k) for k in ("i2t", "t2i", "rsum", "step", "steps")} | {
        k: content[k]["rsum"] for k in ("val", "before") if k in content
    }


def assert_same_ending(a, b):
    (weights, moments, lines, result), (weights_b, moments_b, lines_b, result_b) = ending(a), ending(b)
    assert all(torch.equal(weights[name], weights_b[name]) for name in weights)
    for key, state in moments.items():
        assert all(torch.equal(state[name], moments_b[key][name]) for name in state)
    assert lines == lines_b
    assert result == result_b


@pytest.fixture
def whole(run, arguments, tmp_path):
    """The folder of an undisturbed run."""
    assert run(*arguments, "--augment", "crop", "--experiments", "whole")[0] == 0
    return tmp_path / "logs" / "whole"


@pytest.mark.parametrize("killed_in_step", range(1, 7))
def test_resume_after_kill_in_any_step_is_bit_identical(run, run_killed, arguments, tmp_path, whole, killed_in_step):
    command = [*arguments, "--augment", "crop", "--save_every", "2", "--resume", "auto"]
    run_killed(killed_in_step, *command)
    code, _, err = run(*command)
    assert code == 0, err
    assert_same_ending(whole, tmp_path / "logs" / "ex0")


@pytest.mark.parametrize(
    "extra",
    [
        (),
        ("--loss", "siglip", "--grad_cache", "4"),
        ("--vision_model", "simple.json"),
        ("--trainable", "lora", "--lora_targets", "all", "--lora_dropout", "0.2", "--grad_cache", "4"),
        ("--trainable", "lora", "--precision", "bf16"),
        ("--trainable", "bitfit", "--layer_decay", "0.5", "--lr_image", "1e-2", "--unlocked_text_blocks", "1"),
        ("--drop_path", "0.5", "--patch_dropout", "0.5", "--word_dropout", "0.5", "--precision", "bf16"),
        ("--distill_from", "start", "--grad_cache", "4"),
        ("--optimizer", "lion", "--grad_clip", "0.1", "--ema", "0.5", "--trainable", "bitfit"),
        ("--optimizer", "muon", "--precision", "bf16", "--layer_decay", "0.5", "--grad_clip", "0.1", "--ema", "0.5"),
        ("--optimizer", "muon", "--trainable", "lora", "--lora_targets", "all", "--grad_cache", "4"),
    ],
    ids=str,
)
def test_resume_with_two_threads_is_bit_identical(run, run_killed, arguments, captioned, tmp_path, extra):
    extra = [captioned / word if word.endswith(".json") else word for word in extra]
    command = [*arguments, "--augment", "rand", "--save_every", "2", *extra]
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert run(*command, "--experiments", "whole")[0] == 0
        run_killed(4, *command, "--resume", "auto")
        code, _, err = run(*command, "--resume", "auto")
    finally:
        torch.set_num_threads(threads)
    assert code == 0, err
    assert_same_ending(tmp_path / "logs" / "whole", tmp_path / "logs" / "ex0")


MANY = (
    *("--ema", "0.5", "--distill_from", "start", "--drop_path", "0.3", "--patch_dropout", "0.5"),
    *("--word_dropout", "0.3", "--augment", "rand", "--layer_decay", "0.7", "--grad_cache", "4", "--grad_clip", "1"),
    *("--schedule", "wsd", "--decay_fraction", "0.5", "--swa_start", "1", "--label_smoothing", "0.1"),
    *("--start_image_size", "8", "--start_image_size_until", "0.6", "--save_every", "1"),
)
"""Ingredients of a recipe that are used together."""


@pytest.mark.parametrize(
    "extra",
    [
        (),
        ("--trainable", "lora", "--lora_targets", "all", "--lora_dropout", "0.2", "--precision", "bf16"),
        ("--augment", "none", "--word_dropout", "0", "--distill_kind", "feature", "--freeze_text"),  # a cached teacher
    ],
    ids=["all", "lora", "cached"],
)
@pytest.mark.parametrize("killed_in_step", [2, 5])
def test_resume_of_many_ingredients_together_is_bit_identical(
    run, run_killed, arguments, tmp_path, extra, killed_in_step
):
    command = [*arguments, *MANY, *extra]
    code, _, err = run(*command, "--experiments", "whole")
    assert code == 0, err
    run_killed(killed_in_step, *command, "--resume", "auto")
    code, _, err = run(*command, "--resume", "auto")
    assert code == 0, err
    assert_same_ending(tmp_path / "logs/whole", tmp_path / "logs/ex0")
    averages = [torch.load(tmp_path / f"logs/{n}/last.pt", weights_only=True)["averages"] for n in ("whole", "ex0")]
    for name in ("ema", "swa"):
        expected, found = (state[name]["weights"] for state in averages)
        assert expected and all(torch.equal(found[key], value) for key, value in expected.items())


def test_resume_after_kill_in_an_evaluation_loses_no_step(run, arguments, tmp_path, whole, monkeypatch):
    from clip_retrieval.run import scoring as module

    normal, calls = module.score, []

    def score(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:  # before training, after the first epoch
            raise Killed
        return normal(*args, **kwargs)

    command = [*arguments, "--augment", "crop", "--resume", "auto"]
    monkeypatch.setattr(module, "score", score)
    with pytest.raises(Killed):
        run(*command)
    assert torch.load(tmp_path / "logs/ex0/last.pt", weights_only=True)["step"] == 3
    code, out, err = run(*command)
    assert code == 0, err
    assert "step 3/6" not in out  # the steps of the first epoch are not repeated
    assert_same_ending(whole, tmp_path / "logs" / "ex0")


@pytest.mark.parametrize("max_steps", [4, 6])
def test_resume_after_kill_in_the_last_evaluation_evaluates_again(run, arguments, tmp_path, monkeypatch, max_steps):
    from clip_retrieval.run import scoring as module

    command = [*arguments, "--max_steps", max_steps, "--resume", "auto"]
    assert run(*command, "--experiments", "whole")[0] == 0
    normal, calls = module.score, []

    def score(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:  # before training, after the first epoch, at the end
            raise Killed
        return normal(*args, **kwargs)

    monkeypatch.setattr(module, "score", score)
    with pytest.raises(Killed):
        run(*command)
    monkeypatch.setattr(module, "score", normal)
    code, _, err = run(*command)
    assert code == 0, err
    assert_same_ending(tmp_path / "logs" / "whole", tmp_path / "logs" / "ex0")


def test_resume_after_kill_before_save_writes_the_evaluation_once(run, arguments, tmp_path, whole, monkeypatch):
    normal = Checkpoint.save

    def save(checkpoint, path):
        if path.name == "last.pt" and checkpoint.progress["evaluated_step"] == 3:
            raise Killed
        normal(checkpoint, path)

    command = [*arguments, "--augment", "crop", "--resume", "auto"]
    monkeypatch.setattr(Checkpoint, "save", save)
    with pytest.raises(Killed):
        run(*command)
    monkeypatch.setattr(Checkpoint, "save", normal)
    assert run(*command)[0] == 0
    assert_same_ending(whole, tmp_path / "logs" / "ex0")


def wait_for_step(folder, step, process):
    for _ in range(1200):
        lines = folder / "metrics.jsonl"
        if lines.is_file() and any(line["step"] >= step for line in read_lines(lines)):
            return
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    raise AssertionError(f"the run did not reach step {step}")


@pytest.mark.slow
def test_resume_after_sigkill_is_bit_identical(run, start, arguments, tmp_path):
    command = [*arguments, "--epochs", "40", "--eval_every", "20", "--save_every", "7", "--resume", "auto"]
    assert run(*command, "--experiments", "whole")[0] == 0
    process = start(*command)
    wait_for_step(tmp_path / "logs" / "ex0", 9, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process = start(*command)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert_same_ending(tmp_path / "logs" / "whole", tmp_path / "logs" / "ex0")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_prints_the_resume_command(run, start, arguments, tmp_path, number):
    command = [*arguments, "--epochs", "400", "--eval_every", "0", "--num_workers", "2"]
    folder = tmp_path / "logs" / "ex0"
    process = start(*command)
    wait_for_step(folder, 5, process)
    os.killpg(process.pid, number)  # a terminal or scheduler signals the workers too
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert err.strip().splitlines()[-1].startswith("error: interrupted at step") and "last.pt" in err
    assert "Traceback" not in err
    stopped_at = torch.load(folder / "last.pt", weights_only=True)["step"]
    assert 5 <= stopped_at < 1200
    code, out, err = run(*command, "--resume", "auto", "--max_steps", stopped_at + 1)
    assert code == 0, err
    assert f"resuming from {folder / 'last.pt'}, step {stopped_at}" in out


def test_resume_of_a_finished_run_writes_the_results(run, arguments, tmp_path):
    run(*arguments)
    folder = tmp_path / "logs" / "ex0"
    first = results(folder)
    (folder / "results.json").unlink()
    code, out, _ = run(*arguments, "--resume", "auto")
    assert code == 0 and "pairs/s" not in out
    assert results(folder) == first


def test_same_command_resumes_with_its_initial_weights_named(run, arguments, tmp_path):
    for weights in ("none", tmp_path / "weights.pt"):
        name = f"from {Path(weights).name}"
        command = [*arguments, "--pretrained", weights, "--resume", "auto", "--experiments", name]
        assert run(*command, "--max_steps", "1", "--no_eval_first")[0] == 0
        code, out, err = run(*command, "--max_steps", "2")
        assert code == 0 and "resuming from" in out, err
        torch.save(torch.load(tmp_path / "logs/from none/last.pt", weights_only=True)["model"], tmp_path / "weights.pt")
    code, _, err = run(*arguments, "--pretrained", "none", "--resume", "auto", "--experiments", "from weights.pt")
    assert code == 2 and "--pretrained none both give weights" in err


def test_last_checkpoint_of_a_run_continues_in_its_folder(run, arguments, tmp_path):
    place = arguments.index("--checkpoint_path")
    elsewhere = arguments[:place] + arguments[place + 2 :]
    assert run(*arguments, "--max_steps", "2", "--experiments", "first", "--no_eval_first")[0] == 0
    last = tmp_path / "logs/first/last.pt"
    code, _, err = run(*elsewhere, "--max_steps", "4", "--resume", last)
    assert code == 0, err
    assert torch.load(last, weights_only=True)["step"] == 4
    code, _, err = run(*arguments, "--max_steps", "5", "--resume", last)
    assert code == 0, err
    assert torch.load(last, weights_only=True)["step"] == 5
    code, _, err = run(*arguments, "--max_steps", "6", "--resume", last, "--experiments", "second")
    assert code == 0, err
    assert torch.load(last, weights_only=True)["step"] == 5
    assert torch.load(tmp_path / "logs/second/last.pt", weights_only=True)["step"] == 6


def test_second_stage_does_not_replace_the_first(run, arguments, tmp_path):
    assert run(*arguments, "--max_steps", "2", "--experiments", "first", "--no_eval_first")[0] == 0
    last = tmp_path / "logs/first/last.pt"
    before = last.read_bytes()
    code, _, err = run(*arguments, "--max_steps", "1", "--resume", last, "--reset_data_offset", "--reset_optimizer")
    assert code == 0, err
    assert last.read_bytes() == before and (tmp_path / "logs/ex0/last.pt").is_file()


def test_more_epochs_resume_a_finished_run(run, arguments, tmp_path):
    run(*arguments)
    code, _, err = run(*arguments, "--resume", tmp_path / "logs/ex0/last.pt", "--epochs", "3")
    assert code == 0, err
    steps = [line["step"] for line in read_lines(tmp_path / "logs/ex0/metrics.jsonl") if line["kind"] == "train"]
    assert steps == list(range(1, 10))


def test_resume_alone_uses_the_options_of_the_checkpoint(run, arguments, tmp_path):
    run(*arguments, "--epochs", "1", "--weight_decay", "0.03")
    command = ["--resume", tmp_path / "logs/ex0/last.pt", "--checkpoint_path", tmp_path / "logs", "--epochs", "2"]
    code, _, err = run(*command, "--device", "cpu")
    assert code == 0, err
    options = read_json(tmp_path / "logs/ex0/options.json")
    assert options["weight_decay"] == 0.03 and options["batch_size"] == 10 and options["epochs"] == 2


def test_resume_into_another_folder_keeps_the_first_run(run, arguments, tmp_path):
    run(*arguments, "--epochs", "1")
    before = (tmp_path / "logs/ex0/last.pt").read_bytes()
    code, _, err = run(*arguments, "--resume", tmp_path / "logs/ex0/last.pt", "--experiments", "second")
    assert code == 0, err
    assert (tmp_path / "logs/ex0/last.pt").read_bytes() == before
    assert torch.load(tmp_path / "logs/second/last.pt", weights_only=True)["step"] == 6


def test_resume_with_another_batch_size_is_refused(run, arguments, tmp_path):
    run(*arguments, "--epochs", "1")
    code, _, err = run(*arguments, "--resume", "auto", "--batch_size", "7")
    assert code == 2 and "--batch_size 10" in err and "--reset_data_offset" in err
    code, _, err = run(*arguments, "--resume", "auto", "--batch_size", "7", "--reset_data_offset")
    assert code == 0, err


def test_other_trainable_parameters_need_reset_optimizer(run, arguments, tmp_path):
    run(*arguments, "--epochs", "1")
    code, _, err = run(*arguments, "--resume", "auto", "--freeze_text")
    assert code == 2 and "--reset_optimizer" in err
    code, _, err = run(*arguments, "--resume", "auto", "--freeze_text", "--reset_optimizer")
    assert code == 0, err


@pytest.mark.parametrize("extra", [("--image_size", "32"), ("--context_length", "12")], ids=" ".join)
def test_parameters_of_another_size_need_reset_optimizer(run, arguments, tmp_path, extra):
    run(*arguments, "--epochs", "1")
    code, _, err = run(*arguments, "--resume", "auto", *extra)
    assert code == 2 and "shapes differ" in err and "--reset_optimizer" in err
    code, _, err = run(*arguments, "--resume", "auto", *extra, "--reset_optimizer")
    assert code == 0, err


def test_other_parameters_of_equal_number_need_reset_optimizer(run, arguments, tmp_path):
    run(*arguments, "--epochs", "1", "--trainable", "linear_projection")
    code, _, err = run(*arguments, "--resume", "auto", "--trainable", "adaptor")
    assert code == 2 and "--reset_optimizer" in err


@pytest.mark.parametrize("first, second", [("adamw", "lion"), ("lion", "adamw"), ("muon", "lion"), ("adamw", "muon")])
def test_another_optimizer_needs_reset_optimizer(run, arguments, tmp_path, first, second):
    run(*arguments, "--epochs", "1", "--optimizer", first)
    code, _, err = run(*arguments, "--resume", "auto", "--optimizer", second)
    assert code == 2 and f"was trained with --optimizer {first} and resumes only with that" in err
    assert "--reset_optimizer" in err and err.count("\n") == 1
    code, _, err = run(*arguments, "--resume", "auto", "--optimizer", second, "--reset_optimizer")
    assert code == 0, err


def test_checkpoint_without_an_optimizer_name_can_change_to_lion(run, arguments, tmp_path):
    """One of an earlier version has AdamW's betas and eps, which Lion does not take over."""
    run(*arguments, "--epochs", "1", "--eps", "1e-8", "--beta2", "0.9")
    path = tmp_path / "logs/ex0/last.pt"
    content = torch.load(path, weights_only=True)
    del content["options"]["optimizer"]
    torch.save(content, path)
    code, _, err = run(*arguments, "--resume", "auto", "--optimizer", "lion", "--reset_optimizer")
    assert code == 0, err
    assert torch.load(path, weights_only=True)["options"]["beta2"] is None


def test_damaged_momentum_of_muon_is_refused_in_one_line(run, arguments, tmp_path):
    run(*arguments, "--epochs", "1", "--optimizer", "muon")
    path = tmp_path / "logs/ex0/last.pt"
    content = torch.load(path, weights_only=True)
    state = next(state for state in content["optimizer"]["state"].values() if "momentum_buffer" in state)
    state["momentum_buffer"] = state["momentum_buffer"][:1]
    torch.save(content, path)
    code, _, err = run(*arguments, "--resume", "auto")
    assert code == 2 and "its optimizer state does not fit" in err and err.count("\n") == 1


def test_command_line_sets_optimizer_and_length_on_resume(run, arguments, tmp_path):
    run(*arguments, "--max_steps", "3")
    settings = ("--weight_decay", "0.77", "--beta1", "0.5", "--eps", "0.1")
    code, _, err = run(
        "--resume", tmp_path / "logs/ex0/last.pt", "--checkpoint_path", tmp_path / "logs", "--epochs", "2", *settings
    )
    assert code == 0, err
    last = torch.load(tmp_path / "logs/ex0/last.pt", weights_only=True)
    assert last["step"] == 6
    groups = last["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.77, 0.0]
    assert {(group["betas"], group["eps"]) for group in groups} == {((0.5, 0.98), 0.1)}


def test_options_are_checked_with_those_of_the_checkpoint(run, arguments, tmp_path):
    run(*arguments, "--epochs", "1", "--grad_cache", "4", "--freeze_text")
    command = ("--resume", tmp_path / "logs/ex0/last.pt", "--checkpoint_path", tmp_path / "logs", "--epochs", "2")
    code, _, err = run(*command, "--freeze_vision")
    assert code == 2 and "--freeze_vision and --freeze_text" in err
    code, _, err = run(*command, "--accum_freq", "5")  # it replaces the checkpoint's grad_cache
    assert code == 0, err
    recorded = read_json(tmp_path / "logs/ex0/options.json")
    assert (recorded["grad_cache"], recorded["accum_freq"]) == (None, 5)


def test_resume_with_other_data_is_refused(run, arguments, captioned, tmp_path):
    grown = tmp_path / "grown.csv"
    shutil.copy(captioned / "captions.csv", grown)
    command = [*arguments, "--annotations", grown, "--image_dir", captioned]
    run(*command, "--epochs", "1")
    grown.write_text(grown.read_text() + "0.jpg,one more caption,train\n")
    csv_file._read_rows.cache_clear()  # as in a new process
    code, _, err = run(*command, "--resume", "auto")
    assert code == 2 and "other data" in err


def test_resume_into_another_folder_copies_the_best(run, arguments, tmp_path):
    run(*arguments, "--epochs", "3")
    first = tmp_path / "logs" / "ex0"
    code, _, err = run(*arguments, "--epochs", "3", "--resume", first / "last.pt", "--experiments", "copy")
    assert code == 0, err
    second = tmp_path / "logs" / "copy"
    assert {path.name for path in second.iterdir()} >= {"last.pt", "best.pt", "results.json"}
    assert results(second) == results(first)
    steps = [torch.load(folder / "best.pt", weights_only=True)["step"] for folder in (first, second)]
    assert steps[0] == steps[1] == results(first)["step"]


def test_missing_best_checkpoint_is_not_reported(run, arguments, tmp_path):
    run(*arguments)
    (tmp_path / "logs/ex0/best.pt").unlink()
    code, out, err = run(*arguments, "--resume", "auto")
    assert code == 0 and "chosen again" in err and "the best on val" not in out
    assert "val" not in read_json(tmp_path / "logs/ex0/results.json")


def test_reset_data_offset_and_reset_optimizer(run, arguments, tmp_path):
    run(*arguments, "--epochs", "1")
    last = tmp_path / "logs/ex0/last.pt"
    run(*arguments, "--resume", last, "--reset_data_offset", "--epochs", "1", "--experiments", "again")
    steps = [line["step"] for line in read_lines(tmp_path / "logs/again/metrics.jsonl") if line["kind"] == "train"]
    assert steps == [1, 2, 3]
    moments = []
    for name, extra in (("kept", ()), ("fresh", ("--reset_optimizer",))):
        run(*arguments, "--resume", last, "--experiments", name, "--max_steps", "4", *extra)
        state = torch.load(tmp_path / "logs" / name / "last.pt", weights_only=True)["optimizer"]["state"]
        moments.append({int(entry["step"]) for entry in state.values()})
    assert moments == [{4}, {1}]


def test_best_checkpoint_starts_a_new_run(run, arguments, tmp_path):
    run(*arguments, "--epochs", "1")
    best = tmp_path / "logs/ex0/best.pt"
    code, out, err = run(*arguments, "--resume", best, "--experiments", "next", "--epochs", "1", "--lr", "1e-12")
    assert code == 0, err
    assert "without its optimizer" in out
    first, second = (read_json(tmp_path / f"logs/{name}/results.json") for name in ("ex0", "next"))
    assert second["before"]["rsum"] == first["rsum"]


def test_lora_resumes_only_with_its_alpha_and_rank(run, arguments, tmp_path):
    command = [*arguments, "--trainable", "lora", "--lora_rank", "2", "--lora_alpha", "4"]
    run(*command, "--epochs", "1")
    for option, words in (("--lora_alpha", "trained with alpha / rank 2, not 4"), ("--lora_rank", "shapes differ")):
        code, _, err = run(*command, "--resume", "auto", option, "8")
        assert code == 2 and words in err
    code, _, err = run(*command, "--resume", "auto", "--lora_alpha", "8", "--reset_optimizer")
    assert code == 0, err


def test_lora_checkpoints_hold_merged_weights_of_the_base_names(run, arguments, tmp_path):
    run(*arguments, "--trainable", "lora", "--lora_rank", "2", "--max_steps", "3")
    run(*arguments, "--experiments", "plain", "--max_steps", "1")
    last, best = (torch.load(tmp_path / f"logs/ex0/{name}.pt", weights_only=True) for name in ("last", "best"))
    plain = torch.load(tmp_path / "logs/plain/last.pt", weights_only=True)
    assert last["model"].keys() == best["model"].keys() == plain["model"].keys()
    assert "lora" in last and "lora" not in best and "lora" not in plain
    name, lora = "visual.transformer.resblocks.0.attn.in_proj_weight", last["lora"]
    base, a, b = (lora[f"{name}.{key}"] for key in ("weight", "A", "B"))
    torch.testing.assert_close(last["model"][name], base + 8 * (b @ a).flatten(0, 1))
    code, _, err = run("--eval", "--resume", tmp_path / "logs/ex0/last.pt", "--device", "cpu")
    assert code == 0, err


@pytest.mark.parametrize("change", ["missing", "another shape", "not finite"])
def test_damaged_lora_weights_are_refused_in_one_line(run, arguments, tmp_path, change):
    run(*arguments, "--trainable", "lora", "--max_steps", "1")
    path = tmp_path / "logs/ex0/last.pt"
    content = torch.load(path, weights_only=True)
    name = "visual.transformer.resblocks.0.attn.in_proj_weight.A"
    if change == "missing":
        del content["lora"]
    elif change == "another shape":
        content["lora"][name] = content["lora"][name][:, :1]
    else:
        content["lora"][name][0, 0, 0] = float("nan")
    torch.save(content, path)
    code, _, err = run(*arguments, "--trainable", "lora", "--resume", "auto")
    assert code == 2 and "LoRA weights do not fit" in err


def test_resume_with_rates_of_other_groups_is_refused(run, arguments, tmp_path):
    run(*arguments, "--epochs", "1", "--lr_image", "1e-2")
    command = [*arguments, "--resume", tmp_path / "logs/ex0/last.pt"]
    code, _, err = run(*command, "--lr_image", "1e-3", "--lr_text", "1e-2")
    assert code == 2 and "its parameter groups differ" in err and "--reset_optimizer" in err
    code, _, err = run(*command, "--lr_image", "2e-2")
    assert code == 0, err
    groups = torch.load(tmp_path / "logs/ex0/last.pt", weights_only=True)["optimizer"]["param_groups"]
    assert {group["lr_scale"] for group in groups} == {1.0, 20.0}
