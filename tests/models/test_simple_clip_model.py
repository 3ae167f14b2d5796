import copy

import pytest
import torch
from torch import nn
from torchvision import models
from transformers import DistilBertConfig, DistilBertModel

from clip_retrieval.data.batches.loader import TrainBatch
from clip_retrieval.models.batch_norm import freeze_statistics
from clip_retrieval.models.simple_clip_model import CLASSIFIERS, DistilBertTower, SimpleCLIP, TorchvisionTower
from clip_retrieval.models.towers import RetrievalModel
from clip_retrieval.options import LossOptions, TrainOptions
from clip_retrieval.training.trainer import Trainer
from tests.models.small import small_preprocess, small_simple_clip, small_simple_config

LENGTHS = (4, 9, 2)
IDS = torch.zeros(3, 16, dtype=torch.long)
for row, length in enumerate(LENGTHS):
    IDS[row, :length] = 2 + (torch.arange(length) * 5 + row) % 11


def project(features, head):
    """Apply a projection head to features by hand."""
    return (features @ head[0].weight.T).clamp(min=0) @ head[2].weight.T


def test_text_features_are_the_projected_mean_of_hidden_states():
    hf_config = small_simple_config()["text_cfg"]["hf_config"]
    reference = DistilBertModel(DistilBertConfig(**{k: v for k, v in hf_config.items() if k != "model_type"})).eval()
    tower = DistilBertTower(hf_config, 24).eval()
    tower.transformer.load_state_dict(reference.state_dict())
    with torch.no_grad():
        features = tower(IDS)
        for row, length in enumerate(LENGTHS):
            alone = reference(IDS[row : row + 1, :length]).last_hidden_state[0]
            torch.testing.assert_close(
                features[row], project(sum(alone) / length, tower.proj), rtol=0, atol=1e-6, msg=f"row {row}"
            )
    assert features.shape == (3, 24)


def test_trimmed_text_gives_the_same_features():
    model = RetrievalModel(small_simple_clip(), small_preprocess()).eval()
    assert model.trims_text
    with torch.no_grad():
        whole = model.encode_text(IDS)
        torch.testing.assert_close(model.encode_text(IDS[:, :9]), whole, rtol=0, atol=1e-6)
        torch.testing.assert_close(model.encode_text(IDS[2:, :2]), whole[2:], rtol=0, atol=1e-6)
        # Without the mask the padding would count.
        hidden = model.clip.text.transformer(IDS).last_hidden_state.mean(1)
        assert (project(hidden, model.clip.text.proj) - model.clip.text(IDS)).abs().max() > 1e-3


def test_caption_of_padding_alone_has_finite_features():
    assert small_simple_clip().text(torch.zeros(1, 4, dtype=torch.long)).isfinite().all()


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_image_features_are_the_projected_input_of_the_classifier(name):
    reference = getattr(models, name)(weights=None).eval()
    tower = TorchvisionTower(name, 24).eval()
    classifier = CLASSIFIERS[name]
    tower.trunk.load_state_dict({k: v for k, v in reference.state_dict().items() if not k.startswith(classifier)})
    seen = {}
    getattr(reference, classifier).register_forward_pre_hook(lambda module, args: seen.update(pooled=args[0]))
    images = torch.randn(2, 3, 40, 40)
    with torch.no_grad():
        features = tower(images)
        reference(images)
        torch.testing.assert_close(features, project(seen["pooled"], tower.head), rtol=0, atol=1e-6)
    assert features.shape == (2, 24)
    assert tower.head[0].weight.shape == (seen["pooled"].shape[1],) * 2
    assert not any(layer.bias is not None for layer in tower.head if isinstance(layer, nn.Linear))


def tower_of(name):
    """A tower in training mode and its input; dropout and stochastic depth are seeded."""
    if name == "distilbert":
        return DistilBertTower(small_simple_config(dropout=0.1)["text_cfg"]["hf_config"], 24).train(), IDS
    return TorchvisionTower(name, 24).train(), torch.randn(3, 3, 40, 40)


@pytest.mark.parametrize("name", [*CLASSIFIERS, "distilbert"])
def test_grad_checkpointing_keeps_gradients_and_batch_statistics(name):
    torch.manual_seed(0)
    plain, inputs = tower_of(name)
    recomputing = copy.deepcopy(plain)
    recomputing.set_grad_checkpointing()
    saved = {}
    for tower in (plain, recomputing):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x.numel()) or x, lambda x: x):
            torch.manual_seed(1)
            output = tower(inputs)
        with freeze_statistics(tower):  # as the trainer does
            output.square().sum().backward()
        saved[tower] = sum(kept)
    assert saved[recomputing] < 0.7 * saved[plain]
    for (key, a), (_, b) in zip(plain.named_parameters(), recomputing.named_parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-5, atol=1e-5 * a.grad.abs().max().item(), msg=key)
    for (key, a), (_, b) in zip(plain.named_buffers(), recomputing.named_buffers(), strict=True):
        if not key.endswith("num_batches_tracked"):  # nothing depends on it
            assert torch.equal(a, b), key
    recomputing.set_grad_checkpointing(False)
    assert not getattr(recomputing, "grad_checkpointing", False)


@pytest.mark.parametrize("loss, highest", [("infonce", 100), ("siglip", 150)])
def test_infonce_clamps_the_logit_scale_at_100(loss, highest):
    clip = small_simple_clip(vocabulary=100)
    clip.logit_scale.data.fill_(torch.tensor(150.0).log())
    model = RetrievalModel(clip, small_preprocess(32))
    trainer = Trainer(model, LossOptions(loss=loss), TrainOptions(), precision="fp32", device=torch.device("cpu"))
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    model.train()
    if loss == "siglip":
        clip.logit_bias = nn.Parameter(torch.tensor(-10.0))
    trainer.step(TrainBatch(images, IDS, torch.eye(3).nonzero()), 1, 1e-5)
    assert clip.logit_scale.exp().item() == pytest.approx(highest, rel=1e-4)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"vision_cfg": {"torchvision_model_name": "vgg11"}}, "vgg11, not one of resnet18"),
        ({"vision_cfg": {"torchvision_model_name": "resnet18", "layers": 3}}, "DistilBERT tower: layers"),
        ({"text_cfg": {"width": 3}}, "DistilBERT tower: width"),
        ({"text_cfg": {}}, "model_type distilbert"),
        ({"text_cfg": {"hf_config": {"model_type": "bert"}}}, "model_type distilbert"),
        ({"text_cfg": small_simple_config()["text_cfg"] | {"context_length": 33}}, "more than the 32 positions"),
    ],
)
def test_config_of_another_model_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        SimpleCLIP(**small_simple_config() | changes)
