"""The Python interface: its features are open_clip's, its metrics those of a matrix, and its import has no effects."""

import os
import re
import subprocess
import sys

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import clip_retrieval
from clip_retrieval import evaluate_features, load_model, read_dataset, retrieval_ranks
from clip_retrieval.errors import UserError
from clip_retrieval.models.checkpoint import Checkpoint
from tests.conftest import ROOT, read_json
from tests.models.small import small_clip, small_config, small_preprocess

TEXTS = ["a red thing", "", "two small green things " * 9, "a red thing"]


@pytest.fixture
def best(tmp_path):
    """A checkpoint of a small model."""
    options = {"vision_model": "small"}
    Checkpoint(small_clip().state_dict(), small_config(), small_preprocess(), options, 1, 3).save(tmp_path / "best.pt")
    return tmp_path / "best.pt"


def python(code):
    """The output of a new Python process."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}  # set by others
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_changes_nothing():
    state = (
        "lambda: (dict(os.environ), list(warnings.filters), Image.MAX_IMAGE_PIXELS, PngImagePlugin.PngStream,"
        " logging.root.handlers[:], logging.root.level, logging.getLogger('PIL').level, torch.get_num_threads(),"
        " torch.get_rng_state().tolist(), torch.is_grad_enabled(), sys.path[:], signal.getsignal(2))"
    )
    code = (
        "import os, sys, signal, logging, warnings, torch, open_clip, torchvision, tqdm\n"
        f"from PIL import Image, PngImagePlugin\nstate = {state}\nbefore = state()\nimport clip_retrieval\n"
        "from clip_retrieval import load_model, evaluate_features, retrieval_ranks, read_dataset\n"
        "assert state() == before, [pair for pair in zip(state(), before) if pair[0] != pair[1]]"
    )
    python(code)


def test_importing_the_package_loads_no_library():
    loaded = "{'torch', 'numpy', 'PIL', 'open_clip'} & {*sys.modules}"
    assert python(f"import sys, clip_retrieval; dir(clip_retrieval); print({loaded})") == "set()\n"


def test_programs_set_openmp_before_torch_is_loaded():
    scripts = [ROOT / "main.py", *(path for path in (ROOT / "scripts").glob("[a-z]*.py"))]
    code = (
        f"import runpy, sys; sys.path.insert(0, 'scripts')\nfor path in {[str(path) for path in scripts]}:\n"
        "    runpy.run_path(path); assert 'torch' not in sys.modules, path\n"
        "import os; from clip_retrieval.errors import run_with_exit_code; assert 'OMP_WAIT_POLICY' not in os.environ\n"
        "run_with_exit_code(lambda: print(os.environ['OMP_WAIT_POLICY']))"
    )
    assert python(code) == "PASSIVE\n"


def test_the_four_functions_are_listed():
    assert {"load_model", "evaluate_features", "retrieval_ranks", "read_dataset"} <= {*dir(clip_retrieval)}
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        clip_retrieval.nothing  # noqa: B018


def test_features_are_those_of_open_clip(best, captioned):
    model = load_model(best, device="cpu")
    paths = [captioned / "0.jpg", str(captioned / "1.jpg")]
    images = [Image.open(path) for path in paths]
    reference = small_clip()
    with torch.no_grad():
        expected = F.normalize(
            reference.encode_image(torch.stack([model.preprocess(image) for image in images])), dim=-1
        )
        tokens = open_clip.SimpleTokenizer(context_length=16)(TEXTS)
        expected_texts = F.normalize(reference.encode_text(tokens), dim=-1)
    for given in (paths, images):
        found = model.encode_images(given)
        assert found.dtype == torch.float32 and torch.allclose(found, expected, atol=1e-6)
    assert torch.allclose(model.encode_images(paths, batch_size=1), expected, atol=1e-6)
    assert torch.allclose(model.encode_texts(TEXTS), expected_texts, atol=1e-6)
    assert torch.equal(model.tokenizer(TEXTS), tokens)


def test_images_of_any_mode_are_encoded(best):
    pixels = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30), dtype=np.uint8))
    features = load_model(best, device="cpu").encode_images([pixels, pixels.convert("RGBA"), pixels.convert("P")])
    assert torch.allclose(features, features[:1].expand(3, -1), atol=1e-6)


def test_a_model_is_loaded_by_name(captioned):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    model = load_model(captioned / "small.json", device="cpu", pretrained="none")
    assert model.encode_texts(["a dog"]).shape == (1, 24)
    assert torch.equal(torch.get_rng_state(), before)


def test_wrong_arguments_are_named(best, tmp_path):
    model = load_model(best, device="cpu")
    for call, error, words in (
        (lambda: model.encode_texts("a dog"), TypeError, "list of texts"),
        (lambda: model.encode_images("a.jpg"), TypeError, "list of paths"),
        (lambda: model.encode_images([tmp_path / "none.jpg"]), UserError, r"none\.jpg"),
        (lambda: load_model(tmp_path / "none.pt"), UserError, r"none\.pt: no such"),
        (lambda: load_model("ViT-B/99"), UserError, "no such model"),
        (lambda: load_model(best, device="tpu"), UserError, "tpu"),
        (lambda: load_model(best, lr=1), TypeError, "'lr'"),
        (lambda: read_dataset("cocoo"), UserError, "did you mean coco"),
        (lambda: read_dataset("coco", columns=1), TypeError, "'columns'"),
    ):
        with pytest.raises(error, match=words):
            call()


def test_the_documented_program_equals_an_evaluation(best, captioned, run, tmp_path):
    program = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), re.DOTALL)[1]
    for documented, path in (("logs/ex0/best.pt", best), ("coco", "csv"), ("DATA", captioned)):
        program = program.replace(f'"{documented}"', repr(str(path)))
    names = {}
    exec(program, names)
    rest = ("--dataset", "csv", "--dataset_root", captioned, "--device", "cpu", "--num_workers", "0")
    assert run("--eval", "--resume", best, *rest)[0] == 0
    expected = read_json(tmp_path / "eval_csv_test" / "results.json")
    assert names["results"].items() <= expected.items()
    assert len(names["i2t"].above) == expected["images"] and len(names["t2i"].above) == expected["captions"]


def test_a_missing_split_is_named(captioned):
    with pytest.raises(UserError, match=r"has no dev split"):
        read_dataset("csv", captioned, split="dev")


def test_ranks_and_recall_are_those_of_the_matrix():
    rng = np.random.default_rng(0)
    images, texts = rng.normal(size=(30, 8)), rng.normal(size=(60, 8))
    text_to_image = np.arange(60) // 2
    scores = images @ texts.T
    t2i_ranks = [1 + (scores[:, text] > scores[image, text]).sum() for text, image in enumerate(text_to_image)]
    own = [scores[image, 2 * image : 2 * image + 2].max() for image in range(30)]
    others = np.where(text_to_image == np.arange(30)[:, None], -np.inf, scores)
    i2t_ranks = [1 + (others[image] > own[image]).sum() for image in range(30)]

    pairs = np.stack([text_to_image, np.arange(60)], axis=1)
    i2t, t2i = retrieval_ranks(images, texts, pairs)
    assert (1 + i2t.above).tolist() == i2t_ranks and (1 + t2i.above).tolist() == t2i_ranks
    for given in ({"pairs": pairs}, {"text_to_image": torch.from_numpy(text_to_image)}):
        results = evaluate_features(torch.from_numpy(images), torch.from_numpy(texts), **given)
        assert results["t2i"]["R@5"] == pytest.approx(100 * np.mean(np.array(t2i_ranks) <= 5))
        assert results["i2t"]["R@5"] == pytest.approx(100 * np.mean(np.array(i2t_ranks) <= 5))
    with pytest.raises(TypeError, match="either pairs or text_to_image"):
        evaluate_features(images, texts)
    with pytest.raises(UserError, match=r"text_to_image has shape \(3,\)"):
        evaluate_features(images, texts, text_to_image=[0, 1, 2])
