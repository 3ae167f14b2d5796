import pytest
import torch

from clip_retrieval.data.batches.loader import TrainBatch
from clip_retrieval.models.grad_checkpointing import enable_grad_checkpointing
from clip_retrieval.models.towers import RetrievalModel
from clip_retrieval.models.trainable import set_trainable
from clip_retrieval.options import LossOptions, TrainOptions
from clip_retrieval.training.trainer import Trainer
from tests.models.small import small_clip, small_preprocess, small_towers, token_ids

SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("eva", "pe")]
KINDS = ["vit", "custom text", "resnet", "hugging face", "simple-clip"]
KINDS += ["timm", "timm mlp", "mobileclip", "mobileclip-b", *SLOW]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grad_cache", [None, 2])
def test_gradients_and_batch_statistics_stay_the_same(kind, grad_cache, caplog):
    found = {recomputes: gradients(kind, recomputes, grad_cache) for recomputes in (False, True)}
    (plain, statistics, kept), (recomputed, other_statistics, fewer) = found[False], found[True]
    assert not caplog.messages
    assert fewer < 0.8 * kept
    for name, gradient in plain.items():
        atol = 1e-6 * max(gradient.abs().max().item(), 1e-3)
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-6, atol=atol, msg=name)
    for name, value in statistics.items():
        assert torch.equal(other_statistics[name], value), name


def gradients(kind, recomputes, grad_cache):
    """One step of the trainer: gradients, buffers, and the numbers that it keeps for the backward pass."""
    torch.manual_seed(0)
    clip, size = small_towers(kind)
    model = RetrievalModel(clip, small_preprocess(size)).train()
    options = TrainOptions(grad_checkpointing=recomputes, grad_cache=grad_cache)
    if recomputes:
        enable_grad_checkpointing(clip)
    set_trainable(model)
    trainer = Trainer(model, LossOptions(), options, precision="fp32", device=torch.device("cpu"))
    images = torch.randint(0, 256, (4, 3, size, size), dtype=torch.uint8)
    batch = TrainBatch(images, token_ids([4, 9, 6, 7]), torch.eye(4).nonzero())
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        trainer._compute_gradients(batch, 1)
    return (
        {n: p.grad for n, p in model.named_parameters() if p.grad is not None},
        dict(model.named_buffers()),
        sum(kept),
    )


def test_tower_without_checkpointing_is_named(caplog):
    vision = {"timm_model_name": "test_mambaout", "timm_model_pretrained": False, "image_size": 160}
    clip = small_clip(custom_text=True, vision_cfg=vision)
    clip.visual.trunk.set_grad_checkpointing = lambda enable=True: (_ for _ in ()).throw(AssertionError)
    enable_grad_checkpointing(clip)
    (message,) = caplog.messages
    assert message == "--grad_checkpointing has no effect on this model's image tower (MambaOut)"
    assert clip.text.transformer.grad_checkpointing
