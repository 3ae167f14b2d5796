"""The model of a run: its name, its activation, and repeating it from options.json."""

import json

import pytest
import torch
from open_clip import factory
from safetensors.torch import save_file

from clip_retrieval.files import read_json
from clip_retrieval.models.source import find_source
from clip_retrieval.options import ModelOptions
from tests.models.small import small_clip, small_config

NAMES = {  # spelling: canonical name, QuickGELU with a bare state dict
    "ViT-B/32": ("ViT-B/32", True),
    "ViT-B-32": ("ViT-B/32", False),
    "ViT-B-32-quickgelu": ("ViT-B-32-quickgelu", True),
    "ViT-B/32-quickgelu": ("ViT-B-32-quickgelu", True),
    "quick.json": ("quick.json", True),
    "plain.json": ("plain.json", False),
    "local-dir:quick": ("local-dir:quick", True),
    "local-dir:plain": ("local-dir:plain", False),
}


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """small.pt, a bare state dict; open_clip's ViT-B-32, a config and a folder have the small architecture."""
    monkeypatch.chdir(tmp_path)
    for name, quick_gelu in (("quick", True), ("plain", False)):
        config = small_config(quick_gelu=quick_gelu)
        (tmp_path / f"{name}.json").write_text(json.dumps(config))
        (tmp_path / name).mkdir()
        (tmp_path / name / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
        save_file(small_clip(seed=1).state_dict(), tmp_path / name / "open_clip_model.safetensors")
    small = {"ViT-B-32": small_config(), "ViT-B-32-quickgelu": small_config(quick_gelu=True)}
    monkeypatch.setattr(factory, "get_model_config", lambda name: small[name])
    torch.save(small_clip(seed=1).state_dict(), tmp_path / "small.pt")
    return tmp_path / "small.pt"


def drop_model(arguments):
    """The arguments without --vision_model."""
    at = arguments.index("--vision_model")
    return [*arguments[:at], *arguments[at + 2 :]]


@pytest.mark.parametrize("spelling", NAMES)
def test_repeated_run_has_the_same_activation(spelling, weights, arguments, run, tmp_path):
    canonical, quick_gelu = NAMES[spelling]
    source = () if spelling.startswith("local-dir:") else ("--pretrained", weights)
    given = [*drop_model(arguments), "--vision_model", spelling, *source, "--max_steps", "1", "--no_eval_first"]
    code, out, error = run(*given)
    assert code == 0, error
    assert (f"{canonical}, QuickGELU, " in out + error) == quick_gelu
    logs = tmp_path / "logs"
    assert read_json(logs / "ex0/options.json")["vision_model"] == spelling
    assert read_json(logs / "ex0/results.json")["model"] == canonical

    # repeat it, evaluate it, and start from its weights
    code, _, error = run("--config", logs / "ex0/options.json", "--experiments", "again")
    assert code == 0, error
    code, _, error = run("--eval", "--resume", logs / "ex0/best.pt", "--experiments", "evaluated")
    assert code == 0, error
    assert read_json(logs / "evaluated/results.json")["model"] == canonical
    assert read_json(logs / "evaluated/results.json")["t2i"] == read_json(logs / "ex0/results.json")["t2i"]
    first, again = (torch.load(logs / name / "last.pt", weights_only=True) for name in ("ex0", "again"))
    assert bool(first["model_config"].get("quick_gelu")) == quick_gelu
    assert first["model_config"] == again["model_config"]
    assert all(torch.equal(again["model"][name], value) for name, value in first["model"].items())
    source = find_source(ModelOptions(vision_model=spelling, pretrained=str(logs / "ex0/best.pt")), typed_model=True)
    assert source.config == first["model_config"] and source.name == canonical


@pytest.mark.parametrize("wrapped", [False, True])
def test_file_without_a_model_name_is_said_to_be_the_default(wrapped, weights, arguments, run):
    if wrapped:
        torch.save({"state_dict": torch.load(weights)}, weights)
    code, out, error = run(*drop_model(arguments), "--pretrained", weights, "--max_steps", "1")
    assert code == 0, error
    assumed = "ViT-B/32 is assumed with QuickGELU (--vision_model ViT-B-32: with GELU)"
    assert f"{weights} does not name its model: {assumed}" in out + error


def test_file_that_has_its_model_is_said_to_decide_it(weights, arguments, run, tmp_path):
    given = [*drop_model(arguments), "--max_steps", "1", "--no_eval_first"]
    assert run(*given, "--vision_model", "plain.json")[0] == 0
    best = tmp_path / "logs/ex0/best.pt"
    code, out, error = run(*given, "--pretrained", best, "--experiments", "second")
    assert code == 0, error
    assert f"{best} decides the model: plain.json" in out + error
    assert read_json(tmp_path / "logs/second/options.json")["vision_model"] == "plain.json"
    code, _, error = run("--config", tmp_path / "logs/second/options.json", "--experiments", "third")
    assert code == 0, error


def test_folder_of_the_model_may_move(weights, arguments, run, tmp_path):
    given = [*drop_model(arguments), "--no_eval_first"]
    code, _, error = run(*given, "--vision_model", "local-dir:plain", "--epochs", "1")
    assert code == 0, error
    (tmp_path / "plain").rename(tmp_path / "moved")
    logs = tmp_path / "logs/ex0"
    results = read_json(logs / "results.json")

    # evaluate, start from the weights, resume; the new place is recorded
    code, _, error = run("--eval", "--resume", logs / "best.pt", "--experiments", "evaluated")
    assert code == 0, error
    assert read_json(tmp_path / "logs/evaluated/results.json")["t2i"] == results["t2i"]
    code, _, error = run(*given, "--pretrained", logs / "best.pt", "--epochs", "1", "--experiments", "second")
    assert code == 0, error
    for epochs, folder in enumerate(("plain", "moved"), start=2):
        resumed = ["--resume", "auto", "--vision_model", f"local-dir:{folder}", "--epochs", epochs]
        code, _, error = run(*given, *resumed)
        assert code == 0, error
        assert read_json(logs / "options.json")["vision_model"] == f"local-dir:{folder}"
    code, _, error = run("--eval", "--resume", logs / "last.pt", "--vision_model", "local-dir:moved")
    assert code == 0, error

    # another model's folder
    config = small_config(embed_dim=32)
    (tmp_path / "quick/open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    code, _, error = run(*given, "--resume", "auto", "--vision_model", "local-dir:quick", "--epochs", "4")
    assert code == 2 and f"local-dir:quick contradicts {logs / 'last.pt'}, which holds another model" in error
