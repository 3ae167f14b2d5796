"""What can be refused before torch is loaded is refused, and nothing else."""

import pytest

from clip_retrieval.errors import UserError
from clip_retrieval.run.merge import check_early

SHAPES = {"dataset": "shapes"}


@pytest.mark.parametrize(
    "typed, config",
    [
        (SHAPES | {"checkpoint_path": "new"}, {}),
        ({"resume": "auto", "config": "options.json"}, SHAPES | {"overwrite": True}),
        (SHAPES | {"vision_model": "ViT-B-16@RBT3-chinese"}, {}),
        (SHAPES | {"vision_model": "ViT-L/14@336px"}, {}),
        (SHAPES | {"vision_model": "hf-hub:org/name"}, {}),
        (SHAPES, {"vision_model": "Chinese-CLIP"}),
        ({"eval": True, "resume": "logs/ex0/best.pt"}, {}),
        # the checkpoint has the options that these need
        ({"resume": "last.pt", "negative_column": "wrong"}, {}),
        ({"resume": "last.pt", "start_image_size_until": 0.5}, {}),
        ({"resume": "last.pt", "lora_dropout": 0.1}, {}),
    ],
)
def test_valid_commands_pass(typed, config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_early(typed, config)


def test_evaluation_does_not_need_the_training_shards(tmp_path):
    (tmp_path / "val.tar").touch()
    data = {"dataset": "webdataset", "train_data": "/nope/{0..1}.tar", "val_data": str(tmp_path / "val.tar")}
    check_early(data | {"eval": True, "eval_split": "val"}, {})
    with pytest.raises(UserError, match=r"/nope/0.tar"):
        check_early(data, {})


@pytest.mark.parametrize(
    "typed, words",
    [
        ({"dataset_root": "nowhere"}, "nowhere: no such folder"),
        ({"dataset": "coca"}, "--dataset coca: no such data set; did you mean coco?"),
        (SHAPES | {"vision_model": "ViT-B/99"}, "--vision_model ViT-B/99: no such model"),
        (SHAPES | {"lr": -1.0}, "--lr"),
        (SHAPES | {"checkpoint_path": "logs"}, "logs/ex0 already holds a run"),
        ({"dataset": ("shapes", "shapes"), "val_fraction": 0.1}, "--val_fraction: not for several data sets"),
        (SHAPES | {"negative_column": "wrong"}, "--negative_column is for --dataset csv"),
    ],
)
def test_faults_are_refused(typed, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "logs/ex0").mkdir(parents=True)
    (tmp_path / "logs/ex0/last.pt").touch()
    typed = {"checkpoint_path": "new"} | typed
    with pytest.raises(UserError) as error:
        check_early(typed, {})
    assert words in str(error.value)
