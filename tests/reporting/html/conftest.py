import numpy as np
import pytest
import torch
from PIL import Image

from clip_retrieval.data.dataset import RetrievalDataset
from clip_retrieval.data.images.image_files import ImageFiles
from clip_retrieval.evaluation.evaluator import SplitFeatures
from clip_retrieval.evaluation.metrics import report
from clip_retrieval.evaluation.ranks import retrieval_ranks
from clip_retrieval.reporting.html.write import Evaluated

HOSTILE = '</script><script>document.title = 1</script> "quoted" <img src=x onerror="document.title = 2">'
HOSTILE_NAME = "a\"><img src=x onerror=alert(1)> 'b'.png"


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A data set of 24 small images with two captions each, one of them hostile, and two hostile file names."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    names = {3: HOSTILE_NAME, 4: "caf\udce9 \x1b[31m\n.png"}  # the second is not UTF-8
    paths = [str(folder / names.get(i, f"photo {i}.png")) for i in range(24)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(path)
    captions = [f"a photo of the number {i // 2}, take {i % 2}" for i in range(48)]
    captions[0] = HOSTILE
    captions[10] = captions[20] = "Two dogs in the snow."
    pairs = np.array([(i // 2, i) for i in range(48)])
    return RetrievalDataset("photos", "test", ImageFiles(paths), captions, pairs)


def make_run(dataset, noise, name="run", **results):
    """An evaluated run whose captions are the features of their images with noise."""
    generator = torch.Generator().manual_seed(0)
    normalize = torch.nn.functional.normalize
    images = normalize(torch.randn(len(dataset.images), 8, generator=generator), dim=1)
    captions = images[dataset.pairs[:, 0]] + noise * torch.randn(len(dataset.captions), 8, generator=generator)
    captions = normalize(captions, dim=1)
    ranks = retrieval_ranks(images, captions, dataset.pairs)
    block = report(*ranks) | {"split": "test", "model": "small", "weights": "w.pt"} | results
    return Evaluated(name, dataset, SplitFeatures(images, captions, {}), ranks, block)
