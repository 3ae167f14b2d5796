"""Files of other kinds are refused with one line that says what they are and how to get a model from them."""

import argparse
import re

import numpy as np
import pytest
import torch
from transformers import CLIPConfig

from clip_retrieval.errors import LONGEST_MESSAGE, UserError
from clip_retrieval.models.weights import read_weights
from tests.models.small import small_clip

STATE = small_clip().state_dict()


def refusal(path):
    """Return the error message for a file or folder."""
    with pytest.raises(UserError) as error:
        read_weights(path)
    message = str(error.value)
    assert str(path) in message and "\n" not in message and len(message) - len(str(path)) < LONGEST_MESSAGE - 100
    return message


LORA = {
    "peft": {"base_model.model.visual.conv1.lora_A.weight": torch.ones(2, 3)},
    "without visual": {"base_model.model.text_model.q_proj.lora_B.weight": torch.ones(2, 3)},
    "unmerged": {
        f"base_model.model.{name.replace('out_proj.', 'out_proj.base_layer.')}": v for name, v in STATE.items()
    },
    "loralib": {"state_dict": STATE | {"visual.transformer.resblocks.0.attn.lora_A": torch.ones(2, 3)}},
}


@pytest.mark.parametrize("kind", LORA)
def test_adapter_is_refused_with_the_line_that_merges_it(kind, tmp_path):
    torch.save(LORA[kind], tmp_path / "adapter_model.bin")
    assert re.search(r"adapter \(LoRA, peft\); merge it: .*merge_and_unload", refusal(tmp_path / "adapter_model.bin"))


def test_merged_adapter_is_read(tmp_path):
    torch.save({f"base_model.model.{name}": v for name, v in STATE.items()}, tmp_path / "merged.pt")
    assert read_weights(tmp_path / "merged.pt").state.keys() == STATE.keys()


@pytest.mark.parametrize(
    "file, words",
    [
        ("adapter_config.json", "holds the weights of an adapter (LoRA, peft); give it as --pretrained"),
        ("zero_to_fp32.py", "is a DeepSpeed checkpoint; join its parts: python zero_to_fp32.py"),
        ("mp_rank_00_model_states.pt", "is a DeepSpeed checkpoint; join its parts"),
        ("__0_0.distcp", "dcp_to_torch"),
        ("weights.pt", "is a folder; give a weight file in it"),
    ],
)
def test_folder_is_refused_with_its_kind(file, words, tmp_path):
    (tmp_path / file).touch()
    assert words in refusal(tmp_path)


def test_adapter_folder_as_the_model_is_refused_with_its_kind(tmp_path, run):
    (tmp_path / "adapter_config.json").touch()
    code, _, err = run("--vision_model", f"local-dir:{tmp_path}", "--dataset", "shapes", "--eval")
    assert code == 2 and f"{tmp_path} holds the weights of an adapter" in err


@pytest.mark.parametrize("option", ["--vision_model", "--pretrained"])
@pytest.mark.parametrize("has_config", [False, True])
@pytest.mark.parametrize("place", ["hub", "folder"])
def test_adapter_with_or_without_a_config_is_found_by_name(place, has_config, option, tmp_path, run, monkeypatch):
    commit, name = "0" * 40, f"local-dir:{tmp_path}"
    folder = tmp_path
    if place == "hub":
        repository, name = tmp_path / "models--some--adapter", "hf-hub:some/adapter"
        folder = repository / "snapshots" / commit
        (repository / "refs").mkdir(parents=True)
        (repository / "refs/main").write_text(commit)
        folder.mkdir(parents=True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").touch()
    if has_config:
        CLIPConfig().save_pretrained(folder)
    code, _, err = run(option, name, "--dataset", "shapes", "--eval")
    assert code == 2
    if option == "--pretrained":  # it is read
        assert f"error: {folder}/adapter_config.json: it has no peft_type, lora_alpha; merge" in err
        return
    named = name if has_config or place == "hub" else tmp_path
    assert f"error: {named} holds the weights of an adapter (LoRA, peft); give it as --pretrained" in err


@pytest.mark.parametrize(
    "content, words",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 605143316\n", "run `git lfs pull`"),
        (b"<!doctype html>\n<html>", "a web page"),
        (b"\n<HTML>", "a web page"),
        (b"\x89HDF\r\n\x1a\n", "Keras"),
        (b"\x93NUMPY\x01\x00", "an array of NumPy"),
        (b"", "is empty; fetch it again"),
    ],
)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_file_is_refused_with_its_kind(content, words, suffix, tmp_path):
    (tmp_path / f"w{suffix}").write_bytes(content)
    assert words in refusal(tmp_path / f"w{suffix}")


def test_numpy_archive_of_big_vision_is_named(tmp_path):
    np.savez(tmp_path / "siglip.npz", **{"params/img/embedding/kernel": np.ones((2, 2)), "params/t": np.ones(1)})
    assert re.search(r"\(\.npz\), as big_vision saves; .*open_clip\.create_model", refusal(tmp_path / "siglip.npz"))


DEEPSPEED = {"ds_config": {"zero_optimization": {"stage": 3}}, "ds_version": "0.16.2", "optimizer": None}


def test_deepspeed_model_states_are_read_if_they_are_complete(tmp_path):
    path = tmp_path / "mp_rank_00_model_states.pt"
    shapes = [{name: v.shape for name, v in STATE.items()}]
    torch.save({"module": STATE, "param_shapes": shapes, **DEEPSPEED}, path)
    assert read_weights(path).state.keys() == STATE.keys()
    for module in ({name: torch.empty(0) for name in STATE}, {}, None):
        torch.save({"module": module, "param_shapes": shapes, **DEEPSPEED}, path)
        assert "join its parts: python zero_to_fp32.py" in refusal(path)


def test_deepspeed_optimizer_states_are_named(tmp_path):
    optimizer = {"zero_stage": 2, "loss_scaler": argparse.Namespace(), "single_partition": [torch.ones(3)]}
    path = tmp_path / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"
    torch.save({"optimizer_state_dict": optimizer, **DEEPSPEED}, path)
    assert "a part of a DeepSpeed checkpoint" in refusal(path)
