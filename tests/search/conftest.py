import json

import numpy as np
import pytest
from PIL import Image

from clip_retrieval.search.source import INDEX_FOLDER
from tests.models.small import small_config


def paint(path, seed, size=(24, 20)):
    """Write a random image; JPEG for .jpg."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path)


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """A folder with two checkpoints of small random models, a.pt and b.pt."""
    import open_clip
    import torch

    folder = tmp_path_factory.mktemp("models")
    (folder / "small.json").write_text(json.dumps(small_config()))
    for seed, name in enumerate("ab"):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            torch.save(open_clip.CLIP(**small_config()).state_dict(), folder / f"{name}.pt")
    return folder


@pytest.fixture
def model(models):
    """The options of a small model, on the CPU."""
    return ("--vision_model", models / "small.json", "--pretrained", models / "a.pt", "--device", "cpu")


@pytest.fixture
def photos(tmp_path):
    """A folder of six photographs, two of them in a subfolder."""
    folder = tmp_path / "photos"
    for number in range(4):
        paint(folder / f"{number}.jpg", number)
    for number in range(4, 6):
        paint(folder / "trip" / f"{number}.png", number)
    return folder


@pytest.fixture
def index(script, photos, model):
    """index(*options) builds or updates the index of `photos`: (exit code, output, errors)."""

    def run(*options):
        return script("search", "index", photos, *model, "--num_workers", 0, *options)

    return run


@pytest.fixture
def indexed(index, photos):
    """The folder of six photographs, with an index."""
    code, _, err = index()
    assert code == 0, err
    return photos


def read_entries(photos):
    """The lines of an index by file name, and its features by file name."""
    folder = photos / INDEX_FOLDER
    head, *entries = map(json.loads, (folder / "index.jsonl").read_text().splitlines())
    features = np.load(folder / head["features"], allow_pickle=False)
    readable = [entry["name"] for entry in entries if "problem" not in entry]
    assert len(readable) == len(features)
    return {entry["name"]: entry for entry in entries}, dict(zip(readable, features))
