"""Small data sets in Chinese-CLIP's formats, and the content of a data set by ids."""

import base64
import io
import json

import numpy as np
from PIL import Image

ALPHABETS = {"standard": base64.b64encode, "urlsafe": base64.urlsafe_b64encode}


def photo(seed, side=20):
    """The bytes of a JPEG whose base64 has characters that the two alphabets write differently."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)).save(file, "jpeg")
    encoded = base64.b64encode(file.getvalue())
    assert b"+" in encoded and b"/" in encoded
    return file.getvalue()


def write_split(folder, name, images, texts, encode=base64.b64encode):
    """Write {name}_imgs.tsv of {id: bytes} and {name}_texts.jsonl of (text id, text, image ids)."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"{image_id}\t{encode(content).decode()}\n" for image_id, content in images.items()]
    (folder / f"{name}_imgs.tsv").write_text("".join(lines), encoding="utf-8")
    records = [dict(zip(("text_id", "text", "image_ids"), text)) for text in texts]
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    (folder / f"{name}_texts.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def write_sample(folder, name="test", **options):
    """Three images and four texts: one has two images, one has none, and one image has no text."""
    images = {1000002: photo(1), 517602: photo(2), 9007199254740993: photo(3)}
    texts = [
        (8428, "高级感托特包斜挎", [1000002, 517602]),
        (8429, "雪地里的狗。", []),
        (9223372036854775807, "“红色”的包", [517602]),
        (2, "红色的包", [517602]),
    ]
    return write_split(folder, name, images, texts, **options)


def content(dataset):
    """Return images and captions by their ids, and the pairs of ids."""
    image_ids, text_ids = list(dataset.image_ids), list(dataset.text_ids)
    images = {image_id: dataset.images.encoded(i) for i, image_id in enumerate(image_ids)}
    pairs = sorted(((image_ids[i], text_ids[j]) for i, j in dataset.pairs.tolist()), key=repr)
    assert len(images) == len(dataset.images) and len(set(text_ids)) == len(dataset.captions)
    return images, dict(zip(text_ids, dataset.captions)), pairs
