"""Distillation losses compared with float64 matrices, and with themselves in tiles."""

import pytest
import torch
import torch.nn.functional as F

from clip_retrieval.losses import pairs
from clip_retrieval.losses.distillation import feature_distillation, relational_distillation

SCALES = torch.tensor(9.0, dtype=torch.float64), torch.tensor(20.0, dtype=torch.float64)


def features(seed, dim=6, images=11, captions=17):
    generator = torch.Generator().manual_seed(seed)
    sides = [torch.randn(n, dim, generator=generator, dtype=torch.float64) for n in (images, captions)]
    return [F.normalize(side, dim=-1) for side in sides]


def divergence(student, teacher):
    """The mean KL divergence of the rows of two matrices of logits."""
    return F.kl_div(student.log_softmax(1), teacher.log_softmax(1), reduction="batchmean", log_target=True)


def test_relational_loss_is_the_kl_divergence_of_both_directions():
    student, teacher = features(0), features(1, dim=8)
    logits = [scale * side[0] @ side[1].T for scale, side in zip(SCALES, (student, teacher), strict=True)]
    expected = (divergence(*logits) + divergence(*(matrix.T for matrix in logits))) / 2
    assert relational_distillation(student, teacher, *SCALES).item() == pytest.approx(expected.item(), rel=1e-12)


def test_feature_loss_is_the_mean_distance():
    student, teacher = features(0), features(1)
    expected = sum((1 - F.cosine_similarity(own, other)).mean() for own, other in zip(student, teacher, strict=True))
    assert feature_distillation(student, teacher).item() == pytest.approx(expected.item() / 2, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loss_and_gradient_from_itself_are_zero(dtype):
    sides = [side.to(dtype) for side in features(0)]
    student = [side.clone().requires_grad_() for side in sides]
    scale = SCALES[1].to(dtype)
    loss = relational_distillation(student, sides, scale.clone().requires_grad_(), scale)
    gradients = torch.autograd.grad(loss, student)
    tolerance = 100 * torch.finfo(dtype).eps
    assert abs(loss.item()) < tolerance and all(gradient.abs().max() < tolerance for gradient in gradients)
    assert abs(feature_distillation(student, sides).item()) < tolerance


def test_gradients():
    student = [side.requires_grad_() for side in features(0, dim=3, images=3, captions=4)]
    teacher, scale = features(1, dim=4, images=3, captions=4), SCALES[0].clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda image, text, scale: relational_distillation([image, text], teacher, scale, SCALES[1]), (*student, scale)
    )


def test_tiles_keep_loss_and_gradients(monkeypatch):
    results = []
    for tile in (4096, 5, 1):
        monkeypatch.setattr(pairs, "TILE", tile)
        student = [side.requires_grad_() for side in features(0)]
        loss = relational_distillation(student, features(1), *SCALES)
        results.append([loss.detach(), *torch.autograd.grad(loss, student)])
    for result in results[1:]:
        for tiled, whole in zip(result, results[0], strict=True):
            torch.testing.assert_close(tiled, whole, rtol=1e-12, atol=1e-14)
