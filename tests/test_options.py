"""The command line is a contract: every spelling of the five systems is accepted."""

import subprocess
import sys

import pytest

from clip_retrieval.command_line import parse
from clip_retrieval.errors import UserError
from clip_retrieval.options import select_for_resume
from clip_retrieval.run.merge import check_early, settle


def options(*argv):
    return settle(parse(argv)).flat()


SPELLINGS = {
    "vision_model": ["--vision_model", "--model", "--image_encoder_name"],
    "text_model": ["--text_model", "--text_encoder_name"],
    "tokenizer": ["--tokenizer"],
    "pretrained": ["--pretrained", "--clip_weight_path"],
    "pretrained_key": ["--pretrained_key"],
    "dataset": ["--dataset", "--dataset_name"],
    "dataset_root": ["--dataset_root", "--dataset_path"],
    "annotations": ["--annotations", "--train_annotation_file"],
    "image_dir": ["--image_dir", "--train_img_dir"],
    "eval_split": ["--eval_split"],
    "save_rankings": ["--save_rankings"],
    "resume": ["--resume", "--ckpt_path"],
    "epochs": ["--epochs", "--num_epoch", "--num_epochs", "--max_epochs"],
    "max_steps": ["--max_steps"],
    "save_every": ["--save_every"],
    "keep_every": ["--keep_every"],
    "batch_size": ["--batch_size", "-b"],
    "eval_batch_size": ["--eval_batch_size", "--valid_batch_size"],
    "num_workers": ["--num_workers"],
    "max_image_pixels": ["--max_image_pixels"],
    "lr": ["--lr", "--learning_rate", "-lr"],
    "optimizer": ["--optimizer"],
    "beta1": ["--beta1"],
    "beta2": ["--beta2"],
    "eps": ["--eps"],
    "weight_decay": ["--weight_decay", "--wd", "-wd"],
    "warmup": ["--warmup"],
    "schedule": ["--schedule"],
    "patience": ["--patience"],
    "ema": ["--ema"],
    "swa_start": ["--swa_start"],
    "retention_dataset": ["--retention_dataset"],
    "preset": ["--preset"],
    "loss": ["--loss"],
    "margin": ["--margin"],
    "label_smoothing": ["--label_smoothing"],
    "i2t_weight": ["--i2t_weight"],
    "temperature": ["--temperature"],
    "trainable": ["--trainable"],
    "precision": ["--precision"],
    "eval_precision": ["--eval_precision"],
    "context_length": ["--context_length"],
    "display": ["--display", "--log_every_n_steps", "--log_interval"],
    "checkpoint_path": ["--checkpoint_path", "--logs", "--save_model_dir", "-save_model_dir"],
    "experiments": ["--experiments", "--name"],
    "device": ["--device"],
    "seed": ["--seed"],
    "distill_from": ["--distill_from"],
    "word_dropout": ["--word_dropout"],
    "drop_path": ["--drop_path"],
    "patch_dropout": ["--patch_dropout"],
    "start_image_size": ["--start_image_size"],
    "caption_prefix": ["--caption_prefix"],
    "rerank_bank": ["--rerank_bank"],
    "lr_image": ["--lr_image"],
    "lr_text": ["--lr_text"],
    "lr_head": ["--lr_head"],
    "layer_decay": ["--layer_decay"],
    "unlocked_image_blocks": ["--unlocked_image_blocks"],
    "unlocked_text_blocks": ["--unlocked_text_blocks"],
    "hard_negatives": ["--hard_negatives"],
}
VALUES = {
    "beta1": "0.5",
    "ema": "0.5",
    "label_smoothing": "0.5",
    "word_dropout": "0.5",
    "drop_path": "0.5",
    "patch_dropout": "0.5",
    "i2t_weight": "1",
    "beta2": "0.5",
    "optimizer": "lion",
    "loss": "siglip",
    "trainable": "adaptor",
    "precision": "bf16",
    "eval_precision": "bf16",
    "eval_split": "val",
    "schedule": "constant",
    "preset": "clip_itm",
    "layer_decay": "0.5",
    "hard_negatives": "0.5",
}
NEEDED = {"margin": ("--loss", "triplet")}


@pytest.mark.parametrize("name, spelling", [(n, s) for n, spellings in SPELLINGS.items() for s in spellings])
def test_every_spelling_with_underscores_or_hyphens(name, spelling):
    default, needed = options()[name], NEEDED.get(name, ())
    value = VALUES.get(name, "3" if not isinstance(default, str) else "other")
    dashes = spelling[: len(spelling) - len(spelling.lstrip("-"))]
    hyphened = dashes + spelling.lstrip("-").replace("_", "-")
    expected = options(*needed, spelling, value)[name]
    assert expected != default
    assert str(expected) in (value, f"{value}.0")
    assert options(*needed, hyphened, value)[name] == expected
    if dashes == "--":
        assert options(*needed, f"{hyphened}={value}")[name] == expected


def test_flags_and_their_inverses():
    flags = ["eval", "freeze_vision", "freeze_text", "overwrite", "no_restval", "no_eval_first", "grad_checkpointing"]
    for name in [*flags, "map", "reset_optimizer", "reset_data_offset"]:
        assert options()[name] is False
        assert parse([f"--{name}"])[name] is True
        assert parse([f"--{name.replace('_', '-')}"])[name] is True
        inverse = name.removeprefix("no_") if name.startswith("no_") else f"no_{name}"
        assert parse([f"--{inverse}"])[name] is False
    assert options("--use_siglip")["loss"] == "siglip"
    assert options("--fp16_precision")["precision"] == "fp16"


def test_values_in_the_spelling_of_the_systems():
    assert options("--loss", "cross_entropy")["loss"] == "infonce"
    assert options("--loss", "cos_embedd")["loss"] == "margin"
    assert options("--num_workers", "auto")["num_workers"] is None
    assert options("--device", "auto")["device"] is None


def test_image_size_is_a_side_or_height_and_width():
    assert options("--image_size", "192", "256")["image_size"] == (192, 256)
    assert options("--image_size", "192")["image_size"] == options("--image_size", "192", "192")["image_size"] == 192


def test_documented_defaults():
    expected = {
        "vision_model": "ViT-B/32",
        "pretrained": None,
        "dataset": "coco",
        "dataset_root": "datasets",
        "eval_split": "test",
        "epochs": 10,
        "batch_size": 256,
        "lr": 1e-5,
        "beta1": 0.9,
        "beta2": None,  # 0.98, or 0.99 for Lion
        "eps": 1e-6,
        "weight_decay": 0.2,
        "warmup": None,  # 500, but at most a tenth of the run
        "loss": "infonce",
        "margin": None,  # 0.1, or 0.2 for the triplet loss
        "label_smoothing": 0.0,
        "distill_from": None,
        "distill_kind": "relational",
        "distill_weight": 1.0,
        "crop_scale": 0.9,
        "word_dropout": 0.0,
        "drop_path": 0.0,
        "patch_dropout": 0.0,
        "start_image_size": None,
        "start_image_size_until": 0.7,
        "i2t_weight": 0.5,
        "temperature": None,
        "trainable": "all",
        "precision": "auto",
        "eval_precision": "fp32",
        "display": 20,
        "checkpoint_path": "logs",
        "experiments": "ex0",
        "overwrite": False,
        "seed": 99,
    }
    assert {name: options()[name] for name in expected} == expected


@pytest.mark.parametrize(
    "command",
    [
        # CLIP_ITM
        "--batch_size 256 --epochs 10 --lr 1e-5 --warmup 500 --vision_model ViT-B/32 --dataset_root DATA",
        "--batch_size 128 --epochs 5 --lr 1e-5 --warmup 500 --vision_model ViT-B/16",
        "--eval --resume MODEL --vision_model ViT-B/16",
        # Clip_crossmodal_retrieval
        "--batch_size 256 --trainable adaptor --dataset coco --num_epoch 1 --model ViT-L/14",
        # clip-training
        "--train_img_dir images --train_annotation_file captions.json",
        # simple-clip
        "--dataset_name yfcc7m --fp16_precision --batch_size 256 --log_every_n_steps 50 --image_size 224 "
        "--learning_rate 1e-4 --imagenet_eval",
        "--dataset_name combined --fp16_precision --batch_size 256 --log_every_n_steps 50 --image_size 224 "
        "--learning_rate 1e-4 --imagenet_eval",
        "--dataset_path D --image_encoder_name resnet50 --text_encoder_name distilbert-base-uncased -save_model_dir M "
        "--num_epochs 3 --image_size 224 -b 64 -lr 1e-4 -wd 0.1 --imagenet_eval_steps 1000 --ckpt_path C --use_siglip",
    ],
)
def test_the_commands_of_the_systems_parse(command):
    typed = parse(command.split())
    assert typed


@pytest.mark.parametrize(
    "command, words",
    [
        ("--batch_sze 3", ["--batch_sze", "--batch_size"]),
        ("--batch_size many", ["many", "whole number"]),
        ("--lr fast", ["fast", "number"]),
        ("--loss infonc", ["infonc", "infonce"]),
        ("--num_workers few", ["few", "auto"]),
        ("--batch", ["--batch"]),
        ("stray", ["stray"]),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(command, words, capsys):
    with pytest.raises(SystemExit) as exit:
        parse(command.split())
    assert exit.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert all(word in message for word in words)


@pytest.mark.parametrize(
    "command, words",
    [
        ("--lr 0", ["--lr", "greater than 0"]),
        ("--lr nan", ["--lr"]),
        ("--lr inf", ["--lr"]),
        ("--warmup inf", ["--warmup"]),
        ("--beta1 1.5", ["--beta1", "less than 1"]),
        ("--beta2 1", ["--beta2", "less than 1"]),
        ("--seed 18446744073709551616", ["--seed"]),
        ("--recall_k 99999999999999999999999", ["--recall_k"]),
        ("--experiments=", ["--experiments"]),
        ("--batch_size 1", ["--batch_size 1", "at least 2"]),
        ("--epochs 0", ["--epochs"]),
        ("--warmup -1", ["--warmup"]),
        ("--recall_k 0", ["--recall_k"]),
        ("--rerank csls", ["--rerank", "--eval"]),
        ("--ensemble other.pt", ["--ensemble", "--eval"]),
        ("--eval --ensemble_mode features", ["--ensemble_mode features", "--ensemble CKPT"]),
        ("--distill_weight 2", ["--distill_weight", "--distill_from"]),
        ("--start_image_size_until 0.5", ["--start_image_size_until 0.5", "--start_image_size"]),
        ("--start_image_size 8 8 8", ["--start_image_size 8 8 8", "one side, or height and width"]),
        ("--crop_scale 0.5", ["--crop_scale", "--augment"]),
        ("--drop_path 1", ["--drop_path 1", "less than 1"]),
        ("--i2t_weight 1.5", ["--i2t_weight 1.5", "at most 1"]),
        ("--loss siglip --label_smoothing 0.1", ["--label_smoothing", "--loss siglip"]),
        ("--loss margin --i2t_weight 0.6", ["--i2t_weight", "--loss margin"]),
        ("--loss triplet --temperature 0.05", ["--temperature", "--loss triplet"]),
        ("--temperature 1e-320", ["--temperature", "at least 0.0001"]),
        ("--eps 1e-320", ["--eps", "at least 1e-30"]),
        ("--margin 0.3", ["--margin", "--loss infonce"]),
        ("--lr_image 1e-4 --freeze_vision", ["--lr_image", "--freeze_vision"]),
        ("--lr_text 1e-4 --trainable adaptor", ["--lr_text", "--trainable adaptor"]),
        ("--drop_path 0.1 --trainable linear_projection", ["--drop_path", "--trainable linear_projection"]),
        ("--grad_cache 8 --accum_freq 4", ["--accum_freq", "--grad_cache"]),
        ("--freeze_vision --freeze_text", ["--freeze_vision", "--freeze_text"]),
        ("--imagenet_eval_steps 5", ["--zero_shot_steps", "--zero_shot_eval"]),
        ("--overwrite --resume auto", ["--overwrite", "--resume auto"]),
        (
            "--dataset coco --dataset csv --dataset_root A --dataset_root B --dataset_root C",
            ["--dataset_root", "3 times"],
        ),
        ("--dataset coco --dataset csv --annotations photos.csv", ["--annotations", "1 time,", "once for each"]),
        ("--dataset coco --dataset csv --dataset_weights 1", ["--dataset_weights", "1 values"]),
        ("--dataset coco --dataset csv --dataset_weights 1 0", ["--dataset_weights 0", "greater than 0"]),
        ("--dataset coco --train_data X", ["--train_data", "--dataset chinese and webdataset"]),
    ],
)
def test_bad_values_are_refused_by_name(command, words):
    with pytest.raises(UserError) as error:
        options(*command.split())
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    "command, words",
    [
        ("--retention_dataset cocoo", ["--retention_dataset cocoo", "did you mean coco"]),
        ("--retention_dataset coco --retention_root /missing", ["--retention_root /missing: no such folder"]),
        ("--distill_from missing.pt", ["--distill_from missing.pt: no such file"]),
    ],
)
def test_missing_data_and_teachers_are_refused_early(command, words):
    with pytest.raises(UserError) as error:
        check_early(parse(["--dataset", "shapes", "--vision_model", "tiny", *command.split()]), {})
    assert all(word in str(error.value) for word in words)


def test_command_line_overrides_checkpoint_overrides_defaults():
    stored = select_for_resume(
        options("--lr", "5e-4", "--epochs", "3", "--device", "cuda", "--experiments", "old", "--num_workers", "7")
        | {"an_option_of_tomorrow": 1}
    )
    settled = settle(stored, parse(["--epochs", "5"])).flat()
    assert settled["lr"] == 5e-4 and settled["epochs"] == 5
    # The output folder and the machine are never taken from a checkpoint.
    assert settled["device"] is None and settled["experiments"] == "ex0" and settled["num_workers"] is None


def test_help_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['main.py', '--help']\n"
        "import runpy\n"
        "try: runpy.run_path('main.py', run_name='__main__')\n"
        "except SystemExit as e: assert e.code == 0\n"
        "heavy = {'torch', 'open_clip', 'numpy', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    for group in ("run options", "model options", "data options", "loss options", "training options"):
        assert group in result.stdout
    assert "(default: ViT-B/32)" in result.stdout


def test_mixture_has_options_for_each_dataset():
    typed = ["--dataset", "coco", "--dataset", "csv", "--annotations", "auto", "--annotations", "photos.csv"]
    settled = settle(parse([*typed, "--dataset_root", "DATA", "--dataset_weights", "3", "1"])).data
    assert settled.name == "coco+csv" and settled.dataset_weights == (3.0, 1.0)
    assert [(part.name, part.dataset_root, part.annotations) for part in settled.parts()] == [
        ("coco", "DATA", None),
        ("csv", "DATA", "photos.csv"),
    ]
    alone = settle(parse(["--dataset", "csv"])).data
    assert [vars(part) for part in alone.parts()] == [vars(alone)]


def test_dataset_is_inferred_from_train_data():
    assert options("--train_data", "shards/{0..9}.tar")["dataset"] == "webdataset"
    assert options("--train_data", "lmdb/train")["dataset"] == "chinese"
    assert options("--train_data", "lmdb/train", "--dataset", "webdataset")["dataset"] == "webdataset"


def test_last_value_wins_for_one_dataset():
    assert options("--dataset_root", "A", "--dataset_root", "B")["dataset_root"] == "B"
