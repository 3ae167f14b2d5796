from pathlib import Path

import pytest
from PIL import Image

from clip_retrieval.data.catalog import read_dataset
from clip_retrieval.options import DataOptions


@pytest.fixture
def photos():
    """photos(folder, "a.jpg", ...) writes small JPEGs."""

    def write(folder: Path, *names: str) -> None:
        for i, name in enumerate(names):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (40 * i % 256, 80, 120)).save(folder / name)

    return write


@pytest.fixture
def read():
    """read(dataset, root, split, **options) as a run does."""

    def read_split(dataset: str, root: Path, split: str = "test", **options):
        options = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
        return read_dataset(DataOptions(dataset=dataset, dataset_root=str(root), **options), split)

    return read_split


@pytest.fixture
def described():
    """described(dataset) returns {file name of an image: its captions in order}, in the order of the images."""

    def of(dataset) -> dict[str, list[str]]:
        result = {Path(dataset.images.name(i)).name: [] for i in range(len(dataset.images))}
        assert len(result) == len(dataset.images)
        for image, caption in dataset.pairs.tolist():
            result[Path(dataset.images.name(image)).name].append(dataset.captions[caption])
        return result

    return of
