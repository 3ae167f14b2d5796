import argparse
import copy
import os
import pickle
import warnings
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from clip_retrieval.errors import UserError
from clip_retrieval.models.checkpoint import Checkpoint
from clip_retrieval.models.load import load_into
from clip_retrieval.models.weights import read_weights
from tests.models.small import TEXT, VIT, small_clip, small_config, small_preprocess

ARCHIVE_FACTS = {"input_resolution": 16, "context_length": 16, "vocab_size": 49408}


def features(clip, size=16):
    """Encode a fixed batch of images and texts."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(3, 3, size, size, generator=generator)
    ids = torch.randint(1, 49407, (3, clip.context_length), generator=generator)
    with torch.no_grad():
        return torch.cat([clip.encode_image(images), clip.encode_text(ids)])


def load_file(clip, path):
    """Load the file at `path` into `clip`."""
    load_into(clip, read_weights(path).state, str(path), "small")
    return clip


def to_half(state):
    return {name: v.half() if v.is_floating_point() else v for name, v in state.items()}


def jit_archive(clip, path):
    """Save `clip` as OpenAI saved its models: TorchScript, with the sizes among the buffers."""
    clip = copy.deepcopy(clip)
    for name, value in ARCHIVE_FACTS.items():
        clip.__dict__.pop(name, None)
        clip.register_buffer(name, torch.tensor(value))
    inputs = {"encode_image": torch.zeros(1, 3, 16, 16), "encode_text": torch.zeros(1, 16, dtype=torch.long)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace_module(clip, inputs, check_trace=False), str(path))


def our_checkpoint(clip, **changes):
    """Make the content of a checkpoint of ours, without an optimizer."""
    content = {
        "model": clip.state_dict(),
        "model_config": small_config(),
        "preprocess": small_preprocess(),
        "options": {"vision_model": "tiny"},
        "epoch": 1,
        "step": 5,
    }
    return content | changes


def save_as(layout, clip, folder):
    """Save `clip` in one of the layouts."""
    path, state = folder / "weights.pt", clip.state_dict()
    ddp = {f"module.{name}": v for name, v in state.items()}
    contents = {
        "bare": state,
        "legacy": state,
        "open_clip": {"epoch": 3, "name": "run", "state_dict": ddp, "optimizer": {"state": {}, "param_groups": []}},
        "compiled": {"state_dict": {f"_orig_mod.{name}": v for name, v in ddp.items()}},
        "clip_itm": {"epoch": 3, "name": "ex0", "state_dict": state, "optimizer": {"state": {}}},
        "clip_training": {"epoch": 3, "global_step": 9, "model_state_dict": state, "optimizer_state_dict": {}},
        "ours": our_checkpoint(clip),
    }
    if layout == "safetensors":
        path = folder / "weights.safetensors"
        save_file({name: v.contiguous() for name, v in state.items()}, path)
    elif layout == "openai":
        jit_archive(clip, path)
    else:
        torch.save(contents[layout], path, _use_new_zipfile_serialization=layout != "legacy")
    return path


LAYOUTS = ["bare", "legacy", "open_clip", "compiled", "safetensors", "openai", "clip_itm", "clip_training", "ours"]


@pytest.mark.parametrize("resnet", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_models_features(layout, resnet, tmp_path):
    if layout == "openai" and resnet:
        pytest.skip("tracing is tried on the ViT")
    source = small_clip(resnet, seed=1)
    wanted = features(source, 32 if resnet else 16)
    loaded = load_file(small_clip(resnet, seed=2), save_as(layout, source, tmp_path))
    assert torch.allclose(features(loaded, 32 if resnet else 16), wanted, atol=1e-6)


@pytest.mark.parametrize(
    ("layout", "family"),
    [
        ("bare", "open_clip"),
        ("clip_itm", "open_clip"),
        ("openai", "openai archive"),
        ("clip_training", "clip-training"),
        ("ours", "ours"),
    ],
)
def test_family_of_file_is_recognised(layout, family, tmp_path):
    assert read_weights(save_as(layout, small_clip(), tmp_path)).family.name == family


def test_sizes_in_an_archive_are_not_weights(tmp_path):
    state = read_weights(save_as("openai", small_clip(), tmp_path)).state
    assert not set(ARCHIVE_FACTS) & set(state)


def test_half_precision_is_read_as_float32(tmp_path):
    source = small_clip(seed=1)
    torch.save({"state_dict": to_half(source.state_dict())}, tmp_path / "half.pt")
    state = read_weights(tmp_path / "half.pt").state
    assert all(v.dtype == torch.float32 for v in state.values())
    assert torch.allclose(features(load_file(small_clip(), tmp_path / "half.pt")), features(source), atol=1e-2)


def test_adaptor_of_clip_crossmodal_retrieval_is_found(tmp_path):
    clip, first, second = small_clip(seed=1), torch.randn(6, 24), torch.randn(24, 6)
    state = {f"clip_model.{name}": v for name, v in clip.state_dict().items()}
    layers = {"additional_layers.fc.0.weight": first, "additional_layers.fc.2.weight": second}
    torch.save({"logit_scale": torch.tensor(3.5), **state, **layers}, tmp_path / "best_model.pth")
    found = read_weights(tmp_path / "best_model.pth")
    assert found.family.name == "Clip_crossmodal_retrieval"
    assert torch.equal(found.state["adaptor.0.weight"], first)
    assert torch.equal(found.state["adaptor.2.weight"], second)
    assert found.state["logit_scale"] == 3.5
    assert set(found.state) - {"adaptor.0.weight", "adaptor.2.weight"} == set(clip.state_dict())


def test_checkpoint_of_ours_keeps_its_config_and_options(tmp_path):
    content = our_checkpoint(small_clip())
    torch.save(content, tmp_path / "last.pt")
    found = read_weights(tmp_path / "last.pt").checkpoint
    assert (found.model_config, found.preprocess) == (content["model_config"], content["preprocess"])
    assert found.options == {"vision_model": "tiny"}
    assert Checkpoint.load(tmp_path / "last.pt").step == 5


@pytest.mark.parametrize("layout", ["bare", "safetensors", "openai", "clip_itm"])
def test_other_files_are_not_checkpoints_of_ours(layout, tmp_path):
    assert Checkpoint.load_if_ours(save_as(layout, small_clip(), tmp_path)) is None


class Malicious:
    """Unpickling it creates a folder."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def write_pickled(path, marker):
    path.write_bytes(pickle.dumps({"model": Malicious(marker)}))


def write_saved(path, marker):
    torch.save({"state_dict": small_clip().state_dict(), "extra": Malicious(marker)}, path)


def write_saved_legacy(path, marker):
    torch.save({"extra": Malicious(marker)}, path, _use_new_zipfile_serialization=False)


def write_namespace(path, marker):
    torch.save({"state_dict": small_clip().state_dict(), "args": argparse.Namespace(lr=1)}, path)


def write_module(path, marker):
    torch.save(torch.nn.Linear(2, 2), path)


@pytest.mark.parametrize("write", [write_pickled, write_saved, write_saved_legacy, write_namespace, write_module])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_python_objects_are_refused_and_never_created(write, suffix, tmp_path):
    path, marker = tmp_path / f"evil{suffix}", tmp_path / "marker"
    write(path, marker)
    message = refusal(path)
    assert not marker.exists()
    if suffix == ".pt":
        assert "Python objects" in message
        assert "torch.save(" in message


def refusal(path):
    """Return the error message for a file; it is one line."""
    with pytest.raises(UserError) as error:
        read_weights(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    return str(error.value)


class RunsOnLoad(torch.nn.Module):
    """TorchScript that writes a file when it is loaded."""

    def __init__(self):
        super().__init__()
        self.weight = torch.ones(3)

    def forward(self, x):
        return x + self.weight

    @torch.jit.export
    def __getstate__(self):
        return (self.weight, self.training)

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, bool]):
        torch.save(state[0], "marker-of-torchscript")
        self.weight = state[0]
        self.training = state[1]


def test_archive_that_runs_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(RunsOnLoad()), str(tmp_path / "evil.pt"))
    assert "its own code" in refusal(tmp_path / "evil.pt")
    assert not (tmp_path / "marker-of-torchscript").exists()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("share", [0.02, 0.5, 0.999])
def test_truncated_file_is_refused(layout, share, tmp_path):
    path = save_as(layout, small_clip(), tmp_path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    refusal(path)


@pytest.mark.parametrize(
    "content", [b"", b"version https://git-lfs.github.com/spec/v1\n", b'{"a": 1}', b"<html>", bytes(range(256)) * 20]
)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_file_that_is_not_a_checkpoint_is_refused(content, suffix, tmp_path):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    refusal(path)


def test_other_archives_and_contents_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.writestr("photos/a.jpg", "x")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"epoch": 3}, tmp_path / "epoch.pt")
    for name in ("photos.zip", "list.pt", "epoch.pt"):
        refusal(tmp_path / name)


def test_missing_file_and_a_folder_are_named(tmp_path):
    assert "no such" in refusal(tmp_path / "absent.pt")
    assert "folder" in refusal(tmp_path)


def test_weights_of_another_model_are_listed(tmp_path):
    torch.save(small_clip(vision_cfg={**VIT, "layers": 3, "width": 64}).state_dict(), tmp_path / "wide.pt")
    with pytest.raises(UserError) as error:
        load_file(small_clip(vision_cfg={**VIT, "patch_size": 16}), tmp_path / "wide.pt")
    message = str(error.value)
    assert "wide.pt does not fit small" in message
    assert "12 unexpected (visual.transformer.resblocks.2." in message
    assert "visual.proj (64, 24) instead of (32, 24)" in message
    assert "\n" not in message


def test_missing_weights_are_listed(tmp_path):
    torch.save(small_clip(True).visual.state_dict(), tmp_path / "tower.pt")
    with pytest.raises(UserError, match=r"missing \(positional_embedding, text_projection, .*unexpected \(conv1"):
        load_file(small_clip(), tmp_path / "tower.pt")


def test_plain_clip_loads_into_one_with_a_text_module():
    source = small_clip(seed=1)
    custom = small_clip(seed=2, custom_text=True)
    load_into(custom, source.state_dict(), "file", "small")
    assert torch.allclose(features(custom), features(source), atol=1e-6)


def test_scale_of_another_shape_and_old_buffers_are_accepted():
    source = small_clip(seed=1)
    state = source.state_dict() | {"attn_mask": torch.zeros(16, 16), "logit_scale": torch.tensor([2.0])}
    clip = small_clip(init_logit_bias=-10.0)
    load_into(clip, state, "file", "small")
    assert clip.logit_scale.shape == ()
    assert (clip.logit_scale.item(), clip.logit_bias.item()) == (2.0, -10.0)


def test_shorter_context_keeps_the_features_of_captions_that_fit():
    source = small_clip(seed=1)
    short = small_clip(text_cfg={**TEXT, "context_length": 8})
    load_into(short, source.state_dict(), "file", "small")
    ids = torch.zeros(2, 16, dtype=torch.long)
    ids[:, :5] = torch.tensor([[49406, 7, 8, 9, 49407], [49406, 5, 49407, 0, 0]])
    with torch.no_grad():
        assert torch.allclose(short.encode_text(ids[:, :8]), source.encode_text(ids), atol=1e-6)


def test_longer_context_is_interpolated():
    source, long = small_clip(seed=1), small_clip(text_cfg={**TEXT, "context_length": 32})
    load_into(long, source.state_dict(), "file", "small")
    old, new = source.positional_embedding, long.positional_embedding
    assert torch.allclose((new[1] + new[2]) / 2, (old[0] + old[1]) / 2, atol=1e-6)
