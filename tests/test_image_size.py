"""Runs at another image size, square or not, from the command line to the exported model."""

import json
import re

import numpy as np
import open_clip
import pytest
import timm
import torch
from PIL import Image

from clip_retrieval import load_model
from clip_retrieval.errors import UserError
from clip_retrieval.export.export import export
from clip_retrieval.models.build import build_model
from clip_retrieval.models.checkpoint import Checkpoint
from clip_retrieval.models.image_size import height_and_width
from clip_retrieval.options import ModelOptions
from tests.models.small import RESNET, VIT, small_config

SWIN = {"timm_model_name": "swin_base_patch4_window7_224", "timm_pool": "avg", "timm_proj": "linear"}
SIGLIP = {"timm_model_name": "vit_base_patch16_siglip_224", "timm_pool": "map", "timm_proj": "linear"}
TOWERS = {
    "vit": ({**VIT, "image_size": [16, 24]}, (24, 16)),
    "resnet": ({**RESNET, "image_size": [32, 64]}, (64, 32)),
    "swin": ({**SWIN, "image_size": 64}, (32, 64)),
    "siglip": ({**SIGLIP, "image_size": 224}, (256, 256)),
}
"""Image towers of non-square configs, and another size each. timm's Swin is square at first, as all of timm's are."""


@pytest.fixture
def model(tmp_path, monkeypatch):
    """model(kind) writes the config of a small model."""
    create = timm.create_model
    swin = {"embed_dim": 16, "depths": (2, 1, 1, 1), "num_heads": (1, 2, 4, 8)}
    siglip = {"embed_dim": 32, "depth": 1, "num_heads": 2}

    def create_small(name, **options):
        return create(name, **options, **(swin if name.startswith("swin") else siglip))

    monkeypatch.setattr("timm.create_model", create_small)

    def write(kind):
        path = tmp_path / f"{kind}.json"
        path.write_text(json.dumps(small_config(vision_cfg=TOWERS[kind][0])))
        return path

    return write


def ranks(folder):
    content = json.loads((folder / "results.json").read_text())
    return {name: content[name] for name in ("split", "rsum", "i2t", "t2i")}


@pytest.mark.parametrize("kind", ["vit", "resnet", "swin"])
def test_finetune_of_another_size_resumes_evaluates_and_finetunes_again(kind, model, run, arguments, tmp_path):
    path, logs = model(kind), tmp_path / "logs"
    arguments += ["--vision_model", path, "--augment", "crop", "--image_cache", tmp_path / "cache", "--no_eval_first"]
    size = TOWERS[kind][1]
    assert run(*arguments, "--max_steps", "2", "--image_size", *size)[0] == 0
    code, _, err = run("--resume", logs / "ex0" / "last.pt", "--max_steps", "3", "--checkpoint_path", logs)
    assert code == 0, err
    scores = ranks(logs / "ex0")
    assert run("--eval", "--resume", logs / "ex0" / "best.pt", "--device", "cpu")[0] == 0
    assert ranks(logs / "ex0" / "eval_csv_test") == scores
    saved = Checkpoint.load(logs / "ex0" / "best.pt")
    assert saved.model_config["vision_cfg"]["image_size"] == saved.preprocess["size"] == list(size)

    more = ["--pretrained", logs / "ex0" / "best.pt", "--image_size", 96, "--experiments", "ex1", "--max_steps", "1"]
    code, _, err = run(*arguments, *more)
    assert code == 0, err
    assert load_model(logs / "ex1" / "best.pt", "cpu").model.preprocess["size"] == 96


@pytest.fixture
def checkpoint(model, tmp_path):
    """checkpoint(kind, size) saves a random model of this kind and size."""

    def save(kind, size):
        built = build_model(ModelOptions(vision_model=str(model(kind)), image_size=size))
        content = {"model": built.clip.state_dict(), "model_config": built.config, "preprocess": built.preprocess}
        Checkpoint(**content, options={"vision_model": "small"}, epoch=1, step=1).save(tmp_path / "best.pt")
        return tmp_path / "best.pt"

    return save


@pytest.mark.parametrize(("kind", "size"), [("vit", (24, 16)), ("resnet", 96), ("siglip", 256)])
def test_open_clip_takes_the_export_of_another_size(kind, size, checkpoint, tmp_path):
    assert export(checkpoint(kind, size), tmp_path / "out", "open_clip") < 1e-5
    again = load_model(f"local-dir:{tmp_path / 'out'}", "cpu").model.preprocess["size"]
    assert height_and_width(again) == height_and_width(size)


@pytest.mark.parametrize(("kind", "size", "words"), [("siglip", 240, "240"), ("swin", (32, 64), "32 64")])
def test_export_to_open_clip_at_a_size_unknown_to_timm_is_refused(kind, size, words, checkpoint, tmp_path):
    with pytest.raises(UserError, match=rf"only for timm's image size, not for --image_size {words}; choose another"):
        export(checkpoint(kind, size), tmp_path / "out", "open_clip")


@pytest.mark.parametrize(("kind", "size"), [("siglip", 240), ("swin", (32, 64))])
def test_open_clip_reads_a_checkpoint_of_another_size_as_documented(kind, size, checkpoint, monkeypatch):
    path = checkpoint(kind, size)
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "model", small_config(vision_cfg=TOWERS[kind][0]))
    theirs = open_clip.create_model("model", force_image_size=size).eval()
    open_clip.load_checkpoint(theirs, str(path))
    image = Image.fromarray(np.full((40, 50, 3), 99, dtype=np.uint8))
    ours = load_model(path, "cpu")
    with torch.no_grad():
        features = theirs.encode_image(ours.preprocess(image)[None], normalize=True)
    torch.testing.assert_close(ours.encode_images([image]), features)


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (["1", "2", "3"], "--image_size 1 2 3: give one side, or height and width"),
        (["20"], "--image_size 20: must be a multiple of 8 for .*small.json; give 16 or 24"),
        (["4096"], "--image_size 4096: must be less than 2049"),
    ],
)
def test_impossible_size_ends_with_exit_code_2(typed, words, run, arguments):
    code, _, err = run(*arguments, "--image_size", *typed)
    assert (code, bool(re.fullmatch(f"error: {words}\n", err))) == (2, True), err
