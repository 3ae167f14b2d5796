"""Options from a YAML file, and the precedence of files, checkpoints and the command line."""

import json
import os
import re
import time

import pytest
import torch

from clip_retrieval.command_line import parse
from clip_retrieval.config import read_config
from clip_retrieval.errors import UserError
from clip_retrieval.options import Options
from clip_retrieval.run.merge import settle
from clip_retrieval.run.settings import settle_options
from tests.conftest import read_json


@pytest.fixture
def config(tmp_path):
    def write(text):
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return path

    return write


def test_config_equals_the_same_command_line(config):
    text = """
    # clip-training's names, hyphens, and numbers that YAML reads as strings
    learning_rate: 5e-4
    eps: 1.0e-08
    weight-decay: 0.1
    warmup: 0.2
    experiments: 7
    use_siglip: true
    freeze_vision: false
    no_restval: true
    num_workers: auto
    max_steps: null
    recall_k: [1, 20]
    image_size: [192, 256]
    dataset: [coco, csv]
    annotations: [null, photos.csv]
    """
    typed = "-lr 5e-4 --eps 1e-8 -wd 0.1 --warmup 0.2 --name 7 --use_siglip --no_freeze_vision --no_restval"
    typed += (
        " --num_workers auto --recall_k 1 20 --image_size 192 256 --dataset coco --dataset csv --annotations auto"
        " --annotations photos.csv"
    )
    assert read_config(config(text)) == parse(typed.split())


def test_values_are_kept_as_written(config):
    """Plain YAML reads 010 as 8, 1.10 as 1.1, 12:30:00 as 45000, off as false and the last one as an invalid date."""
    for value in ("010", "1.10", "12:30:00", "off", "2024-02-30"):
        assert read_config(config(f"experiments: {value}\n")) == {"experiments": value}


def test_missing_and_empty_config_have_no_options(config):
    assert read_config(None) == read_config(config("# nothing\n")) == {}


@pytest.mark.parametrize(
    "text, words",
    [
        ("learning_rat: 1", ["learning_rat", "did you mean --learning_rate"]),
        ("lr: fast", ["--lr", "fast", "number"]),
        ("lr: [1, 2]", ["lr", "one value"]),
        ("freeze_vision: 3", ["freeze_vision", "true or false"]),
        ("train: {lr: 1}", ["unknown option train"]),
        ("lr: {peak: 1}", ["lr", "one line for each option"]),
        ("lr: []", ["lr: empty or nested value"]),
        ("lr: true", ["--lr", "'true' is not a number"]),
        ("lr: 1\nseed: 2\nlr: 3", ["line 3", "lr is given twice"]),
        ("lr: 1\nlearning_rate: 2", ["lr", "learning_rate", "the same option"]),
        ("help: true", ["unknown option help"]),
        ("config: other.yaml", ["unknown option config"]),
        ("[" * 3000, ["YAML"]),
        ("loss: infonc", ["infonc", "infonce"]),
        ("- lr", ["option: value"]),
        ("lr: [1", ["line 1", "YAML"]),
        ("lr: !!python/object/apply:os.system ['true']", ["'true' is not a number"]),
    ],
)
def test_bad_config_is_one_line_with_the_file(config, text, words):
    path = config(text)
    with pytest.raises(UserError) as error:
        read_config(path)
    assert all(word in str(error.value) for word in [str(path), *words])
    assert "\n" not in str(error.value)


def test_missing_file_is_one_line_and_exit_code_2(run, tmp_path):
    code, _, error = run("--config", tmp_path / "none.yaml")
    assert code == 2 and "none.yaml: no such file" in error and error.count("\n") == 1


def test_command_line_overrides_config_overrides_defaults(arguments, config, run, tmp_path):
    path = config("lr: 3e-4\nbatch_size: 7\nexperiments: from_file\nseed: 5\n")
    code, _, error = run(*arguments, "--max_steps", "1", "--config", path)
    assert code == 0, error
    settled = read_json(tmp_path / "logs/from_file/options.json")
    assert (settled["lr"], settled["batch_size"], settled["seed"]) == (1e-3, 10, 5)
    assert settled["config"] == str(path)


def test_checkpoint_overrides_config(arguments, config, run, tmp_path):
    assert run(*arguments, "--max_steps", "2", "--seed", "4")[0] == 0
    last = tmp_path / "logs/ex0/last.pt"
    path = config("seed: 5\nmargin: 0.4\nexperiments: other\neval: true\n")
    code, _, error = run("--eval", "--resume", last, "--config", path, "--device", "cpu")
    assert code == 0, error
    settled = read_json(tmp_path / "logs/ex0/eval_csv_test/options.json")
    assert settled["seed"] == 4 and settled["margin"] is None


def test_options_json_is_a_config_that_repeats_the_run(arguments, run, tmp_path):
    assert run(*arguments, "--max_steps", "2", "--seed", "4")[0] == 0
    first = tmp_path / "logs/ex0"
    code, _, error = run("--config", first / "options.json", "--experiments", "again")
    assert code == 0, error
    second = tmp_path / "logs/again"
    changed = {"experiments", "config"}
    before, after = read_json(first / "options.json"), read_json(second / "options.json")
    assert {name for name in before if before[name] != after[name]} == changed
    results = [read_json(folder / "results.json") for folder in (first, second)]
    assert results[0]["i2t"] == results[1]["i2t"] and results[0]["t2i"] == results[1]["t2i"]


def test_options_json_of_a_resumed_run_starts_it_again(arguments, run, tmp_path):
    assert run(*arguments, "--max_steps", "2")[0] == 0
    first = tmp_path / "logs/ex0"
    assert run("--resume", first / "last.pt", "--checkpoint_path", tmp_path / "logs", "--max_steps", "4")[0] == 0
    code, out, error = run("--config", first / "options.json", "--experiments", "again")
    assert code == 0 and "before training" in out, error
    weights = [
        torch.load(tmp_path / "logs" / name / "last.pt", weights_only=True)["model"] for name in ("ex0", "again")
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_reset_options_in_a_config_are_ignored(arguments, config, run, tmp_path):
    path = config("reset_data_offset: true\nreset_optimizer: true\n")
    assert run(*arguments, "--max_steps", "1")[0] == 0
    code, out, error = run(*arguments, "--max_steps", "2", "--resume", "auto", "--config", path)
    assert code == 0, error
    assert "resuming from" in out and "reset_data_offset counts only on the command line" in error


def test_overwrite_in_a_config_is_ignored(arguments, config, run, tmp_path):
    assert run(*arguments, "--max_steps", "1")[0] == 0
    code, _, error = run(*arguments, "--max_steps", "1", "--config", config("overwrite: true\n"))
    assert code == 2 and "already holds a run" in error


def test_model_in_a_config_must_match_the_weights(arguments, captioned, config, run, tmp_path):
    assert run(*arguments, "--max_steps", "1")[0] == 0
    other = config(f"vision_model: {captioned / 'resnet.json'}\npretrained: {tmp_path / 'logs/ex0/last.pt'}\n")
    typed = [a for a in map(str, arguments) if a not in ("--vision_model", str(captioned / "small.json"))]
    code, _, error = run(*typed, "--name", "ex1", "--config", other)
    assert code == 2 and "contradicts" in error


def test_eval_in_a_config(config, tmp_path):
    path = config("eval: true\n")
    assert settle(read_config(path)).run.eval


def test_every_default_survives_options_json(tmp_path):
    path = tmp_path / "options.json"
    defaults = Options().flat()
    path.write_text(json.dumps(defaults | {"versions": {"torch": "2"}, "device_used": "cpu"}))
    assert settle(read_config(path)).flat() == defaults


def test_options_json_of_a_chinese_clip_is_a_config(arguments, run, real_data, tmp_path):
    """The weight file determines the model; options.json has a name that --vision_model does not accept."""
    tiny = real_data / "chinese_clip_tiny"
    place = arguments.index("--vision_model")
    given = [*arguments[:place], *arguments[place + 2 :], "--pretrained", tiny / "clip_cn_tiny.pt"]
    code, _, error = run(*given, "--tokenizer", tiny / "vocab.txt", "--max_steps", "1", "--no_eval_first")
    assert code == 0, error
    code, _, error = run("--config", tmp_path / "logs/ex0/options.json", "--experiments", "again")
    assert code == 0, error
    assert read_json(tmp_path / "logs/again/options.json")["vision_model"] == "Chinese-CLIP"


def test_joint_chinese_clip_names_are_two_options():
    options, _ = settle_options({"vision_model": "ViT-B-16@RoBERTa-wwm-ext-base-chinese"})
    assert (options.model.vision_model, options.model.text_model) == ("ViT-B-16", "RoBERTa-wwm-ext-base-chinese")
    options, _ = settle_options({"vision_model": "ViT-L/14@336px"})
    assert (options.model.vision_model, options.model.text_model) == ("ViT-L/14@336px", None)


def test_typed_dataset_drops_the_paths_of_the_config(config):
    path = config("dataset: [coco, csv]\ndataset_root: [A, B]\nannotations: [null, x.csv]\ndataset_weights: [1, 2]\n")
    options, _ = settle_options({"config": str(path), "dataset": "coco"})
    data = options.data
    assert (data.dataset_root, data.annotations, data.dataset_weights) == ("datasets", None, None)


def test_typed_shards_keep_the_mixture_of_the_config(config):
    path = config('dataset: [coco, webdataset]\ndataset_root: A\ntrain_data: [null, "a/{0..9}.tar"]\n')
    options, _ = settle_options({"config": str(path), "train_data": (None, "b/{0..9}.tar")})
    assert [(part.name, part.train_data) for part in options.data.parts()] == [
        ("coco", None),
        ("webdataset", "b/{0..9}.tar"),
    ]


def test_list_for_one_dataset_is_refused(config):
    for text in ("train_data: [a/0.tar, a/1.tar]\n", "dataset: csv\ndataset_root: [A, B]\n"):
        with pytest.raises(UserError, match=r"--config .*has 2 values, one for each dataset of a mixture"):
            settle_options({"config": str(config(text))})
    for text, typed in (("train_data: [a/0.tar, a/1.tar]\n", "webdataset"), ("dataset_root: [A, B]\n", "csv")):
        with pytest.raises(UserError, match=r"--config .*has 2 values, one for each dataset of a mixture"):
            settle_options({"config": str(config(text)), "dataset": typed})
    path = config("dataset_root: [A, B]\n")
    options, _ = settle_options({"config": str(path), "dataset": ("coco", "flickr30k")})
    assert [part.dataset_root for part in options.data.parts()] == ["A", "B"]


def test_config_that_is_not_a_regular_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(UserError, match=r"\((not a regular file|Is a directory)\); give a YAML file"):
            read_config(path)


def test_invalid_yaml_characters_are_one_line(config):
    with pytest.raises(UserError, match=r"^[^\n]*not valid YAML[^\n]*$"):
        read_config(config("lr: 1\0\n"))


def test_yaml_booleans_and_leading_dashes(config):
    found = read_config(config("--map: yes\nfreeze_text: off\nno-restval: On\n"))
    assert found == {"map": True, "freeze_text": False, "no_restval": True}


def test_missing_shards_keep_the_dataset_of_the_config(config):
    path = config("dataset: webdataset\n")
    options, _ = settle_options({"config": str(path), "train_data": "gone"})
    assert options.data.name == "webdataset"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("\n".join(f"key_{n}: 1" for n in range(15_000)), ["unknown option key_0"]),
        ("{" + ", ".join(f"k{n}: 1" for n in range(15_000)) + "}", ["unknown option k0"]),
        ("\n".join(f"{n}{'x' * 4}: 1" for n in range(100_000)), ["more than 262,144 bytes"]),
        ("[" * 200_000, ["nested too deeply"]),
        ("{a: " * 50_000, ["nested too deeply"]),
        ("- " * 100_000, ["nested too deeply"]),
        ("seed: " + "1" * 200_000, ["--seed"]),
        ("'" + "x" * 200_000 + "': 1", ["line 1"]),
        ("lr: &a [1]\n" + "".join(f"k{n}: *a\n" for n in range(10_000)), ["unknown option k0"]),
        (" " * 200_000 + "lr: 1\nx", ["YAML"]),
    ],
    ids=lambda value: value[:9] if isinstance(value, str) else None,
)
def test_large_and_deep_files_are_refused_in_seconds(config, text, words):
    path = config(text)
    began = time.process_time()
    with pytest.raises(UserError) as error:
        read_config(path)
    assert time.process_time() - began < 10
    assert all(word in str(error.value) for word in words), str(error.value)[:300]


def billion_laughs(last):
    """A billion laughs: 9^11 strings by aliases of aliases, under names of options."""
    names = ("beta1", "beta2", "eps", "warmup", "margin", "seed", "display", "epochs", "max_steps", "batch_size", last)
    lines = [f"{name}: &a{n + 1} [{', '.join([f'*a{n}'] * 9)}]" for n, name in enumerate(names)]
    return "\n".join(["dataset: &a0 [x, x]", *lines])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (billion_laughs("recall_k"), "beta1: empty or nested value"),
        (billion_laughs("eval"), "beta1: empty or nested value"),
        ("eval: &a [*a]", "recursive"),
        ("a: &a {b: *a}", "recursive"),
        ("? [lr]\n: 1", "line 1: a key is a sequence"),
        ("lr: 1\n? {a: b}\n: 1", "line 2: a key is a mapping"),
        ("<<: {lr: 1}", "unknown option <<"),
        ("a: &a {lr: 1}\nb:\n  <<: *a\n  <<: *a", "line 4: << is given twice"),
        ("? lr\n? lr\n", "line 2: lr is given twice"),
        ("!!python/name:os.system : 1", "unknown option"),
        ("lr: !!python/object/new:os.system ['touch hacked']", "--lr"),
        ("experiments: *unknown", "line 1: "),
        ("%YAML 9.9\n--- {}", "YAML"),
        ("lr: \x01", "YAML"),
        ("lr: 1\n--- \nlr: 2", "YAML"),
    ],
    ids=lambda value: None,
)
def test_aliases_tags_and_keys_are_harmless(config, monkeypatch, tmp_path, text, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=re.escape(words)):
        read_config(config(text))
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


@pytest.mark.parametrize("name", ["train_data", "dataset_root", "annotations", "experiments", "vision_model", "resume"])
@pytest.mark.parametrize("value", ["a\0b*", "\ud800/{0..3}.tar", "x\udfff"])
def test_impossible_file_names_are_refused(config, name, value):
    path = config(f"{name}: {json.dumps(value)}\n")
    with pytest.raises(UserError, match=f"--{name} .*invalid in file names"):
        settle(read_config(path), complete=False)


def test_names_that_are_not_utf_8_are_accepted(tmp_path):
    settle({"dataset_root": os.fsdecode(b"caf\xe9"), "train_data": os.fsdecode(b"\xff.tar")}, complete=False)


def test_numbers_of_a_checkpoint_are_checked():
    for value in (float("nan"), float("inf"), 2**63, -(2**63), 10**300, 10**5000):
        for name in ("lr", "seed", "recall_k"):
            layer = {name: (1, value) if name == "recall_k" else value}
            with pytest.raises(UserError, match=f"--{name} .*less than 64 bits"):
                settle(layer)


def test_config_with_byte_order_mark(tmp_path):
    (tmp_path / "run.yaml").write_bytes("\ufefflr: 1\n".encode())
    assert read_config(tmp_path / "run.yaml") == {"lr": 1.0}
