"""Long-CLIP's position embeddings. The reference is section 3.2 of arXiv:2403.15378 and the released model."""

import json

import numpy as np
import open_clip
import pytest
import torch
from open_clip import factory

from clip_retrieval.errors import UserError
from clip_retrieval.models import long_clip
from clip_retrieval.models.build import build_model
from clip_retrieval.models.towers import RetrievalModel
from clip_retrieval.options import ModelOptions
from tests.models.small import TEXT, VIT, small_clip, small_config, small_preprocess, token_ids

LONG = 248


def test_77_positions_are_stretched_by_four_to_248():
    positions = torch.randn(77, 5, dtype=torch.float64)
    stretched = long_clip.stretch_positions(positions, LONG, 20)
    assert torch.equal(stretched[:20], positions[:20])
    for number in range(20, 77):
        following = positions[number + 1] if number < 76 else 2 * positions[76] - positions[75]
        for quarter in range(4):
            expected = ((4 - quarter) * positions[number] + quarter * following) / 4
            torch.testing.assert_close(stretched[20 + 4 * (number - 20) + quarter], expected)


@pytest.mark.parametrize(("number", "length", "keep"), [(77, 100, 20), (77, 512, 1), (16, 17, 15), (9, 9, 4)])
def test_any_length_is_a_linear_interpolation(number, length, keep):
    positions = torch.randn(number, 3)
    stretched = long_clip.stretch_positions(positions, length, keep)
    at = keep + np.arange(length - keep) * (number - keep) / (length - keep)
    inside = at <= number - 1
    for column in range(3):
        expected = np.interp(at[inside], np.arange(number), positions[:, column].double().numpy())
        np.testing.assert_allclose(stretched[keep:, column].numpy()[inside], expected, atol=1e-5)
    assert stretched.shape == (length, 3) and torch.equal(stretched[:keep], positions[:keep])


def long_state(seed=3):
    """A state dict like Long-CLIP's files: two tables of 248 positions; the unused parts are not finite."""
    clip = small_clip(seed=seed, text_cfg=TEXT | {"context_length": LONG}, quick_gelu=True)
    state, positions = clip.state_dict(), torch.randn(2, LONG, 32)
    return clip, {**state, "positional_embedding": positions[0], "positional_embedding_res": positions[1]}


def reference_features(clip, state, ids):
    """Features of captions as Long-CLIP computes them: masked sums of both tables."""
    first = (torch.arange(LONG) < 20)[:, None]
    x = clip.token_embedding(ids)
    x = x + state["positional_embedding"] * first + state["positional_embedding_res"] * ~first
    x = clip.ln_final(clip.transformer(x, attn_mask=clip.attn_mask))
    return torch.nn.functional.normalize(x[torch.arange(len(ids)), ids.argmax(1)] @ clip.text_projection, dim=1)


@pytest.mark.parametrize("typed", [None, "ViT-B/16", "ViT-B-16"])
@pytest.mark.parametrize("holder", [None, "state_dict"])
def test_long_clips_checkpoint_gives_its_features(typed, holder, tmp_path, monkeypatch):
    configs = {"ViT-B-16": small_config()}
    elsewhere = small_config(vision_cfg=VIT | {"width": 64})
    monkeypatch.setattr(factory, "get_model_config", lambda name: configs.get(name, elsewhere))
    clip, state = long_state()
    torch.save({holder: state} if holder else state, tmp_path / "longclip-B.pt")
    options = ModelOptions(pretrained=str(tmp_path / "longclip-B.pt"))
    if typed:
        options.vision_model = typed
    built = build_model(options, typed_model=typed is not None)
    assert (built.name, built.config["text_cfg"]["context_length"]) == ("ViT-B/16", LONG)
    lengths = [4, 30, 90, LONG]
    ids = token_ids(lengths, LONG)
    model = RetrievalModel(built.clip, small_preprocess()).eval()
    with torch.no_grad():
        expected = reference_features(clip, state, ids)
        torch.testing.assert_close(model.encode_text(ids), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(model.encode_text(ids, torch.tensor(lengths)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "width", "patch", "patches"),
    [("ViT-B/16", 768, 16, 196), ("ViT-L/14", 1024, 14, 256), ("ViT-L/14@336px", 1024, 14, 576), (None, 512, 16, 196)],
)
def test_towers_of_a_file_decide_its_name(name, width, patch, patches):
    shapes = {"visual.conv1.weight": (width, 3, patch, patch), "visual.positional_embedding": (patches + 1, width)}
    shapes["positional_embedding"] = (LONG, width)
    state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    if name is None:
        with pytest.raises(ValueError, match="no CLIP with an image tower of width 512, patch size 16"):
            long_clip.infer(state, "x.pt")
    else:
        found, config = long_clip.infer(state, "x.pt")
        assert (found, config["text_cfg"]["context_length"], config["quick_gelu"]) == (name, LONG, True)


@pytest.fixture
def small(tmp_path):
    """Options of a small model with weights, and its position embeddings."""
    (tmp_path / "small.json").write_text(json.dumps(small_config()))
    state = small_clip(seed=1).state_dict()
    torch.save(state, tmp_path / "small.pt")
    options = {"vision_model": str(tmp_path / "small.json"), "pretrained": str(tmp_path / "small.pt")}
    return options, state["positional_embedding"]


@pytest.mark.parametrize(
    ("length", "keep", "how"),
    [
        (40, 4, "the first 4 stay, the others are stretched by 3"),
        (40, None, "all are interpolated; --keep_positions 20 keeps the first ones, as Long-CLIP does"),
        (12, 4, "the first 12 are kept"),
    ],
)
def test_log_says_how_positions_are_resized(length, keep, how, small, caplog):
    caplog.set_level("INFO")
    options, positions = small
    built = build_model(ModelOptions(**options, context_length=length, keep_positions=keep), typed_model=True)
    assert f"{options['pretrained']} has 16 text positions, the model {length}: {how}" in caplog.messages
    unchanged = {(40, 4): 4, (40, None): 0, (12, 4): 12}[length, keep]
    assert torch.equal(built.clip.positional_embedding[:unchanged], positions[:unchanged])
    if keep is None:
        state = {"positional_embedding": positions}
        open_clip.model.resize_text_pos_embed(state, built.clip)
        assert torch.equal(built.clip.positional_embedding, state["positional_embedding"])


def test_more_kept_positions_than_there_are_is_refused(small):
    with pytest.raises(UserError, match=r"--keep_positions 16: must be less than the 16 positions of .*small.pt"):
        build_model(ModelOptions(**small[0], context_length=40, keep_positions=16))


def test_class_token_of_coca_keeps_its_position(tmp_path):
    text = TEXT | {"embed_cls": True, "output_tokens": True}
    config = small_config(text_cfg=text, multimodal_cfg=TEXT | {"attn_pooler_heads": 2})
    config["vision_cfg"] |= {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
    (tmp_path / "coca.json").write_text(json.dumps(config))
    built = build_model(ModelOptions(vision_model=str(tmp_path / "coca.json")))
    positions = built.clip.text.positional_embedding
    torch.save(built.clip.state_dict(), tmp_path / "coca.pt")
    options = ModelOptions(str(tmp_path / "coca.json"), pretrained=str(tmp_path / "coca.pt"))
    options.context_length, options.keep_positions = 40, 4
    longer = build_model(options).clip.text.positional_embedding
    assert len(positions) == 17 and len(longer) == 41
    assert torch.equal(longer[-1], positions[-1])
    assert torch.equal(longer[:-1], long_clip.stretch_positions(positions[:-1], 40, 4))


def test_long_captions_train_evaluate_and_resume(run, arguments, tmp_path, small):
    given = [*arguments, "--pretrained", small[0]["pretrained"], "--context_length", "40", "--keep_positions", "4"]
    code, out, error = run(*given, "--max_steps", "1")
    assert code == 0, error
    assert "the first 4 stay, the others are stretched by 3" in out + error
    code, out, error = run("--resume", tmp_path / "logs/ex0/last.pt", "--max_steps", "2")
    assert code == 0 and "stretched" not in out + error, error
    code, _, error = run(*arguments, "--keep_positions", "4")
    assert code == 2 and "--keep_positions 4 needs --context_length" in error
