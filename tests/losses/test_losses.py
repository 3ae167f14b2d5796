"""The losses compared with float64 loops over their published formulas."""

import math

import pytest
import torch
import torch.nn.functional as F

from clip_retrieval.distributed import SINGLE_PROCESS
from clip_retrieval.losses import LOSSES, make_loss, pairs
from clip_retrieval.losses.infonce import infonce
from clip_retrieval.losses.margin import margin_pairwise
from clip_retrieval.losses.siglip import siglip
from clip_retrieval.losses.triplet import triplet
from clip_retrieval.options import LossOptions

OPTIONS = {name: LossOptions(loss=name) for name in LOSSES}
OPTIONS["label smoothing"] = LossOptions(label_smoothing=0.1, i2t_weight=0.3)
NAMES = tuple(OPTIONS)
DTYPES = {torch.float32: 1e-5, torch.float64: 1e-12}


def batch(seed=0, pairs=7, dim=5, dtype=torch.float64):
    """Make features with duplicates (images 0 and 3, captions 1 and 2), and the matrix of positives."""
    generator = torch.Generator().manual_seed(seed)
    image = F.normalize(torch.randn(pairs, dim, generator=generator, dtype=torch.float64), dim=-1)
    text = F.normalize(torch.randn(pairs, dim, generator=generator, dtype=torch.float64), dim=-1)
    image[3], text[2] = image[0], text[1]
    positives = torch.eye(pairs, dtype=torch.bool)
    for i, j in [(0, 3), (3, 0), (1, 2), (2, 1)]:
        positives[i, j] = True
    return image.to(dtype), text.to(dtype), positives


def infonce_loop(image, text, positives, scale, smoothing=0.0, i2t_weight=0.5):
    def direction(queries, items, relevant):
        total = 0.0
        for q in range(len(queries)):
            scores = [scale * float(queries[q] @ items[k]) for k in range(len(items))]
            log_sum = math.log(sum(math.exp(s) for s in scores))
            targets = [k for k in range(len(items)) if relevant[q, k]]
            for k in range(len(items)):
                target = (1 - smoothing) * (k in targets) / len(targets) + smoothing / len(items)
                total -= target * (scores[k] - log_sum)
        return total / len(queries)

    i2t = direction(image, text, positives)
    t2i = direction(text, image, positives.T) if i2t_weight < 1 else 0.0
    return i2t_weight * i2t + (1 - i2t_weight) * t2i


def triplet_loop(image, text, positives, margin, i2t_weight=0.5):
    def direction(queries, items, relevant):
        total = 0.0
        for q in range(len(queries)):
            scores = [float(queries[q] @ item) for item in items]
            hardest = max((s for k, s in enumerate(scores) if not relevant[q, k]), default=-math.inf)
            targets = [k for k in range(len(items)) if relevant[q, k]]
            total += sum(max(0.0, margin + hardest - scores[k]) for k in targets) / max(1, len(targets))
        return total / int(relevant.any(1).sum())

    i2t, t2i = direction(image, text, positives), direction(text, image, positives.T)
    return i2t_weight * i2t + (1 - i2t_weight) * t2i


def siglip_loop(image, text, positives, scale, bias):
    total = 0.0
    for i in range(len(image)):
        for j in range(len(text)):
            z = 1 if positives[i, j] else -1
            total += math.log(1 / (1 + math.exp(-z * (scale * float(image[i] @ text[j]) + bias))))
    return -total / len(image)


def margin_loop(image, text, positives, margin):
    total = 0.0
    for i in range(len(image)):
        for j in range(len(text)):
            s = float(image[i] @ text[j])
            total += 0.5 * (1 - s) if positives[i, j] else 0.5 * max(0.0, s - margin)
    return total / positives.numel()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(3))
def test_losses_equal_their_formulas_with_duplicates(dtype, seed):
    image, text, positives = batch(seed, dtype=dtype)
    plain = image.double(), text.double(), positives
    scale, bias = torch.tensor(14.3, dtype=dtype), torch.tensor(-3.0, dtype=dtype)
    tolerance = {"rel": DTYPES[dtype]}
    rows = positives.nonzero()
    assert infonce(image, text, rows, scale).item() == pytest.approx(infonce_loop(*plain, 14.3), **tolerance)
    assert siglip(image, text, rows, scale, bias).item() == pytest.approx(siglip_loop(*plain, 14.3, -3.0), **tolerance)
    assert margin_pairwise(image, text, rows, 0.2).item() == pytest.approx(margin_loop(*plain, 0.2), **tolerance)
    assert triplet(image, text, rows, 0.2).item() == pytest.approx(triplet_loop(*plain, 0.2), **tolerance)


def test_negative_captions_are_columns_but_no_queries():
    """Captions without a positive, as NegCLIP's, count in image-to-text; they have no row in text-to-image."""
    image, text, positives = batch()
    image, positives = image[:5], positives[:5]  # captions 5 and 6 are negative
    rows = positives.nonzero()
    scale, bias = (torch.tensor(value, dtype=torch.float64) for value in (14.3, -3.0))

    def directions(loop, *arguments):
        """Image-to-text over all captions, text-to-image from those with a positive."""
        i2t = loop(image, text, positives, *arguments, i2t_weight=1.0)
        return 0.5 * i2t + 0.5 * loop(image, text[:5], positives[:, :5], *arguments, i2t_weight=0.0)

    assert infonce(image, text, rows, scale).item() == pytest.approx(directions(infonce_loop, 14.3), rel=1e-12)
    assert triplet(image, text, rows, 0.2).item() == pytest.approx(directions(triplet_loop, 0.2), rel=1e-12)
    expected = siglip_loop(image, text, positives, 14.3, -3.0)
    assert siglip(image, text, rows, scale, bias).item() == pytest.approx(expected, rel=1e-12)
    assert margin_pairwise(image, text, rows, 0.2).item() == pytest.approx(margin_loop(image, text, positives, 0.2))


@pytest.mark.parametrize("i2t_weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_label_smoothing_and_weights_of_directions_equal_their_formula(smoothing, i2t_weight):
    image, text, positives = batch()
    scale = torch.tensor(14.3, dtype=torch.float64)
    loss = infonce(image, text, positives.nonzero(), scale, smoothing, i2t_weight)
    assert loss.item() == pytest.approx(infonce_loop(image, text, positives, 14.3, smoothing, i2t_weight), rel=1e-12)
    loss = triplet(image, text, positives.nonzero(), 0.4, i2t_weight)
    assert loss.item() == pytest.approx(triplet_loop(image, text, positives, 0.4, i2t_weight), rel=1e-12)


def test_label_smoothing_keeps_a_finite_optimum():
    """With orthogonal pairs, the gradient of the scale is 0 if the positive has the probability 1 - E + E / n."""
    image, smoothing = torch.eye(4, dtype=torch.float64), 0.2
    target = 1 - smoothing + smoothing / 4
    best = math.log(target / ((1 - target) / 3))
    scale = torch.tensor(best, dtype=torch.float64, requires_grad=True)
    infonce(image, image, torch.eye(4).nonzero(), scale, smoothing).backward()
    assert scale.grad.item() == pytest.approx(0, abs=1e-12)


def test_triplet_without_negatives_has_no_loss_and_no_gradient():
    image, text, _ = batch(pairs=4)
    features = [side.clone().requires_grad_() for side in (image, text)]
    loss = triplet(*features, torch.ones(4, 4).nonzero())
    loss.backward()
    assert loss == 0 and not any(side.grad.any() for side in features)


def test_triplet_of_a_bad_pair_counts_rows_with_positives_only():
    image, text, positives = batch()
    positives[4] = False
    expected = triplet_loop(image, text, positives, 0.3)
    assert triplet(image, text, positives.nonzero(), 0.3).item() == pytest.approx(expected, rel=1e-12)


def test_infonce_without_duplicates_is_the_loss_of_clip():
    image, text, _ = batch()
    logits = 20 * image @ text.T
    labels = torch.arange(len(image))
    expected = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    assert infonce(image, text, torch.eye(7).nonzero(), torch.tensor(20.0)) == pytest.approx(expected.item())


def test_rows_without_positives_are_skipped():
    image, text, positives = batch()
    kept = torch.tensor([0, 1, 2, 3, 5, 6])
    positives[4] = False
    i2t_only = -(20 * image @ text.T).log_softmax(1)
    per_row = (i2t_only * positives).sum(1) / positives.sum(1).clamp(min=1)
    t2i = -(20 * text @ image.T).log_softmax(1)
    per_column = (t2i * positives.T).sum(1) / positives.sum(0).clamp(min=1)
    expected = (per_row[kept].mean() + per_column[kept].mean()) / 2
    assert infonce(image, text, positives.nonzero(), torch.tensor(20.0)) == pytest.approx(expected.item())


@pytest.mark.parametrize("name", NAMES)
def test_gradients(name):
    image, text, positives = batch(pairs=4, dim=3) if name != "margin" else batch(seed=4, pairs=4, dim=3)
    positives = positives[:4, :4].nonzero()
    if name == "triplet":  # duplicates are equally hard negatives: no gradient there
        image, text = (batch(seed=1)[side][[0, 1, 4, 5]][:, :3] for side in range(2))
    loss = make_loss(OPTIONS[name], SINGLE_PROCESS)
    scale, bias = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (5.0, -1.0))
    inputs = [image.clone().requires_grad_(), text.clone().requires_grad_()]
    assert torch.autograd.gradcheck(
        lambda i, t, s, b: loss(i, t, positives, s, b), (*inputs, scale, bias), check_undefined_grad=False
    )


def test_options_choose_the_loss_and_its_margin():
    image, text, positives = batch()
    positives = positives.nonzero()
    arguments = (image, text, positives, torch.tensor(10.0), torch.tensor(-5.0))
    assert make_loss(LossOptions(), SINGLE_PROCESS)(*arguments) == infonce(*arguments[:4])
    assert make_loss(LossOptions(loss="siglip"), SINGLE_PROCESS)(*arguments) == siglip(*arguments)
    smoothed = make_loss(LossOptions(label_smoothing=0.1, i2t_weight=0.7), SINGLE_PROCESS)
    assert smoothed(*arguments) == infonce(*arguments[:4], 0.1, 0.7)
    hinge = make_loss(LossOptions(loss="triplet", i2t_weight=0.7), SINGLE_PROCESS)
    assert hinge(*arguments) == triplet(image, text, positives, 0.2, 0.7)
    assert make_loss(LossOptions(loss="margin"), SINGLE_PROCESS)(*arguments) == margin_pairwise(image, text, positives)
    for margin in (0.1, 0.5):
        chosen = make_loss(LossOptions(loss="margin", margin=margin), SINGLE_PROCESS)
        assert chosen(*arguments) == margin_pairwise(image, text, positives, margin)
    assert margin_pairwise(image, text, positives, 0.1) != margin_pairwise(image, text, positives, 0.5)


@pytest.mark.parametrize("name", NAMES)
def test_tiles_keep_loss_and_gradients(name, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    features = [F.normalize(torch.randn(n, 6, generator=generator, dtype=torch.float64), dim=-1) for n in (11, 17)]
    positives = torch.randint(0, 11, (20, 2), generator=generator).unique(dim=0)
    results = []
    for tile in (4096, 17, 4, 1):
        monkeypatch.setattr(pairs, "TILE", tile)
        inputs = [f.clone().requires_grad_() for f in features]
        inputs += [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (9.0, -2.0)]
        loss = make_loss(OPTIONS[name], SINGLE_PROCESS)(*inputs[:2], positives, *inputs[2:])
        results.append([loss.detach(), *torch.autograd.grad(loss, inputs, materialize_grads=True)])
    for result in results[1:]:
        for tiled, whole in zip(result, results[0], strict=True):
            torch.testing.assert_close(tiled, whole, rtol=1e-12, atol=1e-14)


def test_no_tensor_is_larger_than_a_tile():
    size = 3000
    sizes = []

    class RecordSizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            result = function(*arguments, **(keywords or {}))
            sizes.append(max((t.numel() for t in [result] if isinstance(t, torch.Tensor)), default=0))
            return result

    image, text = (F.normalize(torch.randn(size, 8), dim=-1).requires_grad_() for _ in range(2))
    rows = torch.arange(size)[:, None].repeat(1, 2)
    for name in NAMES:
        loss = make_loss(OPTIONS[name], SINGLE_PROCESS)
        with pytest.MonkeyPatch.context() as patch, RecordSizes():
            patch.setattr(pairs, "TILE", 500)
            loss(image, text, rows, torch.tensor(10.0), torch.tensor(-10.0)).backward()
    assert max(sizes) <= 500 * 500
