"""The commands of CLIP_ITM's, Clip_crossmodal_retrieval's and clip-training's READMEs run, shortened."""

import shlex

import pytest

from tests.conftest import read_json

# Shorten a run without downloaded weights; ViT-B/32 keeps its widths and depth.
SHORT = ("--max_steps", "1", "--batch_size", "8", "--no_eval_first", "--device", "cpu", "--num_workers", "0")


@pytest.mark.slow
def test_clip_itm_finetunes_and_evaluates(run, real_data, tmp_path):
    data = real_data / "coco_mini"
    out = ("--checkpoint_path", tmp_path)
    command = "--batch_size 256 --epochs 10 --lr 1e-5 --warmup 500 --vision_model ViT-B/32 --dataset_root ${DATAPATH}"
    arguments = shlex.split(command.replace("${DATAPATH}", str(data)))
    code, _, err = run(*arguments, *SHORT, *out, "--pretrained", "none", "--image_size", "32")
    assert code == 0, err
    results = read_json(tmp_path / "ex0" / "results.json")
    assert (results["dataset"], results["model"], results["images"], results["captions"]) == (
        "coco",
        "ViT-B/32",
        42,
        210,
    )

    arguments = shlex.split(f"--eval --resume {tmp_path / 'ex0' / 'best.pt'} --vision_model ViT-B/32")
    code, _, err = run(*arguments)
    assert code == 0, err
    again = read_json(tmp_path / "ex0" / "eval_coco_test" / "results.json")
    assert again["i2t"] == results["i2t"] and again["t2i"] == results["t2i"]


def test_clip_crossmodal_retrieval_trains_an_adaptor(run, real_data, captioned, tmp_path):
    arguments = shlex.split(
        '--batch_size "256" --trainable "adaptor" --dataset "coco" --num_epoch "1" --model "ViT-L/14"'
    )
    small = ("--model", captioned / "small.json", "--dataset_root", real_data / "coco_mini")
    code, _, err = run(*arguments, *SHORT, *small, "--checkpoint_path", tmp_path)
    assert code == 0, err
    options = read_json(tmp_path / "ex0" / "options.json")
    assert (options["trainable"], options["dataset"], options["epochs"]) == ("adaptor", "coco", 1)


def test_clip_training_names_images_and_captions(run, real_data, captioned, tmp_path):
    data = real_data / "coco_mini"
    command = f"--train_img_dir {data / 'images'} --train_annotation_file {data / 'annotations/captions_val2014.json'}"
    code, out, err = run(
        *shlex.split(command), *SHORT, "--model", captioned / "small.json", "--checkpoint_path", tmp_path
    )
    assert code == 0, err
    assert "coco train: 234 images" in out
