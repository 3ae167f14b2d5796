"""The shell recipes run on COCO images, shortened and with a small model."""

import os
import shutil
import subprocess
import sys

import pytest

from clip_retrieval.command_line import parse
from clip_retrieval.config import read_preset
from clip_retrieval.run.merge import settle
from tests.conftest import ROOT, read_json


def full(*values):
    """A case like another one, only for scripts/test.sh --full; test_recipe_is_valid_on_the_command_line has all."""
    return pytest.param(*values, marks=pytest.mark.full)


@pytest.fixture
def recipe(real_data, captioned, tmp_path):
    """recipe(name, *arguments) runs scripts/NAME in tmp_path."""

    def run_recipe(name, *arguments, **environment):
        command = ["bash", str(ROOT / "scripts" / name), *map(str, arguments)]
        env = os.environ | {"PYTHON": sys.executable} | {key: str(value) for key, value in environment.items()}
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)

    return run_recipe


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, experiment",
    [
        ("coco_finetune_vit-b-32.sh", "coco_vit-b-32"),
        full("coco_finetune_vit-b-16.sh", "coco_vit-b-16"),
        full("coco_margin_linear_projection.sh", "coco_margin_linear_projection"),
        ("coco_margin_adaptor.sh", "coco_margin_adaptor"),
    ],
)
def test_finetune_recipes(recipe, real_data, captioned, tmp_path, name, experiment):
    short = (
        "--vision_model",
        captioned / "small.json",
        "--pretrained",
        "none",
        "--max_steps",
        "2",
        "--batch_size",
        "32",
    )
    result = recipe(name, real_data / "coco_mini", *short, "--no_eval_first")
    assert result.returncode == 0, result.stderr
    options = read_json(tmp_path / "logs" / experiment / "options.json")
    assert options["batch_size"] == 32 and options["dataset"] == "coco"
    result = recipe("coco_eval.sh", real_data / "coco_mini", f"logs/{experiment}/last.pt")
    assert result.returncode == 0, result.stderr
    assert read_json(tmp_path / "logs" / experiment / "eval_coco_test" / "results.json")["images"] == 42


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [full("coco_from_scratch_rn50"), "coco_from_scratch_simple_clip"],
)
def test_from_scratch_recipes(recipe, real_data, captioned, tmp_path, name):
    short = ("--vision_model", captioned / "small.json", "--pretrained", "none", "--text_pretrained", "none")
    cpu = ("--precision", "fp32", "--max_steps", "2", "--batch_size", "32", "--no_eval_first")
    result = recipe(f"{name}.sh", real_data / "coco_mini", *short, *cpu, "--image_size", 16)
    assert result.returncode == 0, result.stderr
    options = read_json(tmp_path / "logs" / name / "options.json")
    assert (options["caption_sampling"], options["beta2"], options["eps"]) == ("one", 0.999, 1e-8)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, words, place",
    [
        ("coco_finetune_one_node.sh", "32 = 2 x 16", {"GPUS": 2}),
        full(
            "coco_finetune_multi_node.sh",
            "32 = 1 x 32",
            {"NODES": 1, "NODE_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29581, "GPUS": 1},
        ),
    ],
)
def test_distributed_recipes(recipe, real_data, captioned, name, words, place):
    short = (
        "--vision_model",
        captioned / "small.json",
        "--pretrained",
        "none",
        "--max_steps",
        "1",
        "--batch_size",
        "32",
    )
    result = recipe(name, real_data / "coco_mini", *short, "--no_eval_first", "--device", "cpu", **place)
    assert result.returncode == 0, result.stderr
    assert words in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, folder", [("muge", "MUGE"), full("flickr30k_cn", "Flickr30k-CN"), full("coco_cn", "COCO-CN")]
)
def test_chinese_recipes(recipe, real_data, captioned, tmp_path, name, folder):
    write_chinese(tmp_path / "datasets" / folder, captioned)
    (tmp_path / "pretrained_weights").mkdir()
    tiny = real_data / "chinese_clip_tiny"
    shutil.copy(tiny / "clip_cn_tiny.pt", tmp_path / "pretrained_weights" / "clip_cn_vit-b-16.pt")
    script = f"{name}_finetune_vit-b-16.sh"
    short = ("--tokenizer", tiny / "vocab.txt", "--max_steps", "1", "--batch_size", "8", "--no_eval_first")
    result = recipe(script, tmp_path, *short)
    assert result.returncode == 0, result.stderr
    options = read_json(tmp_path / "experiments" / script.removesuffix(".sh") / "options.json")
    assert (options["dataset"], options["augment"], options["grad_cache"]) == ("chinese", "auto_flip", 128)


def write_chinese(folder, captioned):
    """Write the train and valid splits of the small dataset as Chinese-CLIP's tsv and jsonl."""
    command = [sys.executable, str(ROOT / "scripts" / "export_tsv.py"), "--dataset", "csv", "--dataset_root"]
    command += [str(captioned), "--output", str(folder), "--splits", "train,valid"]
    subprocess.run(command, check=True, capture_output=True)


def settle_recipe(name, **environment):
    """The options of a recipe, and the arguments of torchrun, without running it."""
    env = os.environ | {"PYTHON": "echo"} | environment
    command = ["bash", str(ROOT / "scripts" / name), "DATA"]
    words = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.split()
    main = next(i for i, word in enumerate(words) if word.endswith("main.py"))
    typed = parse(words[main + 1 :])
    return settle(read_preset({}, typed), typed).flat(), words[:main]


@pytest.mark.parametrize("name", ["muge", "flickr30k_cn"])
def test_chinese_recipes_have_the_same_global_batch_on_any_gpus(name):
    machines = {"GPUS": "8", "NODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "node0"}
    found = [settle_recipe(f"{name}_finetune_vit-b-16.sh", **gpus) for gpus in ({}, {"GPUS": "8"}, machines)]
    options, launcher = zip(*found)
    assert options[0] == options[1] == options[2]
    expected = {"batch_size": 1024, "grad_cache": 128, "lr": 5e-5, "warmup": 100, "epochs": 3, "eval_steps": 150}
    assert expected.items() <= options[0].items()
    assert launcher[0] == [] and launcher[1][-2:] == ["--nproc_per_node", "8"] and "--standalone" in launcher[1]
    line = " ".join(launcher[2])
    assert "--nnodes 2 --node_rank 1 --master_addr node0 --master_port 29500 --nproc_per_node 8" in line


def test_coco_cn_recipe_has_its_own_settings():
    options, _ = settle_recipe("coco_cn_finetune_vit-b-16.sh")
    expected = {"batch_size": 1024, "lr": 3e-5, "warmup": 6, "epochs": 20, "eval_steps": 0, "weight_decay": 1e-3}
    assert expected.items() <= options.items()
    machines = {"GPUS": "8", "NODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "node0"}
    assert settle_recipe("coco_cn_finetune_vit-b-16.sh", **machines)[0]["batch_size"] == 16 * 1024


@pytest.mark.parametrize(
    "path", sorted((ROOT / "scripts").glob("*_finetune_*.sh")) + sorted(ROOT.glob("scripts/coco_*_*.sh"))
)
def test_recipe_is_valid_on_the_command_line(path):
    if path.name != "coco_zero_shot_table.sh":
        settle_recipe(path.name, NODES="1", NODE_RANK="0", MASTER_ADDR="node0")


@pytest.mark.slow
def test_flickr30k_recipe_reads_flickr30k(recipe, captioned, tmp_path):
    result = recipe("flickr30k_finetune_vit-b-32.sh", tmp_path, "--vision_model", captioned / "small.json")
    assert result.returncode == 2 and str(tmp_path) in result.stderr


@pytest.mark.slow
def test_zero_shot_table_has_a_row_per_model(recipe, real_data, captioned, tmp_path):
    for name in ("small.json", "resnet.json"):
        shutil.copy(captioned / name, tmp_path)
    result = recipe("coco_zero_shot_table.sh", real_data / "coco_mini", MODELS="small.json resnet.json", OUTPUT="table")
    assert result.returncode == 0, result.stderr
    table = (tmp_path / "table" / "table.md").read_text()
    assert table in result.stdout
    assert table.count("| coco test |") == 2 and "i2t R@1" in table


def test_recipe_without_data_names_the_missing_argument(recipe):
    result = recipe("coco_finetune_vit-b-32.sh")
    assert result.returncode != 0 and "give the folder of the data" in result.stderr
