import math

import pytest
import torch

from clip_retrieval.data.loader import TrainBatch
from clip_retrieval.errors import RunError
from clip_retrieval.losses import make_loss
from clip_retrieval.models.towers import RetrievalModel
from clip_retrieval.models.trainable import set_trainable
from clip_retrieval.options import LossOptions, TrainOptions
from clip_retrieval.training.step import Trainer
from tests.models.small import small_clip, small_preprocess

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def trainer_of(loss="infonce", device="cpu", precision="fp32", clamp_scale=True, **options):
    model = RetrievalModel(small_clip(), small_preprocess()).to(device)
    set_trainable(model)
    return Trainer(
        model.train(),
        make_loss(LossOptions(loss=loss)),
        TrainOptions(**options),
        clamp_scale=clamp_scale,
        precision=precision,
        device=torch.device(device),
    )


def batch(pairs=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (pairs, 3, 16, 16), dtype=torch.uint8, generator=generator)
    tokens = torch.randint(1, 49000, (pairs, 7), generator=generator)
    return TrainBatch(images, tokens, torch.eye(pairs, dtype=torch.bool))


def test_accumulation_is_the_mean_of_its_parts():
    whole, parts = (trainer_of(accum_freq=n, lr=1e-3, eps=1e-3) for n in (2, 1))
    result = whole.step(batch(), 1, 1e-3)
    b = batch()
    halves = [TrainBatch(b.images[s], b.tokens[s], b.positives[s, s]) for s in (slice(0, 4), slice(4, 8))]
    losses = []
    for half in halves:
        image, text = parts.model(half.images, half.tokens)
        scale = parts.model.clip.logit_scale.exp()
        losses.append(parts.loss(image, text, half.positives, scale, None))
    (sum(losses) / 2).backward()
    assert result.loss.item() == pytest.approx(sum(losses).item() / 2, rel=1e-6)
    parts._update()
    for (name, a), b in zip(whole.model.named_parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_gradients_are_clipped_to_the_norm():
    moved = []
    for grad_clip in (None, 1e-4):
        trainer = trainer_of(grad_clip=grad_clip, eps=1e-3, weight_decay=0)
        before = trainer.model.clip.visual.proj.detach().clone()
        trainer.step(batch(), 1, 1e-2)
        moved.append((trainer.model.clip.visual.proj - before).abs().max().item())
    assert moved[1] < moved[0] / 5


def test_the_scale_stays_within_1_and_100_for_infonce_only():
    for clamp, start, expected in ((True, 6.0, math.log(100)), (True, -1.0, 0.0), (False, 6.0, 6.0)):
        trainer = trainer_of(clamp_scale=clamp)
        trainer.model.clip.logit_scale.data.fill_(start)
        trainer.step(batch(), 1, 1e-9)
        assert trainer.model.clip.logit_scale.item() == pytest.approx(expected, abs=1e-6)


def test_the_first_step_that_is_not_finite_is_named():
    trainer = trainer_of()
    trainer.step(batch(), 1, 1e-3)
    trainer.check_finite()
    trainer.model.clip.visual.proj.data[0, 0] = float("inf")
    trainer.step(batch(), 2, 1e-3)
    trainer.step(batch(), 3, 1e-3)
    with pytest.raises(RunError, match="not finite at step 2"):
        trainer.check_finite()


def test_accuracy_counts_any_positive():
    result = trainer_of().step(batch(), 1, 1e-3)
    result.image_features = torch.eye(4)
    result.text_features = torch.eye(4)[[1, 0, 2, 3]]
    result.positives = torch.eye(4, dtype=torch.bool)
    assert result.accuracy() == (50.0, 50.0)
    result.positives[0, 1] = result.positives[1, 0] = True
    assert result.accuracy() == (100.0, 100.0)


def test_mixed_precision_keeps_float32_weights_and_is_close_to_float32():
    losses = [trainer_of(precision=p).step(batch(), 1, 1e-3).loss.item() for p in ("fp32", "bf16")]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2) and losses[0] != losses[1]
    trainer = trainer_of(precision="bf16")
    trainer.step(batch(), 1, 1e-3)
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}


@gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("grad_clip", [None, 1.0])
def test_a_step_never_waits_for_the_gpu(precision, grad_clip):
    trainer = trainer_of(device="cuda", precision=precision, grad_clip=grad_clip)
    pinned = batch().pin_memory()
    trainer.step(pinned, 1, 1e-3)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(2, 5):
            trainer.step(pinned, step, 1e-3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    trainer.check_finite()
