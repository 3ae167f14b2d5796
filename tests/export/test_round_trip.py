"""Models of transformers that were finetuned here go back to transformers and to open_clip."""

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from clip_retrieval import load_model
from clip_retrieval.errors import UserError
from clip_retrieval.export.export import export
from tests.models.test_transformers_models import clip, save_tokenizer, siglip


def finetuned(make, run, arguments, tmp_path, resize=32):
    """Finetune a model of transformers for a step; return its checkpoint."""
    folder = tmp_path / "model"
    make().save_pretrained(folder)
    if make is siglip:
        save_tokenizer(folder)
    else:
        transformers.CLIPImageProcessor(size={"shortest_edge": resize}, crop_size=32).save_pretrained(folder)
    code, _, err = run(*arguments, "--vision_model", f"local-dir:{folder}", "--max_steps", "1", "--no_eval_first")
    assert code == 0, err
    return tmp_path / "logs" / "ex0" / "best.pt"


def photo():
    return Image.fromarray(np.linspace(0, 255, 50 * 71 * 3).reshape(50, 71, 3).astype(np.uint8))


@pytest.mark.parametrize("make, formats", [(clip, ["open_clip", "transformers"]), (siglip, ["transformers"])])
def test_finetuned_model_is_exported(make, formats, run, arguments, tmp_path, no_network):
    checkpoint = finetuned(make, run, arguments, tmp_path)
    ours = load_model(checkpoint, "cpu")
    for format in formats:
        assert export(checkpoint, tmp_path / format, format) < 1e-5
        again = load_model(f"local-dir:{tmp_path / format}", "cpu")
        texts = ["a red thing", "a blue dog"]
        torch.testing.assert_close(again.encode_texts(texts), ours.encode_texts(texts), rtol=0, atol=1e-5)
        torch.testing.assert_close(again.encode_images([photo()]), ours.encode_images([photo()]), rtol=0, atol=1e-5)


def test_crop_after_a_larger_size_is_kept_by_transformers(run, arguments, tmp_path, no_network):
    checkpoint = finetuned(clip, run, arguments, tmp_path, resize=40)
    ours = load_model(checkpoint, "cpu")
    assert ours.preprocess(photo()).shape == (3, 32, 32)
    with pytest.raises(UserError, match="cannot resize to one size and crop to another"):
        export(checkpoint, tmp_path / "open_clip", "open_clip")
    export(checkpoint, tmp_path / "out", "transformers")
    again = load_model(f"local-dir:{tmp_path / 'out'}", "cpu")
    torch.testing.assert_close(again.preprocess(photo()), ours.preprocess(photo()))
