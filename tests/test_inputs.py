"""Pipes, devices and folders in place of text inputs: one line, exit code 2, and no blocking."""

import os
import socket

import numpy as np
import pytest


def fifo(path):
    os.mkfifo(path)


def unix_socket(path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(path))


def device(path):
    path.symlink_to("/dev/zero")


def terminal(path):
    path.symlink_to("/dev/tty")


def folder(path):
    path.mkdir()


def loop(path):
    path.symlink_to(path.name)


def dangling(path):
    path.symlink_to("nowhere")


def memory_of_a_process(path):
    path.symlink_to("/proc/self/mem")


KINDS = [fifo, unix_socket, device, terminal, folder, loop, dangling, memory_of_a_process]


@pytest.fixture
def inputs(tmp_path, captioned):
    """The script and its arguments for each text input; `X` is replaced by the input."""
    np.save(tmp_path / "a.npy", np.eye(3, dtype=np.float32))
    (tmp_path / "gold_texts.jsonl").write_text('{"text_id": 1, "image_ids": [1]}\n')
    for name in ("classes/cat", "classes/dog"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "0.jpg").write_bytes((captioned / "0.jpg").read_bytes())
    features = ["evaluate_features", "--results", "out.json", "--image_features"]
    classify = ["zero_shot", "--data", "classes", "--vision_model", captioned / "small.json", "--pretrained", "none"]
    predictions = ["make_topk_predictions", "--output", "p.jsonl", "--image_feats", "a.npy", "--text_feats"]
    export = ["export_tsv", "--output", "out"]
    return {
        "coco.json": [*export, "--annotations", "X"],
        "dataset_x.json": [*export, "--dataset", "karpathy", "--annotations", "X"],
        "dataset_x.json.gz": [*export, "--dataset", "karpathy", "--annotations", "X"],
        "photos.csv": [*export, "--dataset", "csv", "--annotations", "X"],
        "results.csv": [*export, "--dataset", "flickr8k", "--annotations", "X"],
        "image.npy": [*features, "X", "--text_features", "a.npy", "--text_to_image", "a.npy"],
        "pairs.npy": [*features, "a.npy", "--text_features", "a.npy", "--pairs", "X"],
        "texts.jsonl": [*predictions, "X"],
        "texts.npy": [*predictions, "X", "--index", "faiss"],
        "gold.jsonl": ["evaluate_predictions", "X", "gold_texts.jsonl", "out.json"],
        "predictions.jsonl": ["evaluate_predictions", "gold_texts.jsonl", "X", "out.json"],
        "x_texts.jsonl": ["transform_ir_annotation_to_tr", "--input", "X"],
        "results.json": ["results_table", "X"],
        "ranks.npz": ["compare", "X", "X"],
        "run.json": ["convert_results", "X", "--format", "clip_benchmark"],
        "names.txt": [*classify, "--class_names", "X"],
        "names.json": [*classify, "--class_names", "X"],
        "templates.txt": [*classify, "--templates", "X"],
        "labels.txt": ["zero_shot_demo", *classify[3:], "--img_dir", "classes/cat", "--labels", "X"],
    }


@pytest.mark.timeout(60)
@pytest.mark.parametrize("make", KINDS)
def test_input_that_is_not_a_file_is_refused(script, inputs, tmp_path, make):
    for name, (program, *arguments) in inputs.items():
        path = tmp_path / name
        make(path)
        code, _, err = script(program, *(path if argument == "X" else argument for argument in arguments))
        lines = [line for line in err.splitlines() if not line.startswith("WARNING")]
        assert code == 2 and len(lines) == 1 and name in lines[0], (name, code, err)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("make", KINDS)
def test_config_that_is_not_a_file_is_refused(run, tmp_path, monkeypatch, make):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "run.yaml")
    code, _, err = run("--config", tmp_path / "run.yaml")
    assert code == 2 and err.count("\n") == 1 and "run.yaml" in err


def test_names_that_are_too_long_are_refused(script, inputs):
    for name, (program, *arguments) in inputs.items():
        long = "x" * 300 + name
        code, _, err = script(program, *(long if argument == "X" else argument for argument in arguments))
        lines = [line for line in err.splitlines() if not line.startswith("WARNING")]
        assert code == 2 and len(lines) == 1 and len(lines[0]) < 510, (name, code, err)
