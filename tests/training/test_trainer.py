import math

import numpy as np
import pytest
import torch

from clip_retrieval.data.batches.loader import TrainBatch
from clip_retrieval.data.batches.sampler import BatchSampler
from clip_retrieval.data.dataset import RetrievalDataset
from clip_retrieval.data.images.image_files import ImageFiles
from clip_retrieval.device import disable_tf32
from clip_retrieval.distributed import SINGLE_PROCESS
from clip_retrieval.errors import RunError
from clip_retrieval.losses import LOSSES
from clip_retrieval.models.towers import RetrievalModel
from clip_retrieval.models.trainable import set_trainable
from clip_retrieval.options import LossOptions, TrainOptions
from clip_retrieval.run.merge import settle
from clip_retrieval.run.train_parts import make_trainer as make_run_trainer
from clip_retrieval.training.trainer import Trainer
from tests.models.small import small_clip, small_preprocess

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def make_trainer(loss="infonce", device="cpu", precision="fp32", resnet=False, **options):
    clip = small_clip(resnet=resnet, init_logit_bias=-10.0 if loss == "siglip" else None)
    model = RetrievalModel(clip, small_preprocess()).to(device)
    set_trainable(model, learn_scale=LOSSES[loss].learns_scale, learn_bias=loss == "siglip")
    return Trainer(
        model.train(),
        LossOptions(loss=loss),
        TrainOptions(**options),
        precision=precision,
        device=torch.device(device),
    )


def batch(pairs=8, seed=0, size=16):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (pairs, 3, size, size), dtype=torch.uint8, generator=generator)
    tokens = torch.randint(1, 49000, (pairs, 7), generator=generator)
    return TrainBatch(images, tokens, torch.eye(pairs).nonzero())


@pytest.mark.parametrize("loss", ["infonce", "siglip", "margin", "triplet"])
@pytest.mark.parametrize("split", [{"grad_cache": 3}, {"grad_cache": 1}, {"accum_freq": 2}])
def test_chunks_have_the_gradients_of_the_whole_batch(loss, split):
    gradients = []
    for options in ({}, split):
        trainer = make_trainer(loss=loss, **options)
        trainer._update = lambda: None
        result = trainer.step(batch(), 1, 1e-3)
        gradients.append({name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None})
        gradients[-1]["loss"] = result.loss
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 30
    for name, whole in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], whole, rtol=1e-4, atol=1e-6 * whole.abs().max().item(), msg=name)


def test_chunk_has_the_same_dropout_in_both_passes():
    drawn = []
    trainer = make_trainer(grad_cache=4)
    trainer.model.clip.transformer.register_forward_hook(
        lambda module, inputs, output: torch.nn.functional.dropout(output, 0.5)
    )
    trainer.model.register_forward_hook(lambda module, inputs, output: drawn.append(output[1].detach()))
    trainer.step(batch(), 1, 1e-3)
    assert len(drawn) == 4
    assert torch.equal(drawn[0], drawn[2]) and torch.equal(drawn[1], drawn[3])
    assert not torch.equal(drawn[0], drawn[1])


def test_each_chunk_updates_the_batch_statistics_once():
    means = []
    for grad_cache in (None, 8, 4):
        trainer = make_trainer(resnet=True, grad_cache=grad_cache)
        trainer.step(batch(size=32), 1, 1e-3)
        bn = trainer.model.clip.visual.bn1
        means.append((bn.running_mean.clone(), bn.momentum))
    assert torch.equal(means[0][0], means[1][0])
    assert means[2][1] == means[0][1] == 0.1
    # Two chunks make two updates, not four.
    trainer = make_trainer(resnet=True)
    whole = batch(size=32)
    for half in (slice(0, 4), slice(4, 8)):
        trainer.model(whole.images[half], whole.texts[half])
    torch.testing.assert_close(means[2][0], trainer.model.clip.visual.bn1.running_mean)


def on_gpu(b):
    return TrainBatch(b.images.cuda(), b.texts.cuda(), b.positives.cuda(), torch.arange(len(b.images)) % 5 + 3)


@gpu
@pytest.mark.parametrize("loss", ["infonce", "siglip", "margin", "triplet"])
@pytest.mark.parametrize("resnet", [False, True])
def test_gpu_gradients_equal_cpu_gradients(loss, resnet):
    results = []
    for device in ("cpu", "cuda"):
        trainer = make_trainer(loss=loss, resnet=resnet, device=device)
        trainer._update = lambda: None
        moved = on_gpu(batch(size=32 if resnet else 16))
        if device == "cpu":
            moved = TrainBatch(moved.images.cpu(), moved.texts.cpu(), moved.positives.cpu(), moved.lengths)
        with disable_tf32():
            result = trainer.step(moved, 1, 1e-3)
        results.append({n: p.grad.cpu() for n, p in trainer.model.named_parameters() if p.grad is not None})
        results[-1]["loss"] = result.loss.cpu()
    largest = max(expected.abs().max().item() for expected in results[0].values())
    for name, expected in results[0].items():
        # a bias before batch normalisation has no gradient: what is there is rounding
        atol = max(1e-4 * expected.abs().max().item(), 1e-6 * largest)
        torch.testing.assert_close(results[1][name], expected, rtol=1e-3, atol=atol, msg=name)


def test_gradients_are_clipped_to_the_norm():
    moved = []
    for grad_clip in (None, 1e-4):
        trainer = make_trainer(grad_clip=grad_clip, eps=1e-3, weight_decay=0)
        before = trainer.model.clip.visual.proj.detach().clone()
        trainer.step(batch(), 1, 1e-2)
        moved.append((trainer.model.clip.visual.proj - before).abs().max().item())
    assert moved[1] < moved[0] / 5


def test_only_infonce_clamps_the_scale_to_1_and_100():
    for loss, start, expected in (("infonce", 6.0, math.log(100)), ("infonce", -1.0, 0.0), ("siglip", 6.0, 6.0)):
        trainer = make_trainer(loss)
        trainer.model.clip.logit_scale.data.fill_(start)
        trainer.step(batch(), 1, 1e-9)
        assert trainer.model.clip.logit_scale.item() == pytest.approx(expected, abs=1e-6)


def test_fixed_temperature_is_neither_trained_nor_clamped():
    model = RetrievalModel(small_clip(), small_preprocess())
    options = settle({"temperature": 0.005, "lr": 1.0})
    trainer = make_run_trainer(options.train, options.loss, model, "fp32", torch.device("cpu"), SINGLE_PROCESS)
    trainer.step(batch(), 1, 1e-3)
    assert model.clip.logit_scale.exp().item() == pytest.approx(200)
    assert not any(
        parameter is model.clip.logit_scale for g in trainer.optimizer.param_groups for parameter in g["params"]
    )


@pytest.mark.parametrize("loss", ["infonce", "siglip"])
def test_validation_is_the_mean_over_batches(loss):
    trainer = make_trainer(loss)
    pairs = np.array([(i // 2, i) for i in range(10)])
    dataset = RetrievalDataset("test", "val", ImageFiles([str(i) for i in range(5)]), ["a caption"] * 10, pairs)
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.nn.functional.normalize(torch.randn(n, 24, generator=generator), dim=-1) for n in (5, 10))
    results = trainer.validate(image, text, dataset, 4)
    losses, hits = [], []
    for rows in BatchSampler(dataset, 4).epoch(0):
        images, texts = image[rows.images], text[rows.captions]
        matrix = torch.from_numpy(rows.images[:, None] == rows.captions // 2)
        losses.append(trainer.loss(images, texts, matrix.nonzero(), *trainer._scale_and_bias()).item())
        hits += [matrix[i, j].item() for i, j in enumerate((images @ texts.T).argmax(1).tolist())]
    assert results["loss"] == pytest.approx(np.mean(losses), rel=1e-6) and results["batch_size"] == 4
    assert results["i2t_accuracy"] == pytest.approx(100 * np.mean(hits))
    assert trainer.validate(image, text, dataset, 256)["batch_size"] == 10


def test_first_non_finite_step_is_reported():
    trainer = make_trainer()
    trainer.step(batch(), 1, 1e-3)
    trainer.check_finite()
    trainer.model.clip.visual.proj.data[0, 0] = float("inf")
    trainer.step(batch(), 2, 1e-3)
    trainer.step(batch(), 3, 1e-3)
    with pytest.raises(RunError, match="not finite at step 2"):
        trainer.check_finite()


def test_accuracy_counts_any_positive():
    result = make_trainer().step(batch(), 1, 1e-3)
    result.image_features = torch.eye(4)
    result.text_features = torch.eye(4)[[1, 0, 2, 3]]
    result.positives = torch.eye(4).nonzero()
    assert result.accuracy() == (50.0, 50.0)
    result.positives = torch.cat([result.positives, torch.tensor([[0, 1], [1, 0]])])
    assert result.accuracy() == (100.0, 100.0)


@pytest.mark.parametrize("options", [{}, {"grad_cache": 3}, {"precision": "bf16"}], ids=str)
def test_timing_a_step_changes_nothing(options):
    trainers = [make_trainer(resnet=True, **options) for _ in range(2)]
    assert trainers[0].time_step(batch(size=32), repeats=2) > 0
    for trainer in trainers:
        trainer.step(batch(size=32), 1, 1e-3)
    expected = trainers[1].model.weights()
    found = trainers[0].model.weights()
    assert [name for name, value in expected.items() if not torch.equal(value, found[name])] == []


def test_mixed_precision_keeps_float32_weights_and_a_close_loss():
    losses = [make_trainer(precision=p).step(batch(), 1, 1e-3).loss.item() for p in ("fp32", "bf16")]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2) and losses[0] != losses[1]
    trainer = make_trainer(precision="bf16")
    trainer.step(batch(), 1, 1e-3)
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}


@gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("options", [{}, {"grad_clip": 1.0}, {"grad_cache": 3}, {"loss": "triplet"}], ids=str)
def test_step_never_synchronizes_with_the_gpu(precision, options):
    trainer = make_trainer(device="cuda", precision=precision, **options)
    pinned = on_gpu(batch())
    trainer.step(pinned, 1, 1e-3)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(2, 5):
            trainer.step(pinned, step, 1e-3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    trainer.check_finite()
