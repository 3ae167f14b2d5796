import open_clip
import torch

from clip_retrieval.models.towers import RetrievalModel
from clip_retrieval.options import TrainOptions
from clip_retrieval.training.optimizer import make_optimizer, parameter_groups
from tests.models.small import small_clip, small_preprocess


def group_names(model):
    names = {p: n for n, p in model.named_parameters()}
    return [{names[p] for p in group["params"]} for group in parameter_groups(model, 0.2)]


def test_vit_norms_biases_scale_and_embeddings_have_no_decay():
    decayed, exempt = group_names(RetrievalModel(small_clip(), small_preprocess()))
    assert {
        "clip.logit_scale",
        "clip.positional_embedding",
        "clip.visual.class_embedding",
        "clip.visual.positional_embedding",
        "clip.visual.ln_pre.weight",
        "clip.ln_final.weight",
        "clip.transformer.resblocks.0.attn.in_proj_bias",
        "clip.transformer.resblocks.0.ln_1.weight",
    } <= exempt
    assert {
        "clip.visual.proj",
        "clip.text_projection",
        "clip.visual.conv1.weight",
        "clip.token_embedding.weight",
        "clip.transformer.resblocks.0.attn.in_proj_weight",
    } <= decayed


def test_resnet_batch_norms_have_no_decay_under_any_name():
    model = RetrievalModel(small_clip(resnet=True), small_preprocess())
    decayed, exempt = group_names(model)
    assert "clip.visual.bn1.weight" in exempt
    assert "clip.visual.layer1.0.downsample.1.weight" in exempt  # a BatchNorm2d without bn in its name
    assert "clip.visual.layer1.0.downsample.0.weight" in decayed


def test_adamw_has_the_options_and_only_trainable_parameters():
    model = RetrievalModel(small_clip(), small_preprocess())
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name == "clip.visual.proj"
    options = TrainOptions(lr=3e-4, beta1=0.8, beta2=0.95, eps=1e-7, weight_decay=0.05)
    optimizer = make_optimizer(model, options, torch.device("cpu"))
    (group,) = optimizer.param_groups
    assert group["params"] == [model.clip.visual.proj]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (3e-4, (0.8, 0.95), 1e-7, 0.05)


def test_no_weight_decay_list_of_open_clip_is_covered():
    clip = small_clip()
    _, exempt = group_names(RetrievalModel(clip, small_preprocess()))
    assert {f"clip.{name}" for name in open_clip.CLIP.no_weight_decay(clip)} <= exempt
