"""LoRA adapters go to peft and come back with the features of peft."""

import json

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file

from clip_retrieval import load_model
from clip_retrieval.errors import UserError
from clip_retrieval.export.export import export
from clip_retrieval.files import read_json
from tests.models.test_transformers_models import CAPTIONS, chinese_clip, clip, save_tokenizer, siglip

peft = pytest.importorskip("peft", reason="peft is not installed")
MODELS = {"CLIP": clip, "Siglip": siglip, "ChineseCLIP": chinese_clip}


@pytest.fixture
def start(tmp_path):
    """start(kind) saves a random model of transformers and returns its folder."""

    def save(kind):
        folder = tmp_path / "start"
        MODELS[kind]().save_pretrained(folder)
        transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
        if kind == "Siglip":
            (folder / "preprocessor_config.json").unlink()
            save_tokenizer(folder)
        if kind == "ChineseCLIP":
            words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"##{number}" for number in range(85))]
            (folder / "vocab.txt").write_text("\n".join(words) + "\n")
        return folder

    return save


def pixels_and_ids(model):
    generator = torch.Generator().manual_seed(0)
    size = model.model.preprocess["size"]
    pixels = torch.randn(3, 3, size, size, generator=generator)
    return pixels, model.tokenizer(CAPTIONS).long()


@torch.no_grad()
def our_features(model):
    pixels, ids = pixels_and_ids(model)
    text = model.model.clip.encode_text(ids)
    return F.normalize(model.model.clip.encode_image(pixels), dim=-1), F.normalize(text, dim=-1)


@torch.no_grad()
def peft_features(base, adapter, model):
    """Features of an adapted model of transformers, for the inputs of ours."""
    pixels, ids = pixels_and_ids(model)
    adapted = transformers.AutoModel.from_pretrained(base)
    peft.PeftModel.from_pretrained(adapted, str(adapter))
    adapted.eval()
    mask = {"attention_mask": (ids != 0).long()} if "Chinese" in type(adapted).__name__ else {}
    images = adapted.get_image_features(pixel_values=pixels).pooler_output
    texts = adapted.get_text_features(input_ids=ids, **mask).pooler_output
    return F.normalize(images, dim=-1), F.normalize(texts, dim=-1)


def assert_same(found, expected, tolerance=1e-5):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def adapt(folder, output, rename=None, **config):
    """Make an adapter of peft for the model in a folder, with random A and B."""
    model = transformers.AutoModel.from_pretrained(folder)
    config = {"r": 4, "target_modules": ["q_proj", "fc1"], **config}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**config))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    adapted.save_pretrained(output)
    return output


def without_model(arguments):
    place = arguments.index("--vision_model")
    return [*arguments[:place], *arguments[place + 2 :]]


def train_lora(run, arguments, *extra):
    code, _, err = run(*arguments, "--trainable", "lora", "--lr", "0.05", "--max_steps", "3", "--no_eval_first", *extra)
    assert code == 0, err


@pytest.mark.parametrize(
    "kind, targets", [("CLIP", "all"), ("Siglip", "all"), ("Siglip", "mlp"), ("ChineseCLIP", "attention")]
)
def test_exported_adapter_gives_our_features_in_peft(kind, targets, start, run, arguments, tmp_path, no_network):
    folder = start(kind)
    train_lora(run, arguments, "--vision_model", f"local-dir:{folder}", "--lora_targets", targets, "--lora_alpha", "4")
    last, out = tmp_path / "logs/ex0/last.pt", tmp_path / "out"
    assert export(last, out, "peft") < 1e-5
    ours = load_model(last, "cpu")
    assert read_json(out / "adapter_config.json")["base_model_name_or_path"] == str(folder)
    assert not (out / "base").exists()
    assert_same(peft_features(folder, out, ours), our_features(ours))
    start_model = load_model(f"local-dir:{folder}", "cpu")
    assert not torch.allclose(our_features(start_model)[0], our_features(ours)[0], atol=1e-3)
    assert_same(our_features(load_adapter(out, folder)), our_features(ours))


def test_adapter_of_another_start_has_its_base_beside_it(run, arguments, tmp_path, no_network):
    train_lora(run, arguments, "--unlocked_image_blocks", "1")
    last, out = tmp_path / "logs/ex0/last.pt", tmp_path / "out"
    export(last, out, "peft")
    ours = load_model(last, "cpu")
    base = read_json(out / "adapter_config.json")["base_model_name_or_path"]
    assert base == str(out / "base")
    assert_same(peft_features(base, out, ours), our_features(ours))
    # moved together, it is read here
    out.rename(tmp_path / "moved")
    code, _, err = run(*without_model(arguments), "--eval", "--pretrained", tmp_path / "moved")
    assert code == 0, err
    assert_same(our_features(load_adapter(tmp_path / "moved", tmp_path / "moved/base")), our_features(ours))


def load_adapter(adapter, base):
    return load_model(f"local-dir:{base}", "cpu", pretrained=str(adapter))


def test_reset_optimizer_changes_the_base(start, run, arguments, tmp_path, no_network):
    folder = start("CLIP")
    command = (*arguments, "--trainable", "lora", "--lr", "0.05", "--vision_model", f"local-dir:{folder}")
    run(*command, "--max_steps", "2")
    code, _, err = run(*command, "--max_steps", "4", "--resume", "auto", "--reset_optimizer")
    assert code == 0, err
    out = tmp_path / "out"
    assert export(tmp_path / "logs/ex0/last.pt", out, "peft") < 1e-5
    assert read_json(out / "adapter_config.json")["base_model_name_or_path"] == str(out / "base")


def test_checkpoint_without_an_adapter_is_refused(run, arguments, tmp_path):
    train_lora(run, arguments)
    with pytest.raises(UserError, match=r"best\.pt has only merged weights\); give the last\.pt of a run"):
        export(tmp_path / "logs/ex0/best.pt", tmp_path / "out", "peft")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "kind, config",
    [
        ("CLIP", {}),
        ("CLIP", {"use_rslora": True, "lora_alpha": 3}),
        ("CLIP", {"alpha_pattern": {"layers.1.mlp.fc1": 2, "q_proj": 5}, "rank_pattern": {"fc1": 2}}),
        ("CLIP", {"modules_to_save": ["visual_projection"], "target_modules": ["patch_embedding", "out_proj"]}),
        ("CLIP", {"target_modules": "all-linear", "fan_in_fan_out": True}),
        ("Siglip", {"target_modules": ["vision_model.head.mlp.fc1", "v_proj"]}),
        ("ChineseCLIP", {"target_modules": ["query", "dense", "k_proj"]}),
    ],
)
def test_adapter_of_peft_is_read_with_its_features(kind, config, start, tmp_path, no_network):
    folder = start(kind)
    adapter = adapt(folder, tmp_path / "adapter", **config)
    ours = load_adapter(adapter, folder)
    assert_same(our_features(ours), peft_features(folder, adapter, ours))
    assert not torch.allclose(
        our_features(load_model(f"local-dir:{folder}", "cpu"))[0], our_features(ours)[0], atol=1e-3
    )


@pytest.mark.parametrize("file", ["", "adapter_model.safetensors", "adapter_model.bin"])
def test_base_model_is_that_of_the_adapter(file, start, run, arguments, tmp_path, no_network):
    folder, adapter = start("CLIP"), tmp_path / "adapter"
    adapt(folder, adapter)
    config = read_json(adapter / "adapter_config.json")
    assert config["base_model_name_or_path"] == str(folder)
    if file.endswith("bin"):
        torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / file)
        (adapter / "adapter_model.safetensors").unlink()
    train = ("--pretrained", adapter / file, "--max_steps", "1", "--lr", "1e-9", "--experiments", "from")
    code, _, err = run(*without_model(arguments), *train)
    assert code == 0, err
    expected = our_features(load_adapter(adapter, folder))
    assert_same(our_features(load_model(tmp_path / "logs/from/last.pt", "cpu")), expected)


def test_multihead_attention_that_peft_adds_twice_is_refused(start, tmp_path, no_network):
    folder = start("Siglip")
    adapter = adapt(folder, tmp_path / "adapter", target_modules=["head.attention"])
    with pytest.raises(UserError, match=r"adapts an nn\.MultiheadAttention, which is not supported"):
        load_adapter(adapter, folder)


BAD = {
    "another kind": ({"peft_type": "IA3"}, "peft_type is 'IA3', not one of LORA"),
    "dora": ({"use_dora": True}, "use_dora is not supported; merge the adapter with peft first"),
    "bias": ({"bias": "all"}, "bias is 'all', not one of none"),
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
    "a field of the future": ({"use_magic": True}, "use_magic is not supported"),
    "a pattern": ({"alpha_pattern": {"(a+)+$": 2}}, "alpha_pattern has a pattern that is no name"),
    "alpha as text": ({"lora_alpha": "8"}, "lora_alpha is '8', not a finite number"),
    "alpha of infinity": ({"lora_alpha": float("inf")}, "lora_alpha is inf, not a finite number"),
    "no base": ({"base_model_name_or_path": None}, "its base model (not named) is missing; give it as --vision_model"),
    "a base with a long name": ({"base_model_name_or_path": "a/" * 5000}, "its base model (a/a/a/"),
    "a missing base": ({"base_model_name_or_path": "/no/such"}, "its base model (/no/such) is missing"),
}


@pytest.mark.parametrize("case", BAD)
def test_unsupported_or_hostile_config_is_refused_in_one_line(case, start, run, arguments, tmp_path, no_network):
    change, words = BAD[case]
    adapter = adapt(start("CLIP"), tmp_path / "adapter")
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(read_json(path) | change))
    code, _, err = run("--eval", "--dataset", "shapes", "--pretrained", adapter)
    assert code == 2 and words in err and err.count("\n") == 1, err


TENSORS = {
    "another shape": lambda t: t | {next(iter(t)): torch.ones(4, 7)},
    "rank 0": lambda t: {name: value[:0] if "lora_A" in name else value[:, :0] for name, value in t.items()},
    "one number": lambda t: t | {next(iter(t)): torch.ones(())},
    "whole numbers": lambda t: {name: value.long() for name, value in t.items()},
    "only A": lambda t: {name: value for name, value in t.items() if "lora_A" in name},
    "only B": lambda t: {name: value for name, value in t.items() if "lora_B" in name},
    "an unknown layer": lambda t: {name.replace("q_proj", "x_proj"): value for name, value in t.items()},
    "an embedding": lambda t: t | {"base_model.model.text_model.embeddings.lora_embedding_A": torch.ones(4, 4)},
    "not finite": lambda t: {name: value * float("nan") for name, value in t.items()},
    "none": lambda t: {},
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_do_not_fit_are_refused_in_one_line(case, start, tmp_path, no_network):
    from safetensors.torch import save_file

    folder = start("CLIP")
    adapter = adapt(folder, tmp_path / "adapter")
    path = adapter / "adapter_model.safetensors"
    save_file(TENSORS[case](load_file(path)), path)
    with pytest.raises(UserError) as error:
        load_adapter(adapter, folder)
    assert str(adapter) in str(error.value) and "\n" not in str(error.value)
