"""Ten float64 steps compared with open_clip's loss, schedule, parameter groups and clamp."""

import math

import open_clip
import pytest
import torch
from open_clip.loss import ClipLoss
from open_clip_train.scheduler import cosine_lr

from clip_retrieval.data.batches.loader import TrainBatch
from clip_retrieval.models.towers import RetrievalModel
from clip_retrieval.options import LossOptions, TrainOptions
from clip_retrieval.training.optimizer import parameter_groups
from clip_retrieval.training.schedule import learning_rate
from clip_retrieval.training.trainer import Trainer
from tests.models.small import TEXT, small_clip, small_config, small_preprocess, token_ids

STEPS, WARMUP, PAIRS = 10, 3, 8
OPTIONS = {"lr": 3e-3, "beta1": 0.9, "beta2": 0.98, "eps": 1e-6, "weight_decay": 0.2}
# open_clip decays these; CLIP's own rule, and ours, does not.
EMBEDDINGS = ("positional_embedding", "class_embedding", "pos_embed", "cls_token")


def open_clip_exempts(name, parameter):
    """The rule in open_clip_train/main.py, which has no function for it."""
    return parameter.ndim < 2 or any(part in name for part in ("bn", "ln", "bias", "logit_scale"))


def make_batches():
    generator = torch.Generator().manual_seed(3)
    for step in range(STEPS):
        images = torch.randint(0, 256, (PAIRS, 3, 16, 16), dtype=torch.uint8, generator=generator)
        lengths = 3 + (torch.arange(PAIRS) + step) % 10
        yield images, token_ids(lengths.tolist()), lengths


def train_as_open_clip(clip):
    """Train on the batches with open_clip's loop; return the loss of each step."""
    named = list(clip.named_parameters())
    exempt = {n for n, p in named if open_clip_exempts(n, p) or n.rpartition(".")[2] in EMBEDDINGS}
    groups = [
        {"params": [p for n, p in named if n in exempt], "weight_decay": 0.0},
        {"params": [p for n, p in named if n not in exempt], "weight_decay": OPTIONS["weight_decay"]},
    ]
    betas = OPTIONS["beta1"], OPTIONS["beta2"]
    optimizer = torch.optim.AdamW(groups, lr=OPTIONS["lr"], betas=betas, eps=OPTIONS["eps"])
    scheduler, loss_of = cosine_lr(optimizer, OPTIONS["lr"], WARMUP, STEPS), ClipLoss()
    # Mean and deviation are float32 constants of the model.
    mean, std = (torch.tensor(small_preprocess()[name]).double().view(3, 1, 1) for name in ("mean", "std"))
    losses = []
    for step, (images, texts, _) in enumerate(make_batches()):
        scheduler(step)
        optimizer.zero_grad()
        pixels = (images.double() / 255 - mean) / std
        loss = loss_of(*clip(pixels, texts)[:3])
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            clip.logit_scale.clamp_(0, math.log(100))
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("options", [{}, {"grad_cache": 3}])
@pytest.mark.parametrize("logit_scale", [2.6, 5.0, -0.5])
def test_ten_steps_equal_those_of_open_clip(options, logit_scale, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # keep features in float64 too
    ours, theirs = (small_clip().double() for _ in range(2))
    for clip in (ours, theirs):
        clip.logit_scale.data.fill_(logit_scale)
    expected = train_as_open_clip(theirs.train())

    model = RetrievalModel(ours, small_preprocess()).double().train()
    settings = TrainOptions(**OPTIONS, **options)
    trainer = Trainer(model, LossOptions(), settings, precision="fp32", device=torch.device("cpu"))
    positives = torch.eye(PAIRS).nonzero()
    for step, (images, texts, lengths) in enumerate(make_batches()):
        rate = learning_rate(step, peak=OPTIONS["lr"], warmup_steps=WARMUP, total_steps=STEPS)
        result = trainer.step(TrainBatch(images, texts, positives, lengths), step + 1, rate)
        assert result.loss.dtype == torch.float64
        assert result.loss.item() == pytest.approx(expected[step], rel=0, abs=1e-12)
        assert 0 <= model.clip.logit_scale.item() <= math.log(100)
    reference = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        difference = (parameter - reference[name]).detach().abs()
        if name.endswith("in_proj_bias"):
            # The bias of the keys has no gradient (softmax is invariant to it); AdamW divides rounding by 1e-6.
            _, keys, _ = difference.chunk(3)
            assert keys.max() < 1e-9, name
            keys.zero_()
        assert difference.max() < 1e-11, name


def make_model(kind):
    if kind == "vit":
        config = small_config()
        config["vision_cfg"]["ls_init_value"] = 0.1  # LayerScale
        return open_clip.CLIP(**config)
    if kind == "resnet":
        return small_clip(resnet=True)
    vision = {"timm_model_name": kind, "timm_model_pretrained": False, "image_size": 32, "timm_proj": "linear"}
    return open_clip.CustomTextCLIP(embed_dim=24, vision_cfg=vision, text_cfg=TEXT)


@pytest.mark.parametrize("kind", ["vit", "resnet", "convnext_atto", "vit_tiny_patch16_224", "resnet18"])
def test_weight_decay_follows_the_rule_of_open_clip(kind):
    clip = make_model(kind)
    names = {parameter: name for name, parameter in clip.named_parameters()}
    decayed, exempt = ({names[p] for p in group["params"]} for group in parameter_groups(clip, 0.2))
    expected = {name for name, parameter in clip.named_parameters() if open_clip_exempts(name, parameter)}
    assert not decayed & expected
    assert all(name.rpartition(".")[2] in EMBEDDINGS for name in exempt - expected)
    assert all(clip.get_parameter(name).ndim >= 2 for name in decayed)
    if kind in ("vit", "convnext_atto"):
        assert any("gamma" in name for name in exempt)  # LayerScale's
