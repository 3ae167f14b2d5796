"""Features equal Chinese-CLIP's own code, if cn-clip is installed (pip install --no-deps cn-clip six)."""

import pytest
import torch
import torch.nn.functional as F

from clip_retrieval.models.build import build_model
from clip_retrieval.models.towers import RetrievalModel
from clip_retrieval.options import ModelOptions

BERT = {
    "vocab_size": 100,
    "text_attention_probs_dropout_prob": 0.1,
    "text_hidden_act": "gelu",
    "text_hidden_dropout_prob": 0.1,
    "text_initializer_range": 0.02,
    "text_max_position_embeddings": 64,
    "text_type_vocab_size": 2,
}
RBT3 = {"text_hidden_size": 768, "text_intermediate_size": 3072, "text_num_attention_heads": 12}
LARGE = {"text_hidden_size": 1024, "text_intermediate_size": 4096, "text_num_attention_heads": 16}
RN50 = {"vision_layers": [3, 4, 6, 3], "vision_width": 64, "vision_patch_size": None, "image_resolution": 64}
VIT_H = {"vision_layers": 2, "vision_width": 1280, "vision_patch_size": 14, "image_resolution": 28}


@pytest.mark.slow
@pytest.mark.parametrize(
    "vision, text",
    [
        (RN50, RBT3 | {"text_num_hidden_layers": 3}),
        (VIT_H | {"vision_head_width": 80}, LARGE | {"text_num_hidden_layers": 2}),
    ],
    ids=["RN50 with RBT3", "ViT-H with RoBERTa-large, shallow"],
)
def test_features_equal_cn_clip(vision, text, tmp_path):
    reference = pytest.importorskip("cn_clip.clip.model", reason="cn-clip is not installed")
    torch.manual_seed(0)
    theirs = reference.CLIP(embed_dim=1024, **vision, **BERT, **text).eval()
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.1, 0.1)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    state = {f"module.{name}": value for name, value in theirs.state_dict().items()}
    torch.save({"epoch": 0, "step": 0, "name": "x", "state_dict": state}, tmp_path / "clip_cn.pt")

    built = build_model(ModelOptions(pretrained=str(tmp_path / "clip_cn.pt")))
    ours = RetrievalModel(built.clip, built.preprocess).eval()
    size = vision["image_resolution"]
    images = torch.randint(0, 256, (3, 3, size, size), dtype=torch.uint8)
    ids = torch.randint(5, 100, (4, 12))
    ids[1, 7:] = ids[2, 3:] = 0
    with torch.no_grad():
        pixels = (images / 255 - ours.mean) / ours.std
        expected = (F.normalize(f, dim=-1) for f in (theirs.encode_image(pixels), theirs.encode_text(ids)))
        for feature, reference_feature in zip((ours.encode_image(images), ours.encode_text(ids)), expected):
            assert feature.std(0).min() > 0
            torch.testing.assert_close(feature, reference_feature, atol=1e-5, rtol=0)
