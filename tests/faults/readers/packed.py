"""Readers of packed images and captions: LMDB, tar shards, Arrow folders, image caches."""

from __future__ import annotations

import base64
import json
import pickle
from pathlib import Path

from tests.data.make_shards import write_shard
from tests.faults import tokens
from tests.faults.containers import change_lmdb, change_tar, write_lmdb
from tests.faults.readers.reader import CAPTIONS, Reader, encoded_image, transform, use_splits, write_images
from tests.faults.structures import change_json
from tests.models.small import small_preprocess


def _make_lmdb(folder: Path) -> Path:
    place = folder / "lmdb" / "test"
    place.mkdir(parents=True)
    images = [(b"%d" % i, base64.b64encode(encoded_image(i))) for i in range(3)]
    write_lmdb(place / "imgs", [*images, (b"num_images", b"3")])
    pairs = [(b"%d" % i, pickle.dumps((i % 3, 100 + i, text))) for i, text in enumerate(CAPTIONS)]
    unanswered = (b"text:0", json.dumps({"text_id": 999, "text": "没有", "image_ids": []}).encode())
    write_lmdb(place / "pairs", [*pairs, unanswered, (b"num_samples", b"%d" % len(pairs))])
    return place


def _make_lmdb_images(folder: Path) -> list[Path]:
    return [_make_lmdb(folder) / "imgs" / "data.mdb"]


def _make_lmdb_pairs(folder: Path) -> list[Path]:
    return [_make_lmdb(folder) / "pairs" / "data.mdb"]


def _read_lmdb(path: Path) -> None:
    use_splits(("test",), "chinese", path.parents[3])


def _make_shards(folder: Path) -> list[Path]:
    plain = [(f"{i:03}", {"jpg": encoded_image(i), "txt": text}) for i, text in enumerate(CAPTIONS[:3])]
    rich = [
        (f"a/{i}", {"png": encoded_image(i, "png"), "json": json.dumps({"caption": [text, "b"]})})
        for i, text in enumerate(CAPTIONS[:2])
    ]
    return [write_shard(folder / "test-0.tar", plain), write_shard(folder / "test-1.tar", rich)]


def _read_shards(path: Path) -> None:
    use_splits(("test",), "webdataset", path.parent, val_data=str(path))
    use_splits(("val",), "webdataset", path.parent, val_data=str(path))


def _read_stream(path: Path) -> None:
    import numpy as np

    from clip_retrieval.data.shards.find import check_whole
    from clip_retrieval.data.shards.lanes import decode_sample
    from clip_retrieval.data.shards.samples import SkipSample, check_layout, count_samples, read_samples

    check_whole(path)
    count = count_samples(path)
    check_layout(path, None)
    for first in (0, count // 2):
        for sample in read_samples(path, first):
            try:
                decode_sample(sample, path, transform(), None, np.random.default_rng(0))
            except SkipSample:
                continue


def _make_saved(folder: Path) -> list[Path]:
    import datasets

    datasets.disable_progress_bars()
    images = [encoded_image(i, "png") for i in range(3)]
    texts = [base64.b64encode(image).decode() for image in images]
    columns = {
        "structs": {"image": [{"bytes": image, "path": f"{i}.png"} for i, image in enumerate(images)]},
        "texts": {"image": [[text] for text in texts]},
        "bytes": {"image": images},
    }
    for name, held in columns.items():
        captions = [list(CAPTIONS[i : i + 2]) if name == "texts" else CAPTIONS[i] for i in range(3)]
        datasets.Dataset.from_dict({**held, "caption": captions}).save_to_disk(str(folder / name))
    splits = {"test": datasets.Dataset.from_dict({"image": images, "caption": list(CAPTIONS[:3])})}
    datasets.DatasetDict(splits).save_to_disk(str(folder / "splits"))
    return sorted(folder.glob("**/*.*"))


def _make_arrow(folder: Path) -> list[Path]:
    return [path for path in _make_saved(folder) if path.suffix == ".arrow"]


def _make_saved_json(folder: Path) -> list[Path]:
    return [path for path in _make_saved(folder) if path.suffix == ".json"]


def _read_saved(path: Path) -> None:
    in_splits = "splits" in (path.parent.name, path.parent.parent.name)
    root = path.parent if path.parent.name != "test" else path.parent.parent
    use_splits(("test",), "huggingface", root if in_splits else path.parent)


def _use_cache(folder: Path, augment: str = "none") -> None:
    from clip_retrieval.data.images.image_files import ImageFiles
    from clip_retrieval.data.pixels.cache import open_cached_pixels

    images = ImageFiles([str(folder / f"{i}.jpg") for i in range(4)])
    preprocess = small_preprocess(8)
    pixels = open_cached_pixels(images, preprocess, folder / "cache", "own", augment=augment, num_workers=0)
    pixels.batch(range(4), [1, 2, 3, 4])
    pixels(3, 7)


def _make_cache(folder: Path) -> list[Path]:
    write_images(folder, [f"{i}.jpg" for i in range(4)])
    for augment in ("none", "crop"):
        _use_cache(folder, augment)
    return sorted((folder / "cache").glob("*.pixels"), key=lambda path: path.stat().st_size)


def _read_cache(path: Path) -> None:
    for augment in ("none", "crop"):
        _use_cache(path.parent.parent, augment)


def _make_partial(folder: Path) -> list[Path]:
    """Write the files of an image cache whose build was killed."""
    whole = _make_cache(folder)[0]
    content = whole.read_bytes()
    whole.unlink()
    records = len(content) - 4 * 32 - 16
    partial, journal = (whole.with_name(f"{whole.name}.{ending}") for ending in ("partial", "journal"))
    partial.write_bytes(content[: records // 2])
    journal.write_bytes(content[records : records + 64])
    return [partial, journal]


def _read_partial(path: Path) -> None:
    path.with_suffix("").unlink(missing_ok=True)
    _use_cache(path.parent.parent)


PACKED = (
    Reader("lmdb images", _make_lmdb_images, _read_lmdb, (*tokens.JPEG, *tokens.TEXT), (change_lmdb,)),
    Reader("lmdb pairs", _make_lmdb_pairs, _read_lmdb, (*tokens.PICKLE, *tokens.JSON), (change_lmdb,)),
    Reader("shard", _make_shards, _read_shards, (*tokens.TAR, *tokens.JSON), (change_tar,)),
    Reader("shard stream", _make_shards, _read_stream, (*tokens.TAR, *tokens.JSON), (change_tar,)),
    Reader("saved folder arrow", _make_arrow, _read_saved, tokens.ARROW),
    Reader("saved folder json", _make_saved_json, _read_saved, tokens.JSON, (change_json,)),
    Reader("image cache", _make_cache, _read_cache, tokens.PIXELS),
    Reader("unfinished image cache", _make_partial, _read_partial, tokens.PIXELS),
)
