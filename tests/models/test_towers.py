import os
import subprocess
import sys

import numpy as np
import open_clip
import pytest
import torch
from open_clip.hf_model import HFTextEncoder
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from clip_retrieval.data.pixels.transforms import evaluation_transform
from clip_retrieval.models.towers import RetrievalModel
from tests.models.small import TEXT, small_clip, small_preprocess, small_towers, token_ids


@pytest.mark.parametrize("custom_text", [False, True])
def test_trimmed_text_gives_open_clip_features(custom_text):
    model = RetrievalModel(small_clip(custom_text=custom_text), small_preprocess()).eval()
    ids = token_ids([4, 3, 7, 5])
    assert model.trims_text
    with torch.no_grad():
        reference = model.clip.encode_text(ids, normalize=True)
        torch.testing.assert_close(model.encode_text(ids[:, :7]), reference, rtol=0, atol=1e-6)
        torch.testing.assert_close(model.encode_text(ids), reference, rtol=0, atol=1e-6)


def test_trimmed_text_gives_the_same_features_in_a_masked_bert():
    from transformers import BertConfig

    clip = small_clip(custom_text=True)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = BertConfig(vocab_size=500, **sizes)
    for pooler in ("cls_last_hidden_state_pooler", "mean_pooler"):
        clip.text = HFTextEncoder("bert", 24, config, pooler_type=pooler, proj_type="linear").eval()
        model = RetrievalModel(clip, small_preprocess()).eval()
        ids = torch.zeros(3, 16, dtype=torch.long)
        for row, length in enumerate((4, 7, 2)):
            ids[row, :length] = torch.arange(length) * 13 + row + 1
        assert model.trims_text
        with torch.no_grad():
            reference = clip.encode_text(ids, normalize=True)
            torch.testing.assert_close(model.encode_text(ids[:, :7]), reference, rtol=0, atol=1e-6)


def test_text_is_not_trimmed_if_the_tower_attends_to_padding():
    text = TEXT | {"no_causal_mask": True, "pool_type": "last"}
    model = RetrievalModel(small_clip(custom_text=True, text_cfg=text), small_preprocess()).eval()
    assert not model.trims_text
    ids = token_ids([4, 3])
    with torch.no_grad():
        torch.testing.assert_close(model.encode_text(ids), model.clip.encode_text(ids, normalize=True))
        # cutting the padding would change the features
        shorter = model.clip.text.transformer(
            model.clip.text.token_embedding(ids[:, :4]) + model.clip.text.positional_embedding[:4]
        )
        longer = model.clip.text.transformer(
            model.clip.text.token_embedding(ids) + model.clip.text.positional_embedding
        )
        assert (shorter[:, 0] - longer[:, 0]).abs().max() > 1e-3


@pytest.mark.parametrize("size", [(16, 16), (40, 24), (15, 33)])
@pytest.mark.parametrize("resize_mode", ["shortest", "squash", "longest"])
def test_pixels_normalised_on_the_device_equal_open_clip(size, resize_mode):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
    preprocess = small_preprocess() | {"resize_mode": resize_mode}
    reference = image_transform_v2(PreprocessCfg(**preprocess), is_train=False)(image)
    travelling = evaluation_transform(preprocess)(image)
    assert travelling.dtype == torch.uint8
    model = RetrievalModel(small_clip(), preprocess).eval()
    seen = {}
    model.clip.visual.register_forward_pre_hook(lambda module, args: seen.update(pixels=args[0]))
    with torch.no_grad():
        features = model.encode_image(travelling[None])
        expected = model.clip.encode_image(reference[None], normalize=True)
    torch.testing.assert_close(seen["pixels"][0], reference, rtol=0, atol=1e-6)
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-6)


def test_adaptor_mixes_a_fifth_into_the_image_features_only():
    torch.manual_seed(0)
    model = RetrievalModel(small_clip(), small_preprocess(), adaptor=True).eval()
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    plain = RetrievalModel(model.clip, small_preprocess()).eval()
    with torch.no_grad():
        x = plain.encode_image(images)
        down, up = model.adaptor[0].weight, model.adaptor[2].weight
        adapted = torch.relu(torch.relu(x @ down.T) @ up.T)
        mixed = 0.2 * adapted + 0.8 * x
        torch.testing.assert_close(model.encode_image(images), mixed / mixed.norm(dim=1, keepdim=True))
        torch.testing.assert_close(model.encode_text(token_ids([5])), plain.encode_text(token_ids([5])))
    assert down.shape == (6, 24) and up.shape == (24, 6)


def test_weights_have_open_clip_names_and_load_back():
    model = RetrievalModel(small_clip(seed=1), small_preprocess(), adaptor=True)
    state = model.weights()
    other = RetrievalModel(small_clip(seed=2), small_preprocess(), adaptor=True)
    other.load_weights(state)
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(model.eval().encode_image(images), other.eval().encode_image(images))
    names = {n for n in state if not n.startswith("adaptor.")}
    assert names == set(open_clip.CLIP.state_dict(model.clip))


def test_coca_features_equal_open_clip():
    model = RetrievalModel(small_towers("coca")[0], small_preprocess()).eval()
    images, ids = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8), token_ids([4, 9], 16)
    pixels = (images / 255 - model.mean) / model.std
    with torch.no_grad():
        torch.testing.assert_close(model.encode_image(images), model.clip.encode_image(pixels, normalize=True))
        torch.testing.assert_close(model.encode_text(ids), model.clip.encode_text(ids, normalize=True))


@pytest.mark.slow
def test_without_a_compiler_nothing_is_compiled(tmp_path):
    program = """
import torch
from clip_retrieval.log import start_log
from clip_retrieval.models.towers import can_compile
start_log()
assert not can_compile(torch.device("cpu"))
"""
    (tmp_path / "ldconfig").symlink_to("/sbin/ldconfig")
    environment = os.environ | {"PATH": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    (line,) = (done.stdout + done.stderr).splitlines()
    assert "--compile has no effect, torch.compile does not work here" in line
    assert line.endswith("; for more speed, install a C++ compiler (g++) and Python's headers")
