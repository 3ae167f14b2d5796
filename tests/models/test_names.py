import subprocess
import sys

import pytest

from clip_retrieval.errors import UserError
from clip_retrieval.models.names import OPENAI_NAMES, open_clip_names, resolve


@pytest.mark.parametrize("name", OPENAI_NAMES)
def test_openai_names_default_to_openai_weights(name):
    found = resolve(name)
    assert found.name == name
    assert found.config in open_clip_names()
    assert found.openai_spelling
    assert found.default_weights == "openai"


@pytest.mark.parametrize(
    ("spelling", "name"), [("ViT-B-32", "ViT-B/32"), ("ViT-L-14-336", "ViT-L/14@336px"), ("ViT-H/14", "ViT-H-14")]
)
def test_spellings_resolve_to_one_model(spelling, name):
    assert resolve(spelling) == resolve(name)
    assert resolve(spelling).name == resolve(resolve(spelling).name).name


def test_only_openai_spellings_are_marked():
    assert not resolve("ViT-B-32").openai_spelling
    assert resolve("ViT-B-32").default_weights == "openai"


@pytest.mark.parametrize(
    ("name", "kind", "default_weights"),
    [
        ("tiny", "ours", "none"),
        ("ViT-B-16-SigLIP", "open_clip", "none"),
        ("ViT-B-32-quickgelu", "open_clip", "none"),
        ("hf-hub:laion/CLIP-ViT-B-32-laion2B-s34B-b79K", "hub", "own"),
        ("local-dir:weights/mine", "folder", "own"),
        ("configs/mine.json", "file", "none"),
    ],
)
def test_other_names_are_unchanged(name, kind, default_weights):
    found = resolve(name)
    assert (found.name, found.config, found.kind) == (name, name, kind)
    assert found.default_weights == default_weights


def test_every_open_clip_name_is_known():
    import open_clip

    assert set(open_clip.list_models()) <= set(open_clip_names())


@pytest.mark.parametrize(
    ("name", "near"), [("vit-b/32", "ViT-B/32"), ("tinny", "tiny"), ("ViT-B-16-Siglip", "ViT-B-16-SigLIP")]
)
def test_unknown_name_lists_the_nearest_names(name, near):
    with pytest.raises(UserError) as error:
        resolve(name)
    assert name in str(error.value)
    assert near in str(error.value)
    assert "\n" not in str(error.value)


def test_hub_name_or_folder_without_its_prefix_is_suggested(tmp_path):
    with pytest.raises(UserError, match=r"hf-hub:openai/clip-vit-base-patch32\?\)"):
        resolve("openai/clip-vit-base-patch32")
    with pytest.raises(UserError, match=f"did you mean local-dir:{tmp_path}"):
        resolve(str(tmp_path))


def test_empty_hub_id_is_refused():
    with pytest.raises(UserError, match="hf-hub:"):
        resolve("hf-hub:")


def test_resolving_names_does_not_import_torch():
    code = (
        "import sys; from clip_retrieval.models.names import resolve; resolve('ViT-B-32'); resolve('coca_base'); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
