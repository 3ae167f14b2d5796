"""No folder, config or checkpoint makes transformers, timm or open_clip run Python, or ask on the terminal."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import BertTokenizer

from clip_retrieval.errors import UserError
from clip_retrieval.models.build import build_model, rebuild_model
from clip_retrieval.models.hugging_face import filter_config
from clip_retrieval.models.tokenizers import WordPieceTokenizer, build_tokenizer
from clip_retrieval.options import ModelOptions
from tests.models.small import WORDS, small_config, small_simple_config

ROBERTA = {
    "model_type": "roberta",
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 40,
}
TOWER = {"hf_model_name": "roberta-base", "hf_proj_type": "linear", "context_length": 16}


@pytest.fixture
def marker(tmp_path, monkeypatch):
    """A file that the code in `evil` would create. Every question on the terminal is answered with yes."""
    path = tmp_path / "marker"
    monkeypatch.setattr("builtins.input", lambda *_: path.touch() or "y")
    yield path
    assert not path.exists()


@pytest.fixture
def evil(tmp_path, marker):
    """A folder whose configs name Python code in it, for every class that transformers can load."""
    folder = tmp_path / "evil"
    folder.mkdir()
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Evil: pass\nclass EvilConfig: pass\n")
    names = {"AutoConfig": "evil.EvilConfig", "AutoModel": "evil.Evil", "AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    (folder / "auto_map.json").write_text(json.dumps(names))
    (folder / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": names}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Evil", "auto_map": names}))
    return folder


def config_file(folder, **text):
    path = folder / "model.json"
    path.write_text(json.dumps(small_config(text_cfg={**TOWER, **text})))
    return str(path)


def refusal(path, **options):
    """Return the error message for a model config or its tokenizer."""
    with pytest.raises(UserError) as error:
        options = ModelOptions(vision_model=path, **options)
        build_tokenizer(options, build_model(options))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.slow
def test_libraries_alone_would_run_the_code(evil, marker):
    """Without our checks, these folders run their code."""
    program = f"import transformers; transformers.AutoTokenizer.from_pretrained({str(evil)!r}, trust_remote_code=True)"
    subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=300, check=False)
    assert marker.exists()
    marker.unlink()


@pytest.mark.parametrize("kind", ["evil", "roberta", None])
def test_text_tower_in_a_folder_with_code(evil, tmp_path, kind):
    config = json.loads((evil / "config.json").read_text()) | (ROBERTA if kind == "roberta" else {"model_type": kind})
    (evil / "config.json").write_text(json.dumps(config))
    path = config_file(tmp_path, hf_model_name=str(evil))
    if kind == "roberta":
        built = build_model(ModelOptions(vision_model=path))
        assert built.config["text_cfg"]["hf_config"].items() >= ROBERTA.items()
        assert "auto_map" not in json.dumps(built.config)
    else:
        assert str(evil / "config.json") in refusal(path)


@pytest.mark.parametrize("separator", ["", "--"])
def test_code_named_in_the_config_itself(evil, tmp_path, separator):
    prefix = f"{evil}{separator}" if separator else ""
    names = {"AutoConfig": f"{prefix}evil.EvilConfig", "AutoModel": f"{prefix}evil.Evil"}
    hostile = {
        "auto_map": names,
        "_name_or_path": str(evil),
        "attn_implementation": "nobody/kernels",
        "_attn_implementation": "nobody/kernels",
        "quantization_config": {"quant_method": "evil"},
        "dtype": "float16",
        "use_kernels": True,
    }
    built = build_model(ModelOptions(vision_model=config_file(tmp_path, hf_config=ROBERTA | hostile)))
    assert built.config["text_cfg"]["hf_config"] == ROBERTA
    # A checkpoint carries the same config.
    config = built.config | {"text_cfg": built.config["text_cfg"] | {"hf_config": ROBERTA | hostile}}
    again = rebuild_model(config, built.preprocess, built.clip.state_dict(), "x", "last.pt")
    assert again.config["text_cfg"]["hf_config"] == ROBERTA
    simple = small_simple_config()
    simple["text_cfg"]["hf_config"] |= hostile
    (tmp_path / "simple.json").write_text(json.dumps(simple))
    built = build_model(ModelOptions(vision_model=str(tmp_path / "simple.json")))
    assert not hostile.keys() & built.config["text_cfg"]["hf_config"].keys()


def test_unknown_model_type_is_refused():
    for config in ({"model_type": "gpt2"}, {}, [], {"model_type": ["bert"]}):
        with pytest.raises(UserError, match=r"x\.json: unknown model_type"):
            filter_config(config, "x.json")


@pytest.mark.parametrize("remove", [[], ["config.json"], ["tokenizer_config.json"]])
def test_tokenizer_folder_with_code(evil, tmp_path, remove):
    for name in remove:
        (evil / name).unlink()
    path = config_file(tmp_path, hf_config=ROBERTA, hf_tokenizer_name=str(evil))
    assert str(evil) in refusal(path)
    path = config_file(tmp_path, hf_config=ROBERTA, hf_tokenizer_name="roberta-base")
    message = refusal(path, tokenizer=str(evil))
    assert str(evil) in message
    if not remove:
        assert f"the tokenizer {evil} needs its own Python code" in message


def test_word_piece_folder_with_code(evil, tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "saved")
    (evil / "tokenizer.json").write_bytes((tmp_path / "saved" / "tokenizer.json").read_bytes())
    with pytest.raises(UserError, match=f"the tokenizer {evil} needs its own Python code"):
        WordPieceTokenizer(str(evil), 7, len(WORDS))


def test_local_folder_with_code_beside_its_open_clip_config(evil, tmp_path):
    content = {"model_cfg": small_config(text_cfg={**TOWER, "hf_config": ROBERTA, "hf_tokenizer_name": "x/y"})}
    (evil / "open_clip_config.json").write_text(json.dumps(content))
    options = ModelOptions(vision_model=f"local-dir:{evil}", pretrained="none")
    with pytest.raises(UserError, match=f"{evil}"):
        build_tokenizer(options, build_model(options))


@pytest.mark.parametrize(
    "arguments",
    [
        {"trust_remote_code": True},
        {"cache_dir": "/tmp"},
        {"config": {}},
        {"tokenizer_file": "x.json"},
        {"gguf_file": "x.gguf"},
        {"bpe_path": "/dev/zero"},
        {"additional_special_tokens": ["(a+)+$"]},
        {"clean": "eval"},
        {"reduction_mask": "syntax"},
        {"strip_sep_token": "yes"},
        ["clean"],
    ],
)
@pytest.mark.parametrize("text", [{"hf_config": ROBERTA, "hf_tokenizer_name": "roberta-base"}, None])
def test_unknown_tokenizer_arguments_are_refused(tmp_path, arguments, text):
    path = tmp_path / "model.json"
    config = small_config()
    config["text_cfg"] = {**(TOWER | text if text else config["text_cfg"]), "tokenizer_kwargs": arguments}
    path.write_text(json.dumps(config))
    message = refusal(str(path))
    assert str(path) in message and "tokenizer_kwargs" in message


def test_known_tokenizer_arguments_are_used(tmp_path):
    path = tmp_path / "model.json"
    config = small_config()
    config["text_cfg"]["tokenizer_kwargs"] = {"clean": "canonicalize"}
    path.write_text(json.dumps(config))
    options = ModelOptions(vision_model=str(path))
    tokenizer = build_tokenizer(options, build_model(options))
    assert torch.equal(tokenizer(["A dog!"]), tokenizer(["a dog"]))


@pytest.mark.parametrize(
    "name", ["local-dir:{}", "hf-hub:{}", "hf_hub:x/y", "timm/{}", "{}", "no_such_model", "test_vit:x"]
)
def test_image_tower_must_be_a_timm_model(evil, tmp_path, name):
    (evil / "config.json").write_text(json.dumps({"architecture": "test_vit", "model_args": {"checkpoint_path": "x"}}))
    path = tmp_path / "model.json"
    path.write_text(json.dumps(small_config(vision_cfg={"timm_model_name": name.format(evil), "image_size": 160})))
    assert "not a timm model" in refusal(str(path))


def test_fifo_in_a_tokenizer_folder_is_named(tmp_path):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    os.mkfifo(folder / "tokenizer_config.json")
    path = config_file(tmp_path, hf_config=ROBERTA, hf_tokenizer_name=str(folder))
    assert f"{folder}/tokenizer_config.json is not a regular file" in refusal(path)
