import numpy as np
import pytest
import torch

from clip_retrieval.data.captions import tokenize
from clip_retrieval.data.images.image_files import ImageArray
from clip_retrieval.data.pixels.pixels import make_pixels
from clip_retrieval.encode import encode_captions, encode_images, encoding_model
from clip_retrieval.models.towers import RetrievalModel
from tests.models.small import small_clip, small_preprocess

CPU = torch.device("cpu")
CAPTIONS = [
    "a dog",
    "two dogs run over the wet grass",
    "a dog",
    "!",
    "a very long caption that goes on and on, far beyond what fits into the context",
    "a red bus in the rain",
    "two dogs run over the wet grass",
]


@pytest.fixture(scope="module")
def model():
    return RetrievalModel(small_clip(), small_preprocess()).eval()


@pytest.fixture(scope="module")
def tokens():
    import open_clip

    return tokenize(CAPTIONS, open_clip.SimpleTokenizer(context_length=16))


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_caption_features_equal_open_clips_in_order(model, tokens, batch_size):
    with torch.no_grad():
        reference = model.clip.encode_text(tokens.ids.long(), normalize=True)
    features = encode_captions(model.encode_text, CAPTIONS, tokens, trim=True, batch_size=batch_size, device=CPU)
    torch.testing.assert_close(features, reference, rtol=0, atol=1e-6)
    assert torch.equal(features[0], features[2]) and torch.equal(features[1], features[6])


def test_distinct_captions_are_encoded_once_in_batches_of_equal_length(model, tokens, monkeypatch):
    shapes = []
    normal = model.encode_text
    monkeypatch.setattr(model, "encode_text", lambda ids, lengths: shapes.append(tuple(ids.shape)) or normal(ids))
    encode_captions(model.encode_text, CAPTIONS, tokens, trim=True, batch_size=2, device=CPU)
    assert sum(rows for rows, _ in shapes) == len(set(CAPTIONS))
    lengths = sorted(tokens.lengths[[0, 1, 3, 4, 5]].tolist())
    assert [length for _, length in shapes] == [lengths[1], lengths[3], lengths[4]]


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_image_features_equal_open_clips(model, batch_size):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 16, 16, 3), dtype=np.uint8)
    images = make_pixels(ImageArray(pixels, "test"), small_preprocess())
    scaled = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        reference = model.clip.encode_image((scaled - model.mean) / model.std, normalize=True)
    features = encode_images(model.encode_image, images, batch_size=batch_size, num_workers=0, device=CPU)
    torch.testing.assert_close(features, reference, rtol=0, atol=1e-6)


def test_lower_precision_encodes_with_a_copy_close_to_float32(model, tokens):
    reference = encode_captions(model.encode_text, CAPTIONS, tokens, trim=True, batch_size=4, device=CPU)
    lower = encoding_model(model, "bf16")
    features = encode_captions(lower.encode_text, CAPTIONS, tokens, trim=True, batch_size=4, device=CPU)
    assert lower is not model and lower.clip.token_embedding.weight.dtype == torch.bfloat16
    assert model.clip.token_embedding.weight.dtype == torch.float32
    assert features.dtype == torch.float32
    assert (features * reference).sum(1).min() > 0.99 and not torch.equal(features, reference)
    assert encoding_model(model, "fp32") is model
