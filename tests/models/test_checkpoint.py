"""Checkpoints of ours: saved, loaded and refused."""

import errno
import io
import os

import open_clip
import pytest
import torch

from clip_retrieval import __version__
from clip_retrieval.errors import RunError, UserError
from clip_retrieval.models.checkpoint import FORMAT, Checkpoint
from tests.models.small import small_clip, small_config, small_preprocess


@pytest.fixture
def checkpoint():
    return Checkpoint(
        model=small_clip().state_dict(),
        model_config=small_config(),
        preprocess=small_preprocess(),
        options={"vision_model": "small"},
        epoch=1,
        step=3,
    )


def rewrite(path, **changes):
    """Change entries of a saved checkpoint; None removes one."""
    content = torch.load(path, weights_only=True) | changes
    torch.save({name: value for name, value in content.items() if value is not None}, path)


def test_what_is_saved_is_loaded(checkpoint, tmp_path):
    checkpoint.save(tmp_path / "best.pt")
    loaded = Checkpoint.load(tmp_path / "best.pt")
    assert loaded.model.keys() == checkpoint.model.keys()
    assert all(torch.equal(loaded.model[name], value) for name, value in checkpoint.model.items())
    for name in ("model_config", "preprocess", "options", "epoch", "step", "val"):
        assert getattr(loaded, name) == getattr(checkpoint, name), name
    assert (type(loaded), loaded.format, loaded.version) == (Checkpoint, FORMAT, __version__)


def test_the_file_is_a_plain_dict_without_missing_entries(checkpoint, tmp_path):
    checkpoint.save(tmp_path / "best.pt")
    content = torch.load(tmp_path / "best.pt", weights_only=True)
    entries = {"model", "state_dict", "model_config", "preprocess", "options", "epoch", "step", "format", "version"}
    assert type(content) is dict and content.keys() == entries


def test_a_file_from_before_versions_is_loaded(checkpoint, tmp_path):
    checkpoint.save(tmp_path / "best.pt")
    rewrite(tmp_path / "best.pt", format=None, version=None, state_dict=None)
    assert Checkpoint.load(tmp_path / "best.pt").version is None


def test_open_clip_reads_the_weights(checkpoint, tmp_path):
    checkpoint.model["adaptor.0.weight"] = torch.ones(2, 2)
    checkpoint.save(tmp_path / "best.pt")
    model = small_clip(seed=1)
    open_clip.load_checkpoint(model, str(tmp_path / "best.pt"))
    assert all(torch.equal(checkpoint.model[name], value) for name, value in model.state_dict().items())


def test_open_clip_creates_the_model_of_a_run_with_an_adaptor(run, arguments, tmp_path, monkeypatch):
    assert run(*arguments, "--trainable", "adaptor", "--max_steps", "2", "--no_eval_first")[0] == 0
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "small", small_config())
    for name in ("best.pt", "last.pt"):
        path = tmp_path / "logs" / "ex0" / name
        model = open_clip.create_model("small", pretrained=str(path))
        ours = Checkpoint.load(path).model
        assert "adaptor.0.weight" in ours
        assert all(torch.equal(ours[key], value) for key, value in model.state_dict().items())


def test_weights_are_stored_once(checkpoint, tmp_path):
    checkpoint.save(tmp_path / "best.pt")
    size = sum(value.nbytes for value in checkpoint.model.values())
    assert size < (tmp_path / "best.pt").stat().st_size < 1.05 * size
    loaded = torch.load(tmp_path / "best.pt", weights_only=True)
    assert all(value is loaded["model"][name] for name, value in loaded["state_dict"].items())


class FullDisk(io.BytesIO):
    """A file on a disk that is full after `room` bytes."""

    def __init__(self, room):
        super().__init__()
        self.room = room

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


@pytest.mark.parametrize("room", [0, 1000, 100_000])
def test_full_disk_within_the_file_is_named(checkpoint, tmp_path, monkeypatch, room):
    monkeypatch.setattr("clip_retrieval.models.checkpoint.write_atomic", lambda path: FullDisk(room))
    with pytest.raises(RunError, match=r"could not write .*best\.pt \(No space left on device\); the checkpoint"):
        checkpoint.save(tmp_path / "best.pt")


def test_a_newer_format_is_refused_with_the_remedy(checkpoint, tmp_path):
    checkpoint.save(tmp_path / "best.pt")
    rewrite(tmp_path / "best.pt", format=FORMAT + 1, unknown={"entry": 1})
    with pytest.raises(UserError, match=rf"best\.pt was written by a newer .*format {FORMAT + 1}.*update the package"):
        Checkpoint.load(tmp_path / "best.pt")


@pytest.mark.parametrize("changes", [{"format": 0}, {"format": "1"}, {"version": 1}, {"step": -1}])
def test_an_invalid_entry_is_named(checkpoint, tmp_path, changes):
    checkpoint.save(tmp_path / "best.pt")
    rewrite(tmp_path / "best.pt", **changes)
    with pytest.raises(UserError, match=rf"best\.pt is a damaged checkpoint: .*{next(iter(changes))}"):
        Checkpoint.load(tmp_path / "best.pt")


def test_a_plain_entry_of_a_later_version_is_ignored(checkpoint, tmp_path):
    checkpoint.save(tmp_path / "best.pt")
    rewrite(tmp_path / "best.pt", later={"name": 1})
    assert Checkpoint.load(tmp_path / "best.pt").step == 3


def test_another_file_is_none(tmp_path):
    torch.save(small_clip().state_dict(), tmp_path / "weights.pt")
    assert Checkpoint.load_if_ours(tmp_path / "weights.pt") is None


def other_weights(model):
    return {name: value + 1 if value.is_floating_point() else value for name, value in model.items()}


@pytest.mark.parametrize(
    "change", [other_weights, lambda model: {}, lambda model: model | {"more": torch.ones(1)}, lambda model: 1]
)
def test_other_weights_for_open_clip_are_refused(checkpoint, tmp_path, change):
    checkpoint.save(tmp_path / "best.pt")
    rewrite(tmp_path / "best.pt", state_dict=change(checkpoint.model))
    with pytest.raises(UserError, match=r"best\.pt is a damaged checkpoint: state_dict"):
        Checkpoint.load(tmp_path / "best.pt")
