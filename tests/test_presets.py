"""--preset: recipes, the defaults of the five systems, and what takes precedence over them."""

import json
import shutil

import pytest

from clip_retrieval.command_line import parse
from clip_retrieval.config import read_preset
from clip_retrieval.errors import UserError
from clip_retrieval.options import NO_PRESET, PRESETS, Options
from clip_retrieval.run.settings import settle_options
from tests.conftest import read_json

EXPECTED = {
    "clip_itm": {"vision_model": "ViT-B/32", "no_restval": True, "batch_size": 256, "epochs": 10, "warmup": 500},
    "crossmodal": {"vision_model": "ViT-L/14", "trainable": "adaptor", "loss": "margin", "epochs": 1},
    "simple_clip": {"vision_model": "resnet50", "image_size": 224, "lr": 1e-4, "epochs": 2, "precision": "fp16"},
    "chinese_clip": {"dataset": "chinese", "batch_size": 1024, "lr": 5e-5, "epochs": 3, "augment": "auto_flip"},
    "clip_training": {"vision_model": "RN50-text6", "batch_size": 256, "warmup": 0.2, "caption_sampling": "one"},
    "strong": {"vision_model": "ViT-B/32", "layer_decay": 0.75, "ema": 0.999, "drop_path": 0.1, "grad_clip": 1.0},
    "low_memory": {"vision_model": "ViT-L/14", "trainable": "lora", "lora_targets": "all", "grad_cache": 16},
    "last_layer": {"trainable": "linear_projection", "augment": "none", "batch_size": 1024},
    "keep_zero_shot": {"distill_from": "start", "distill_kind": "relational", "lr": 1e-5, "ema": 0.999},
    "siglip2": {"vision_model": "ViT-B-32-SigLIP2-256", "pretrained": "webli", "loss": "siglip", "beta2": 0.95},
}
RECIPES = ("strong", "low_memory", "last_layer", "keep_zero_shot", "siglip2")


@pytest.mark.parametrize("name", PRESETS)
def test_preset_sets_its_defaults(name):
    options, checkpoint = settle_options({"preset": name})
    assert EXPECTED[name].items() <= options.flat().items() and checkpoint is None
    assert options.flat()["preset"] == name and options.given == {"preset"}


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_gives_a_reason_for_its_values(name):
    text = PRESETS[name].read_text()
    assert text.startswith("# ") and text.count("  # ") >= 3


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_trains_and_its_best_checkpoint_is_evaluated(name, arguments, run, tmp_path):
    """All values of the preset together, on a small model; sizes are for large data."""
    data, place = arguments[: arguments.index("--epochs")], arguments[arguments.index("--num_workers") :]
    small = ("--pretrained", "none", "--max_steps", "2", "--batch_size", "10", "--grad_cache", "5")
    code, _, error = run(*data, *place, "--preset", name, *small)
    assert code == 0, error
    recorded = read_json(tmp_path / "logs/ex0/options.json")
    typed = {"vision_model", "pretrained", "batch_size", "grad_cache"}
    kept = {key: value for key, value in read_preset({}, {"preset": name}).items() if key not in typed}
    assert kept.items() <= recorded.items() and recorded["preset"] == name
    code, _, error = run("--eval", "--resume", tmp_path / "logs/ex0/best.pt")
    assert code == 0, error


def test_presets_leave_the_run_and_its_paths_to_the_user():
    for name in PRESETS:
        keys = read_preset({}, {"preset": name}).keys()
        assert not keys & {"eval", "resume", "experiments", "checkpoint_path", "dataset_root", "overwrite", "preset"}


def test_config_overrides_preset_and_command_line_overrides_both(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("preset: clip_training\nlr: 3e-4\nepochs: 4\n")
    options = settle_options({"config": str(path), "epochs": 7})[0].train
    assert (options.weight_decay, options.lr, options.epochs) == (0.1, 3e-4, 7)
    options = settle_options({"config": str(path), "preset": "simple_clip"})[0].train
    assert (options.weight_decay, options.lr, options.epochs) == (0, 3e-4, 4)
    options = settle_options({"config": str(path), "preset": NO_PRESET})[0].train
    assert (options.weight_decay, options.lr, options.epochs) == (0.2, 3e-4, 4)


def test_another_optimizer_drops_the_betas_and_epsilon_of_the_preset():
    options = settle_options({"preset": "simple_clip", "optimizer": "lion"})[0].train
    assert (options.optimizer, options.beta2, options.eps) == ("lion", None, 1e-6)


def test_typed_alternative_replaces_the_option_of_the_preset(tmp_path):
    train = settle_options({"preset": "strong", "accum_freq": 4})[0].train
    assert (train.grad_cache, train.accum_freq) == (None, 4)
    path = tmp_path / "run.yaml"
    path.write_text("accum_freq: 2\n")
    train = settle_options({"config": str(path), "grad_cache": 64})[0].train
    assert (train.grad_cache, train.accum_freq) == (64, 1)
    with pytest.raises(UserError, match="give one of them"):
        settle_options({"accum_freq": 4, "grad_cache": 64})


OFF = {"ema": None, "layer_decay": None, "lr_head": None, "grad_clip": None, "grad_cache": None, "augment": "none"}


def test_values_of_a_preset_can_be_turned_off(tmp_path):
    words = [word for name in OFF for word in (f"--{name}", "none")]
    path = tmp_path / "run.yaml"
    path.write_text("preset: strong\n" + "".join(f"{name}: none\n" for name in OFF))
    for given in ({"preset": "strong", **parse(words)}, {"config": str(path)}):
        settled = settle_options(given)[0].flat()
        assert OFF.items() <= settled.items() and settled["crop_scale"] == 0.9 and settled["drop_path"] == 0.1
    alone = settle_options({"preset": "keep_zero_shot", **parse(["--distill_from", "none"])})[0].loss
    assert alone.distill_from is None


def test_details_go_with_the_option_that_is_turned_off_or_replaced(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "loss: margin\nmargin: 0.3\nhard_negatives: 0.5\nhard_negatives_by: text\nschedule: wsd\n"
        "decay_fraction: 0.5\ndistill_from: start\ndistill_kind: feature\ndistill_weight: 2\n"
    )
    typed = parse(["--loss", "triplet", "--hard_negatives", "0", "--schedule", "linear", "--distill_from", "none"])
    settled = settle_options({"config": str(path), **typed})[0].flat()
    defaults = Options().flat()
    changed = {name for name, value in settled.items() if value != defaults[name]}
    assert changed == {"config", "loss", "schedule"}


def test_unknown_preset_names_the_nearest(run):
    code, _, error = run("--preset", "clip_itn")
    assert code == 2 and "did you mean clip_itm?" in error and error.count("\n") == 1


def test_files_of_another_dataset_replace_the_one_of_the_preset():
    assert settle_options({"preset": "chinese_clip", "train_data": "a/{0..9}.tar"})[0].data.name == "webdataset"
    assert settle_options({"preset": "clip_itm", "annotations": "photos.csv"})[0].data.name == "csv"


@pytest.mark.parametrize("given", [{"pretrained": "none"}, {"pretrained": "clip.pt"}])
def test_given_weights_replace_all_weights_of_the_preset(given):
    model = settle_options({"preset": "simple_clip", **given})[0].model
    assert (model.pretrained, model.text_pretrained) == (given["pretrained"], None)
    model = settle_options({"preset": "simple_clip", **given, "text_pretrained": "bert"})[0].model
    assert model.text_pretrained == "bert"


def test_resume_auto_of_a_new_run_starts_from_the_weights_of_the_preset(tmp_path):
    model = settle_options({"preset": "simple_clip", "resume": "auto", "checkpoint_path": str(tmp_path)})[0].model
    assert (model.pretrained, model.text_pretrained) == ("IMAGENET1K_V2", "distilbert-base-uncased")


def test_preset_with_a_weight_file_takes_the_model_of_the_file(arguments, run, real_data, tmp_path):
    """The preset's model is a default, not a typed one, which would contradict the file."""
    tiny = real_data / "chinese_clip_tiny"
    place = arguments.index("--vision_model")
    given = [*arguments[:place], *arguments[place + 2 :], "--tokenizer", tiny / "vocab.txt", "--max_steps", "1"]
    shutil.copy(tiny / "clip_cn_tiny.pt", tmp_path / "tiny.pt")
    code, _, error = run(*given, "--preset", "clip_itm", "--resume", tmp_path / "tiny.pt", "--no_eval_first")
    assert code == 0, error
    assert read_json(tmp_path / "logs/ex0/options.json")["vision_model"] == "Chinese-CLIP"


def test_checkpoint_overrides_preset_and_options_json_repeats_the_run(arguments, run, tmp_path):
    preset = ("--preset", "clip_training", "--pretrained", "none", "--max_steps", "1", "--no_eval_first")
    code, _, error = run(*arguments, *preset, "--weight_decay", "0.3", "--warmup", "0")
    assert code == 0, error
    stored = read_json(tmp_path / "logs/ex0/options.json")
    assert (stored["preset"], stored["eps"], stored["lr"]) == ("clip_training", 1e-8, 1e-3)

    resumed, _ = settle_options({"preset": "crossmodal", "resume": str(tmp_path / "logs/ex0/last.pt")})
    assert resumed.train.weight_decay == 0.3 and resumed.loss.loss == "infonce"

    # null values of options.json are defaults, not values of the preset
    repeated, _ = settle_options({"config": str(tmp_path / "logs/ex0/options.json"), "experiments": "again"})
    changed = {name for name, value in json.loads(json.dumps(repeated.flat())).items() if value != stored[name]}
    assert changed == {"experiments", "config", "preset"}


def test_constant_schedule_keeps_the_learning_rate(arguments, run, tmp_path):
    code, _, error = run(*arguments, "--schedule", "constant", "--no_eval_first")
    assert code == 0, error
    lines = [json.loads(line) for line in (tmp_path / "logs/ex0/metrics.jsonl").read_text().splitlines()]
    assert [line["lr"] for line in lines if "lr" in line] == [5e-4, *[1e-3] * 5]


def test_random_weights_at_the_finetuning_rate_get_one_warning(arguments, run):
    words = "is for finetuning, but the weights are random"
    for lr, times in (("1e-5", 1), ("5e-4", 0)):
        code, _, error = run(*arguments, "--lr", lr, "--max_steps", "1", "--no_eval_first", "--overwrite")
        assert code == 0 and error.count(words) == times, error
