"""The pairs of COCO's test split that ECCV Caption's annotators judged to match, from the eccv-caption package."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np

from clip_retrieval.data.dataset import RetrievalDataset
from clip_retrieval.files import read_json


def read_judged_pairs(dataset: RetrievalDataset) -> np.ndarray:
    """Read the (image index, caption index) pairs that match by ECCV Caption (Chun et al., 2022), int64 (n, 2).

    Empty unless the data are COCO's test split with its ids and the package is installed. The package itself is not
    imported: it takes seconds.
    """
    none = np.empty((0, 2), np.int64)
    spec = find_spec("eccv_caption")
    is_coco = dataset.name == "coco" and dataset.split == "test" and dataset.image_ids and dataset.text_ids
    if not is_coco or spec is None or spec.origin is None:
        return none
    data = Path(spec.origin).parent / "data"
    captions_of = read_json(data / "eccv_image_to_caption.json")
    images_of = read_json(data / "eccv_caption_to_image.json")
    pairs = {(int(image), int(caption)) for image, captions in captions_of.items() for caption in captions}
    pairs |= {(int(image), int(caption)) for caption, images in images_of.items() for image in images}
    image_row = {id: row for row, id in enumerate(dataset.image_ids or ())}
    text_row = {id: row for row, id in enumerate(dataset.text_ids or ())}
    rows = [(image_row[i], text_row[c]) for i, c in sorted(pairs) if i in image_row and c in text_row]
    return np.array(rows, np.int64).reshape(-1, 2) if rows else none
