"""Checkpoints of small random models of each architecture that can be exported."""

import json

import pytest
import timm
import torch
from timm.models import register_model
from timm.models.vision_transformer import _create_vision_transformer, default_cfgs

from clip_retrieval.models.build import build_model
from clip_retrieval.models.checkpoint import Checkpoint
from clip_retrieval.models.tokenizers import build_tokenizer, keep_vocabulary
from clip_retrieval.options import ModelOptions
from tests.models import test_chinese_clip as chinese
from tests.models.conftest import no_network  # noqa: F401
from tests.models.small import TEXT, VIT, small_config, small_preprocess
from tests.models.test_remote_code import ROBERTA, TOWER

WORDS = ["<unk>", "<pad>", "</s>", "a", "photo", "of", "two", "dogs", "cat", "its", "at", "clock", "bird", "10", "o"]


def small_siglip_vit(pretrained=False, **options):
    """SigLIP's image tower with a few thousand parameters."""
    sizes = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    return _create_vision_transformer("small_siglip_vit", **sizes, class_token=False, **{"img_size": 16, **options})


def tokenizer_folder(folder, **special):
    """A folder with a word tokenizer of transformers."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "</s>"} | special
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def configs(tmp_path_factory):
    """Model configs and changes of the preprocessing, by kind."""
    if "small_siglip_vit" not in timm.list_models():
        default_cfgs["small_siglip_vit"] = default_cfgs["vit_base_patch16_siglip_224"]
        register_model(small_siglip_vit)
    words = tokenizer_folder(tmp_path_factory.mktemp("words"))
    siglip = {"timm_model_name": "small_siglip_vit", "image_size": 16, "timm_pool": "map", "timm_proj": "none"}
    siglip_text = {**TEXT, "vocab_size": 40, "no_causal_mask": True, "proj_bias": True, "pool_type": "last"}
    siglip_text |= {"hf_tokenizer_name": words, "tokenizer_kwargs": {"clean": "canonicalize"}}
    roberta = {**TOWER, "hf_config": ROBERTA, "hf_tokenizer_name": words}
    return {
        "clip": (small_config(), {}),
        "quick_gelu": (small_config(quick_gelu=True, custom_text=True), {"resize_mode": "squash"}),
        "bias": (small_config(init_logit_bias=-10), {"interpolation": "bilinear"}),
        "mlp": (small_config(vision_cfg={**VIT, "mlp_ratio": 3.0, "head_width": 32}), {"mean": [0.5] * 3}),
        "resnet": (small_config(True), {"size": 32}),
        "wide": (small_config(vision_cfg={**VIT, "image_size": [16, 24]}), {"size": [16, 24], "resize_mode": "squash"}),
        "average": (small_config(vision_cfg={**VIT, "pool_type": "avg"}), {}),
        "siglip": (
            small_config(embed_dim=32, vision_cfg=siglip, text_cfg=siglip_text, custom_text=True, init_logit_bias=-10),
            {"resize_mode": "squash", "mean": [0.5] * 3, "std": [0.5] * 3},
        ),
        "roberta": (small_config(text_cfg=roberta, custom_text=True), {}),
    }


@pytest.fixture
def saved(configs, tmp_path):
    """saved(kind) saves a checkpoint of a random model of this kind and returns its path and its open_clip module."""

    def save(kind, **changes):
        if kind == "chinese":
            built = build_model(ModelOptions(pretrained=str(chinese.checkpoint(tmp_path))))
            (tmp_path / "vocab.txt").write_text("\n".join(chinese.WORDS) + "\n", encoding="utf-8")
            words = ModelOptions(tokenizer=str(tmp_path / "vocab.txt"))
            keep_vocabulary(built.config, build_tokenizer(words, built))
            clip, config, preprocess = built.clip, built.config, built.preprocess
        else:
            config, preprocess = configs[kind]
            (tmp_path / "model.json").write_text(json.dumps(config))
            torch.manual_seed(1)
            built = build_model(ModelOptions(vision_model=str(tmp_path / "model.json"), pretrained="none"))
            clip, config, preprocess = built.clip, built.config, small_preprocess() | preprocess
        for parameter in clip.parameters():  # small initial values would hide differences
            if parameter.ndim < 2:
                torch.nn.init.normal_(parameter, std=0.3)
        content = {"options": {"vision_model": "small"}, "epoch": 1, "step": 3, **changes}
        model = {**clip.state_dict(), **content.pop("model", {})}
        path = tmp_path / "best.pt"
        Checkpoint(model=model, model_config=config, preprocess=preprocess, **content).save(path)
        return path, clip

    return save
