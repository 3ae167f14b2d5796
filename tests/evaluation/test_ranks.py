"""Ranks against a float64 brute force over the full score matrix."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_retrieval.errors import UserError
from clip_retrieval.evaluation import ranks as ranks_module
from clip_retrieval.evaluation.ranks import retrieval_ranks
from clip_retrieval.evaluation.scores import rounding_bound

TIE = 1e-10
DECIDE_BY_TILE, DECIDE_BY_SCORE = -1, 2  # CROWDED: every tile exceeds it, no tile does


def brute_force(image_features, text_features, pairs):
    """((above, tied, positives) of i2t, the same of t2i), one query at a time, in float64."""
    images, texts = np.asarray(image_features, np.float64), np.asarray(text_features, np.float64)
    relevant = np.zeros((len(images), len(texts)), bool)
    for image, text in np.asarray(pairs):
        relevant[image, text] = True

    def direction(queries, items, relevant):
        rows = []
        for query, positive in zip(queries, relevant):
            if not positive.any():
                continue
            scores = (items * query).sum(1)
            best = scores[positive].max()
            norms = np.linalg.norm(items, axis=1)
            equal = TIE * np.linalg.norm(query) * np.maximum(norms, norms[positive].max())
            tied = np.abs(scores - best) <= equal
            rows.append([(scores > best + equal)[~positive].sum(), tied[~positive].sum(), tied[positive].sum()])
        return np.array(rows).T

    return direction(images, texts, relevant), direction(texts, images, relevant.T)


def arrays(ranks):
    return np.stack([ranks.above, ranks.tied, ranks.positives])


def assert_exact(image_features, text_features, pairs, **options):
    found = retrieval_ranks(image_features, text_features, pairs, **options)
    for ranks, expected in zip(found, brute_force(image_features, text_features, pairs)):
        np.testing.assert_array_equal(arrays(ranks), expected)
    return found


def random_pairs(rng, images, captions):
    """Uneven many-to-many pairs with duplicates; some images and captions have none."""
    count = int(rng.integers(1, images + captions))
    pairs = np.stack([rng.integers(images, size=count), rng.integers(captions, size=count)], axis=1)
    return np.concatenate([pairs, pairs[: count // 3]])


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    images=st.integers(1, 25),
    captions=st.integers(1, 40),
    dim=st.integers(1, 40),
    tile=st.tuples(st.integers(1, 30), st.integers(1, 45)),
    kind=st.sampled_from(["continuous", "small integers", "duplicates", "near ties", "lengths", "collapsed"]),
    dtype=st.sampled_from([np.float16, np.float32, np.float64]),
    crowded=st.sampled_from([DECIDE_BY_TILE, DECIDE_BY_SCORE, ranks_module.CROWDED]),
)
def test_ranks_equal_float64(seed, images, captions, dim, tile, kind, dtype, crowded):
    rng = np.random.default_rng(seed)
    sides = []
    for count in (images, captions):
        features = rng.normal(size=(count, dim))
        if kind == "small integers":
            features = rng.integers(-1, 2, size=(count, dim)).astype(float)
        if kind == "duplicates":
            features = features[rng.integers(count, size=count)]
        if kind == "near ties":
            features = features[rng.integers(3, size=count) % count] * (1 + 1e-9 * rng.integers(3, size=(count, 1)))
        if kind == "lengths":
            features *= np.exp(2 * rng.normal(size=(count, 1)))
        if kind == "collapsed":
            features = features[:1].repeat(count, axis=0)
        sides.append(features.astype(dtype))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks_module, "CROWDED", crowded)
        assert_exact(*sides, random_pairs(rng, images, captions), tile=tile)


def test_hand_computed_matrix():
    scores = np.array([[0.9, 0.5, 0.8, 0.5], [0.1, 0.7, 0.7, 0.7], [0.3, 0.2, 0.1, 0.2]])
    pairs = np.array([[0, 0], [0, 1], [1, 1], [1, 2], [2, 3]])
    i2t, t2i = retrieval_ranks(scores, np.eye(4), pairs)
    np.testing.assert_array_equal(arrays(i2t), [[0, 0, 1], [0, 1, 1], [1, 2, 1]])
    np.testing.assert_array_equal(arrays(t2i), [[0, 0, 1, 2], [0, 0, 0, 0], [1, 1, 1, 1]])


@pytest.mark.parametrize("crowded", [DECIDE_BY_TILE, DECIDE_BY_SCORE])
def test_rank_that_float32_cannot_decide(monkeypatch, crowded):
    monkeypatch.setattr(ranks_module, "CROWDED", crowded)
    rng = np.random.default_rng(0)
    image = rng.normal(size=(1, 64))
    text = np.concatenate([image * (1 + 1e-9 * step) for step in (0, 1, -1, 2, 0)])
    assert len(np.unique(image.astype(np.float32) @ text.astype(np.float32).T)) < 4
    i2t, _ = assert_exact(image, text, np.array([[0, 0]]))
    assert (i2t.above[0], i2t.tied[0]) == (2, 1)


@pytest.mark.parametrize("crowded", [DECIDE_BY_TILE, DECIDE_BY_SCORE])
def test_tie_tolerance_uses_the_longer_item(monkeypatch, crowded):
    monkeypatch.setattr(ranks_module, "CROWDED", crowded)
    long, short = [1, 1e6], [1 + 1e-5, 0]
    for positive, negative in ((long, short), (short, long)):
        i2t, _ = assert_exact(np.array([[1.0, 0]]), np.array([positive, negative]), np.array([[0, 0]]))
        assert (i2t.above[0], i2t.tied[0]) == (0, 1)


def test_equal_features_tie_at_every_position():
    rng = np.random.default_rng(1)
    texts = rng.normal(size=(1, 513)).repeat(2000, axis=0)
    i2t, t2i = retrieval_ranks(rng.normal(size=(3, 513)), texts, np.array([[0, 1234], [1, 7], [2, 0]]), tile=(2, 900))
    assert (i2t.above == 0).all() and (i2t.tied == 1999).all() and (i2t.positives == 1).all()
    assert len(t2i.above) == 3


def test_collapsed_tile_is_decided_by_one_product(monkeypatch):
    def never(*_):
        raise AssertionError("decided score by score")

    monkeypatch.setattr(ranks_module._Direction, "_count_pairs", never)
    i2t, t2i = retrieval_ranks(torch.ones(40, 8), torch.ones(90, 8), np.array([[i, 2 * i] for i in range(40)]))
    assert (i2t.tied == 89).all() and (t2i.tied == 39).all()


@pytest.mark.parametrize("tile", [(1, 1), (3, 1000), (1000, 3), (7, 11), (512, 512)])
def test_tile_size_changes_nothing(tile):
    rng = np.random.default_rng(3)
    images, texts, pairs = rng.normal(size=(37, 16)), rng.normal(size=(53, 16)), random_pairs(rng, 37, 53)
    expected = retrieval_ranks(images, texts, pairs)
    for ranks, whole in zip(retrieval_ranks(images, texts, pairs, tile=tile), expected):
        np.testing.assert_array_equal(arrays(ranks), arrays(whole))


def test_order_of_the_items_changes_nothing():
    rng = np.random.default_rng(4)
    images = rng.integers(-1, 2, size=(40, 3)).astype(np.float32)
    texts = rng.integers(-1, 2, size=(60, 3)).astype(np.float32)
    owner = rng.integers(40, size=60)
    shuffled_images, shuffled_texts = rng.permutation(40), rng.permutation(60)
    _, plain = retrieval_ranks(images, texts, np.stack([owner, np.arange(60)], 1))
    moved = np.argsort(shuffled_images)[owner[shuffled_texts]]
    _, mixed = retrieval_ranks(
        images[shuffled_images], texts[shuffled_texts], np.stack([moved, np.arange(60)], 1), tile=(7, 9)
    )
    np.testing.assert_array_equal(arrays(mixed), arrays(plain)[:, shuffled_texts])


@pytest.mark.parametrize(
    "dtype, scale", [(np.float32, 1e4), (np.float32, 1e30), (np.float32, 1e-30), (np.float64, 1e150)]
)
@pytest.mark.parametrize("sides", [(True, True), (True, False), (False, True)])
def test_scale_of_the_features_changes_nothing(monkeypatch, dtype, scale, sides):
    monkeypatch.setattr(ranks_module, "CROWDED", DECIDE_BY_SCORE)
    rng = np.random.default_rng(5)
    images, texts = rng.normal(size=(30, 24)).astype(dtype), rng.normal(size=(20, 24)).astype(dtype)
    texts, pairs = texts[rng.integers(20, size=60)], random_pairs(rng, 30, 60)
    power = dtype(2.0 ** round(np.log2(scale)))  # no rounding, so the scores keep their order
    scaled = [side * power if by else side for side, by in zip((images, texts), sides)]
    for ranks, plain in zip(retrieval_ranks(*scaled, pairs), retrieval_ranks(images, texts, pairs)):
        np.testing.assert_array_equal(arrays(ranks), arrays(plain))


def test_subnormal_and_zero_features(monkeypatch):
    monkeypatch.setattr(ranks_module, "CROWDED", DECIDE_BY_SCORE)
    assert_exact(np.zeros((3, 4)), np.zeros((5, 4)), np.array([[0, 0], [2, 4]]))
    unit = np.full((1, 64), 1 / 8)
    images = np.concatenate([unit, unit * 1e-41])  # subnormal in float32: three digits
    i2t, _ = assert_exact(images, unit.repeat(5, axis=0), np.array([[0, 0], [1, 1]]))
    assert (i2t.tied == 4).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_tensors_of_any_precision(dtype):
    torch.manual_seed(0)
    images, texts = torch.randn(20, 12).to(dtype).requires_grad_(), torch.randn(30, 12).to(dtype)
    pairs = torch.stack([torch.arange(30) % 20, torch.arange(30)], dim=1)
    found = retrieval_ranks(images, texts, pairs)
    for ranks, expected in zip(found, brute_force(images.detach().double(), texts.double(), pairs)):
        np.testing.assert_array_equal(arrays(ranks), expected)
        assert arrays(ranks).dtype == np.int64


def test_array_layout_changes_nothing():
    rng = np.random.default_rng(6)
    images, texts, pairs = rng.normal(size=(20, 6)), rng.normal(size=(30, 6)), random_pairs(rng, 20, 30)
    readonly = texts.astype(">f8")
    readonly.flags.writeable = False
    plain = retrieval_ranks(images, texts, pairs)
    for layout in (np.asfortranarray(images), images[::-1][::-1], np.repeat(images, 2, axis=1)[:, ::2]):
        found = retrieval_ranks(layout, readonly, pairs[:, ::-1][:, ::-1].astype(np.uint16))
        np.testing.assert_array_equal(arrays(found[0]), arrays(plain[0]))


def test_reduced_precision_settings_are_ignored_and_kept():
    rng = np.random.default_rng(7)
    images, texts, pairs = rng.normal(size=(50, 32)), rng.normal(size=(80, 32)), random_pairs(rng, 50, 80)
    seen = []
    product = torch.mm

    def precisions():
        return torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision

    def spy(*args, **options):
        seen.append(precisions())
        return product(*args, **options)

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    medium = precisions()
    try:
        with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16):
            patch.setattr(torch, "mm", spy)
            assert_exact(images, texts, pairs)
        assert set(seen) == {("ieee", "ieee")}
        assert precisions() == medium != ("ieee", "ieee")
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("dim", [1, 7, 512, 2048])
def test_rounding_bound_holds(dim):
    rng = np.random.default_rng(dim)
    a, b = np.abs(rng.normal(size=(64, dim))), np.abs(rng.normal(size=(64, dim)))  # no cancellation: the worst case
    fast = torch.from_numpy(a).float() @ torch.from_numpy(b).float().T
    relative, absolute = rounding_bound(dim)
    bound = relative * np.linalg.norm(a, axis=1)[:, None] * np.linalg.norm(b, axis=1)[None] + absolute
    assert (np.abs(fast.double().numpy() - a @ b.T) <= bound).all()
    # The worst case is sequential float32 summation of products that are all rounded the same way.
    steps = np.float32(1 + 2.0**-12) * np.ones(dim, np.float32)
    total = np.add.accumulate(steps * steps, dtype=np.float32)[-1]
    exact = dim * float(steps[0]) ** 2
    assert abs(float(total) - exact) <= relative * exact + absolute


def test_peak_memory_grows_with_tiles_not_the_product():
    """The largest tensor holds at most two tiles; the full product would hold 48."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else (result,):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return result

    rng = np.random.default_rng(8)
    images, texts = rng.normal(size=(300, 4)), rng.normal(size=(480, 4))
    with Watch():
        retrieval_ranks(images, texts, np.stack([np.arange(480) % 300, np.arange(480)], 1), tile=(50, 60))
    assert 50 * 60 <= largest <= 2 * 50 * 60 < 300 * 480 / 20


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_feature_is_named(value):
    images, texts = np.ones((20, 3), np.float32), np.ones((5, 3), np.float32)
    images[17, 1] = value
    with pytest.raises(UserError, match=r'image 17 \("dog.jpg"\).*not finite'):
        retrieval_ranks(images, texts, [[0, 0]], image_name=lambda i: "dog.jpg" if i == 17 else "cat.jpg")
    with pytest.raises(UserError, match=r"caption 17: .*not finite"):
        retrieval_ranks(texts, images, [[0, 0]])


@pytest.mark.parametrize(
    "images, texts, pairs, message",
    [
        (np.ones((2, 3)), np.ones((2, 4)), [[0, 0]], "3 dimensions and text features 4"),
        (np.ones((0, 3)), np.ones((2, 3)), [[0, 0]], r"image features have shape \(0, 3\)"),
        (np.ones((2, 3)), np.ones(3), [[0, 0]], r"caption features have shape \(3,\)"),
        (np.ones((2, 3), int), np.ones((2, 3)), [[0, 0]], "image features have dtype int64"),
        (np.ones((2, 3)), np.ones((2, 3)), np.zeros((0, 2), int), "at least one"),
        (np.ones((2, 3)), np.ones((2, 3)), [[0, 0, 0]], r"expected integers \(P, 2\)"),
        (np.ones((2, 3)), np.ones((2, 3)), [[0.0, 0.0]], "expected integers"),
        (np.ones((2, 3)), np.ones((5, 3)), [[0, 4], [2, 0]], r"pair 1 names image 2, but there are 2"),
        (np.ones((5, 3)), np.ones((2, 3)), [[4, 0], [0, 2]], r"pair 1 names caption 2, but there are 2"),
        (np.ones((2, 3)), np.ones((2, 3)), [[0, -1]], "pair 0 names caption -1"),
    ],
)
def test_input_that_does_not_match(images, texts, pairs, message):
    with pytest.raises(UserError, match=message):
        retrieval_ranks(images, texts, pairs)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_device_changes_nothing():
    torch.manual_seed(0)
    images, texts = torch.randn(700, 128), torch.randn(900, 128)
    pairs = torch.stack([torch.arange(900) % 700, torch.arange(900)], dim=1)
    texts[:300] = images[pairs[:300, 0]]
    for ranks, cpu in zip(retrieval_ranks(images, texts, pairs, device="cuda"), retrieval_ranks(images, texts, pairs)):
        np.testing.assert_array_equal(arrays(ranks), arrays(cpu))
